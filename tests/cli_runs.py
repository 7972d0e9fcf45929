"""What the tests of the `peft` command share: a tiny model, data, running a command line, interrupting it."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - on a new machine it says that it builds a cache: not within a command
import pytest
import torch
from tiny_models import make_tokenizer, save_llama

from peft.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a random two-layer Llama and a tokenizer with a chat template."""
    return save_llama(tmp_path_factory.mktemp("tiny"), make_tokenizer())


@pytest.fixture
def loud_transformers():
    """The commands quiet transformers for the whole process; other tests may look at what it says."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def words(count: int) -> str:
    return " ".join("".join(random.choices(string.ascii_lowercase, k=random.randint(1, 6))) for _ in range(count))


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def rows_file(tmp_path) -> str:
    """Prompts whose completion is always the same word: learned within a few steps."""
    return write_jsonl(tmp_path / "rows.jsonl", [{"prompt": words(3), "completion": " yes"} for _ in range(30)])


def run(*argv: str) -> int:
    """The exit code of a command line."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def train(tiny: str, data_file: str, output: Path, *more: str) -> int:
    return run("train", "--model", tiny, "--data", data_file, "--output", output, "--batch-size", 4, *more)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from peft import load_peft_weights

    return load_peft_weights(str(folder), device="cpu")


@pytest.fixture
def stop_at(monkeypatch):
    """Interrupt a training after an update step, as Ctrl-C does; step 0 takes it back."""
    from peft.cli.progress import Progress

    original = Progress.on_step_end

    def arrange(step: int) -> None:
        def on_step_end(self, args, state, control, **kwargs):
            original(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, "on_step_end", on_step_end)

    return arrange
