"""What `import peft` costs and offers: no heavy modules, lazy names that all resolve, and errors that explain."""

import ast
import importlib.metadata
import importlib.util
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import peft
from peft import _missing, _names

HEAVY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "tqdm",
    "transformers",
    "yaml",
)


def run(code: str, *options: str) -> str:
    """Run `code` in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_modules_after(code: str) -> set[str]:
    return {name for name in run(f"{code}\nimport sys; print(*sys.modules)").split() if name in HEAVY}


def test_import_pulls_in_nothing_heavy():
    assert heavy_modules_after("import peft") == set()
    assert heavy_modules_after("import peft; dir(peft), peft.__all__, hasattr(peft, 'XLoraConfig')") == set()


def test_public_names_pull_in_torch_and_nothing_else():
    """All public names together import torch and, of the list, nothing that torch does not bring itself."""
    allowed = heavy_modules_after("import torch")
    assert "torch" in allowed  # or the list of modules is not read
    heavy = heavy_modules_after("import peft\nfor name in peft.__all__: getattr(peft, name)")
    assert heavy <= allowed, f"imported before it is used: {sorted(heavy - allowed)}"


def test_import_without_warnings():
    run("import peft; peft.LoraConfig, peft.get_peft_model", "-W", "error")


@pytest.mark.parametrize("name", peft.__all__)
def test_public_name_resolves_and_pickles_by_reference(name):
    value = getattr(peft, name)
    assert name in dir(peft)
    if isinstance(value, type):
        assert pickle.loads(pickle.dumps(value)) is value


def test_submodules_are_attributes_after_plain_import():
    names = run(f"import peft\nfor name in {_names.SUBMODULES}: print(getattr(peft, name).__name__)").split()
    assert names == [f"peft.{name}" for name in _names.SUBMODULES]


def test_star_import():
    assert run("from peft import *; print(LoraConfig.__name__)").strip() == "LoraConfig"


def test_type_checkers_see_the_table():
    """The TYPE_CHECKING block imports exactly the names of the table, each from its module."""
    tree = ast.parse(Path(peft.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        for alias in node.names:
            assert alias.name == alias.asname, "without `as`, checkers take the name for private"
            seen[alias.name] = "." * node.level + node.module
    assert seen == _names.TABLE


def test_no_name_is_both_here_and_missing():
    assert not _names.TABLE.keys() & set(_missing.NAMES["peft"].split())
    assert len(_names.TABLE) == sum(len(names.split()) for names in _names.EXPORTS.values())


@pytest.mark.parametrize("name", _missing.NAMES["peft"].split())
def test_missing_name_names_its_method(name):
    assert not hasattr(peft, name)
    with pytest.raises(ImportError) as from_import:
        exec(f"from peft import {name}")
    with pytest.raises(AttributeError) as attribute:
        getattr(peft, name)
    assert str(from_import.value) == str(attribute.value)
    assert str(from_import.value).startswith(
        f"{_missing.method_of(f'peft.{name}')} (peft.{name}) is not part of peft 0.21.2+"
    )
    assert "peft==0.21.2" in str(from_import.value)


MISSING_BELOW = [
    f"{module}.{name}"
    for module, names in _missing.NAMES.items()
    if module != "peft.PeftModel"  # a class
    for name in names.split()
]


def test_missing_names_of_submodules_name_their_method():
    assert len(MISSING_BELOW) == len(set(MISSING_BELOW)) > 300
    for fullname in MISSING_BELOW:
        module, _, name = fullname.rpartition(".")
        assert not hasattr(importlib.import_module(module), name), f"{fullname} is here: take it out of the table"
        with pytest.raises(ImportError) as error:
            exec(f"from {module} import {name}")
        assert str(error.value).startswith(f"{_missing.method_of(fullname)} ({fullname}) is not part of peft 0.21.2+")


@pytest.mark.parametrize("module", _missing.MODULES)
def test_missing_modules_name_their_method(module):
    parent, _, name = module.rpartition(".")
    for statement in (f"import {module}", f"from {module}.layer import Linear", f"from {parent} import {name}"):
        with pytest.raises(ImportError) as error:
            exec(statement)
        assert str(error.value).startswith(f"{_missing.MODULES[module]} ({module}) is not part of peft 0.21.2+")
    assert not hasattr(importlib.import_module(parent), name)
    assert module not in sys.modules


def test_modules_can_be_walked():
    """Discovery of modules neither meets the missing ones nor stumbles over plain modules that explain names."""
    found = {module.name for module in pkgutil.walk_packages(peft.__path__, "peft.")}
    assert {"peft.tuners.lora.layer", "peft.tuners.tuners_utils", "peft.utils.other"} <= found
    assert not found & set(_missing.MODULES)
    assert importlib.util.find_spec("peft.utils.other").submodule_search_locations is None


def test_missing_names_cost_nothing_until_asked_for():
    code = "import peft, sys; peft.LoraConfig, peft.get_peft_model"
    assert run(f"{code}; print('peft._missing' in sys.modules)").strip() == "False"
    assert heavy_modules_after("import peft\ntry: import peft.tuners.xlora\nexcept ImportError: pass") == set()


def test_names_that_upstream_has_in_several_places():
    from peft.tuners.tuners_utils import BaseTuner, delete_adapter, get_pattern_key, set_adapter, set_requires_grad
    from peft.utils.other import get_pattern_key as same

    assert same is get_pattern_key and BaseTuner.__module__ == "peft.tuners.base"
    assert (set_adapter, delete_adapter, set_requires_grad) == (
        peft.functional.set_adapter,
        peft.functional.delete_adapter,
        peft.functional.set_requires_grad,
    )


def test_unknown_name_is_an_ordinary_error():
    assert not hasattr(peft, "NoSuchThing")
    with pytest.raises(ImportError, match="cannot import name 'NoSuchThing' from 'peft'"):
        exec("from peft import NoSuchThing")
    with pytest.raises(ImportError, match="cannot import name 'NoSuchThing' from 'peft.tuners.lora.layer'"):
        exec("from peft.tuners.lora.layer import NoSuchThing")
    with pytest.raises(ModuleNotFoundError, match="No module named 'peft.tuners.nothing'"):
        exec("import peft.tuners.nothing")


def test_attach_resolves_once(monkeypatch, tmp_path):
    """A name is looked up once, then lies in the package."""
    package = tmp_path / "lazy_example"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from peft._lazy import attach\n"
        "__getattr__, __dir__, __all__ = attach(__name__, {'thing': '.inner'}, ('inner',))\n"
    )
    (package / "inner.py").write_text("thing = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lazy_example

    assert lazy_example.__all__ == ["thing"]
    assert {"thing", "inner"} <= set(dir(lazy_example))
    assert "thing" not in vars(lazy_example)
    assert lazy_example.thing is lazy_example.inner.thing
    assert vars(lazy_example)["thing"] is lazy_example.inner.thing
    with pytest.raises(ImportError, match=r"^cannot import name 'other' from 'lazy_example'"):
        from lazy_example import other  # noqa: F401


def test_names_of_methods_are_the_packages_own():
    """`peft.tuners` has every name of a method that `peft` has, and explains the missing ones alike."""
    assert {name for name, module in _names.TABLE.items() if module.startswith(".tuners.")} == set(peft.tuners.__all__)
    assert all(getattr(peft.tuners, name) is getattr(peft, name) for name in peft.tuners.__all__)


def test_every_folder_is_a_package():
    """A folder without `__init__.py` works in a checkout, but is left out of the wheel without a word."""
    root = Path(peft.__file__).parent
    assert {path.parent for path in root.rglob("*.py")} == {path.parent for path in root.rglob("__init__.py")}
    assert (root / "py.typed").exists()


def test_version_has_one_source():
    """The metadata, which transformers' version checks read, says what the package says."""
    assert importlib.metadata.version("peft") == peft.__version__
    assert peft.__version__.startswith("0.21.2+sft.")
