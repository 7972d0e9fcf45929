"""Every code block of the README and the documentation runs, page by page, as a reader would run it.

Only the model's name is exchanged for a tiny random model on disk, since there may be no network.
"""

from __future__ import annotations

import re
import sys
import types
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


def test_index_lists_every_page():
    index = (ROOT / "docs" / "source" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs" / "source").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([a-z_]+\.md)\)", index))
