"""Every code block of the README and the documentation runs, page by page, as a reader would run it.

The model is exchanged for a tiny random one on disk, since there may be no network. Commands train for two steps.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer, save_llama

from peft import mapping
from peft.cli import main

pytest_plugins = ["cli_runs"]
ROOT = Path(__file__).parent.parent
HUB_NAMES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "source").glob("*.md"))]
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
INSTALL = ROOT / "docs" / "source" / "install.md"
# What makes a benchmark short. (What the one of DE-NAS runs, tests/test_denas_benchmark.py runs.)
BENCHMARK_OPTIONS = {
    "quality.py": "--only head --tasks syllogism --seeds 1 --rates 1e-3 --steps 2 --batch 8 --validation 2 --test 2 "
    "--results cells",
    "denas_proxy.py": "--table",
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """A folder with a random two-layer Llama and a byte-level tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    return save_llama(tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda p: p.stem)
def test_code_blocks_run(page, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses on a page look up their annotations
    monkeypatch.setattr(mapping, "METHODS", dict(mapping.METHODS))  # a method that a page registers is that page's
    for code in BLOCK.findall(page.read_text()):
        for name in HUB_NAMES:
            code = code.replace(name, tiny_model)
        with monkeypatch.context() as started_by:
            if "init_process_group" in code:
                for key, value in TORCHRUN.items():
                    started_by.setenv(key, value)
            exec(compile(code, str(page), "exec"), vars(module))
    assert torch.is_grad_enabled()


def test_the_commands_of_the_install_page_run(tmp_path):
    """All of them in order, in a copy of the repository and an empty environment; dependencies alone are left out."""
    clone, environment = tmp_path / "clone", tmp_path / "environment"
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    venv.create(environment, with_pip=True)
    options = {"PIP_NO_DEPS": "1", "PIP_YES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    blocks = COMMANDS.findall(INSTALL.read_text())
    version = ["python", "-c", "import importlib.metadata as m; print(m.version('peft'))"]
    printed = []
    for block in blocks:
        for command in (["bash", "-euc", block], version):
            done = subprocess.run(
                command, cwd=clone, env=without | options | {"PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout.strip())
    assert printed == ["0.21.2+sft.1"] * (len(blocks) - 1) + ["0.21.2"]  # the last block goes back to upstream


def shortened(words: list[str], model: str) -> list[str]:
    """The words of a `peft` command, with a tiny model, and with a training of two steps."""
    words = [model if word in ("MODEL", "smollm2") else word for word in words]
    if words[0] == "train":
        if "--epochs" in words:
            at = words.index("--epochs")
            del words[at : at + 2]
        words += ["--max-steps", "2", "--batch-size", "2", "--eval-size", "2"]
        words += [] if "--model" in words else ["--model", model]
    return words


def run_command(line: str, model: str, folder: Path) -> int:
    """The exit code of one line of a page, run in a folder."""
    words = shlex.split(line, comments=True)
    if words[0] == "peft":
        return main(shortened(words[1:], model))
    if words[0] == "make":  # what the targets do is the gate's work and the other tests'; a target must exist
        words = ["make", "-C", str(ROOT), "--dry-run", *words[1:]]
    elif words[:1] == ["python"] and words[1].startswith("benchmarks/"):
        quick = [] if "--table" in words else shlex.split(BENCHMARK_OPTIONS[Path(words[1]).name])
        words = [sys.executable, *words[1:], *quick]
    else:
        assert words[0] in ("torchrun", "accelerate"), f"say here how to run {line!r} quickly"
        verb = words.index("peft") + 1
        words = [*words[:verb], *shortened(words[verb:], model), "--overwrite"]
        words[0] = str(Path(sys.executable).parent / words[0])
        words = ["2" if word == "4" else word for word in words]  # processes
    # PET_STANDALONE lets torchrun find a free port: its usual one may be another run's.
    options = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}
    done = subprocess.run(words, cwd=folder, env=os.environ | options, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != INSTALL and COMMANDS.search(page.read_text())], ids=lambda p: p.stem
)
def test_commands_run(page, tiny_model, tmp_path, monkeypatch, loud_transformers):
    """Line by line, each where the lines before it left off, in a copy of what benchmarks read and write."""
    for name in ("benchmarks", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    rows = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    for block in COMMANDS.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            assert run_command(line, tiny_model, tmp_path) == 0, line


def test_index_lists_every_page():
    index = (ROOT / "docs" / "source" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs" / "source").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([a-z0-9_]+\.md)\)", index))
