"""Every code block of the README and the documentation runs, page by page, as a reader would run it.

Only the model's name is exchanged for a tiny random model on disk, since there may be no network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer, save_llama

ROOT = Path(__file__).parent.parent
HUB_NAMES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "source").glob("*.md"))]


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
    for code in BLOCK.findall(page.read_text()):
        for name in HUB_NAMES:
            code = code.replace(name, tiny_model)
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
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/source/install.md").read_text(), re.M | re.S)
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


def test_index_lists_every_page():
    index = (ROOT / "docs" / "source" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs" / "source").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([a-z_]+\.md)\)", index))
