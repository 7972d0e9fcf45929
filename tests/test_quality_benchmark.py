"""The quality benchmark: which cells it runs and when, what its tables say of them, and one real cell of each kind."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality  # noqa: E402
import quality_cell  # noqa: E402
from quality_cell import Cell, Suite  # noqa: E402

SUITE = Suite(
    model="minilm",
    tasks={"aiw": {}, "syllogism": {"invalid_ratio": 0.5}},
    rates={"full": (1e-4, 1e-3), "lora": (1e-3, 2e-3, 5e-3)},
    steps=10,
    batch=4,
    validation=20,
    test=30,
)
GRID = [Cell(task, method, rate, 0) for task in SUITE.tasks for method, r in SUITE.rates.items() for rate in r]


def write(folder: Path, cell: Cell, suite: Suite = SUITE, **figures) -> None:
    """A cell's file, with made-up figures where none are given."""
    made_up = {
        "validation": random.random(),
        "test": random.random(),
        "majority": 0.25,
        "trained": 1000,
        "cpu_seconds_per_step": 0.3,
        "frozen_cpu_seconds_per_step": 0.2,
        "step_bytes": 2**20,
        "optimizer_bytes": 2**20,
    }
    result = dataclasses.asdict(cell) | made_up | {"settings": suite.settings(cell.task)} | figures
    (folder / cell.file).write_text(json.dumps(result))


def row_of(text: str, label: str) -> list[str]:
    """The cells of a line in a Markdown table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


# ---- Which cells are run ----


def test_first_the_grid_then_further_seeds_at_the_best_rate(tmp_path):
    assert list(quality.missing(quality.Results(SUITE, tmp_path), 3)) == GRID
    for cell in GRID[:-1]:  # the grid of the last method lacks a rate: it has no best one yet
        write(tmp_path, cell, validation=0.9 if cell.rate == 1e-3 else 0.1)
    best = [("aiw", "full"), ("aiw", "lora"), ("syllogism", "full")]
    expected = [GRID[-1], *(Cell(task, method, 1e-3, seed) for seed in (1, 2) for task, method in best)]
    assert list(quality.missing(quality.Results(SUITE, tmp_path), 3)) == expected
    assert list(quality.missing(quality.Results(SUITE, tmp_path), 1)) == [GRID[-1]]


def test_rate_is_chosen_on_validation_problems_only(tmp_path):
    for rate, validation, test in ((1e-3, 0.6, 0.9), (2e-3, 0.8, 0.2), (5e-3, 0.8, 1.0)):
        write(tmp_path, Cell("aiw", "lora", rate, 0), validation=validation, test=test)
    results = quality.Results(SUITE, tmp_path)
    assert results.best_rate("aiw", "lora") == 2e-3  # the smaller of two that are equally good
    assert [cell["test"] for cell in results.chosen("aiw", "lora")] == [0.2]
    # A rate beyond the grid that somebody tried as well counts too.
    write(tmp_path, Cell("aiw", "lora", 1e-2, 0), validation=0.85)
    assert quality.Results(SUITE, tmp_path).best_rate("aiw", "lora") == 1e-2


def test_methods_that_this_version_lacks_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "is_available", lambda method: method != "full")
    assert {cell.method for cell in quality.missing(quality.Results(SUITE, tmp_path), 2)} == {"lora"}


def test_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    ran = []

    def run_cell(suite, cell, folder, pause_file):
        if len(ran) == stop_after:
            raise KeyboardInterrupt
        ran.append(cell)
        write(folder, cell, validation=cell.rate)  # the largest rate is the best
        return True

    monkeypatch.setattr(quality, "run_cell", run_cell)
    for stop_after in (4, 9, 12):  # noqa: B007 (run_cell reads it)
        with pytest.raises(KeyboardInterrupt):
            list(quality.run_missing(SUITE, tmp_path, 2, None))
    stop_after = None
    assert all(succeeded for _, succeeded in quality.run_missing(SUITE, tmp_path, 2, None))
    largest = {method: rates[-1] for method, rates in SUITE.rates.items()}
    assert ran == GRID + [Cell(task, method, rate, 1) for task in SUITE.tasks for method, rate in largest.items()]


def test_cell_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    ran = []

    def run_cell(suite, cell, folder, pause_file):
        ran.append(cell)
        if cell.rate == 2e-3:
            return False
        write(folder, cell, suite)
        return True

    monkeypatch.setattr(quality, "run_cell", run_cell)
    arguments = ["--only", "lora", "--tasks", "syllogism", "--rates", "1e-3", "2e-3", "--seeds", "2"]
    assert quality.main([*arguments, "--results", str(tmp_path)]) == 1
    assert [cell.rate for cell in ran] == [1e-3, 2e-3]  # no second seed while the choice is open
    assert "failed: syllogism-lora-lr0.002-seed0.json" in capsys.readouterr().err


def test_cells_of_other_settings_are_refused(tmp_path):
    write(tmp_path, GRID[0], dataclasses.replace(SUITE, steps=20))
    with pytest.raises(SystemExit, match="measured with steps = 20, now it is 10: delete the file"):
        quality.Results(SUITE, tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--tasks", "chess"], "--tasks must be of syllogism, family_relationships with --model minilm, got chess"),
        (["--model", "smollm2", "--only", "head"], "with --model smollm2, got head"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        quality.parse(arguments)
    assert message in capsys.readouterr().err


def test_program_stands_still_while_the_pause_file_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "POLL_SECONDS", 0.02)
    pause, pid, go = (tmp_path / name for name in ("pause", "pid", "go"))
    code = (
        "import os, pathlib, sys, time\n"
        "pid, go = map(pathlib.Path, sys.argv[1:])\n"
        "pid.write_text(str(os.getpid()))\n"
        "while not go.exists(): time.sleep(0.01)\n"
        "sys.exit(7)\n"
    )
    codes = []

    def run():
        codes.append(quality.run_process([sys.executable, "-c", code, str(pid), str(go)], {}, pause))

    def until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    pause.touch()
    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.1)
    assert not pid.exists()  # not even started
    pause.unlink()
    until(lambda: pid.exists() and pid.read_text())
    stat = Path("/proc", pid.read_text(), "stat")
    pause.touch()
    until(lambda: stat.read_text().split()[2] == "T")
    go.touch()
    pause.unlink()
    thread.join(60)
    assert codes == [7]


# ---- What the tables say ----


def test_table_of_seeds(tmp_path):
    tests = [random.random() for _ in range(3)]
    for seed, accuracy in enumerate(tests):
        seconds = {"cpu_seconds_per_step": 0.2 + seed, "frozen_cpu_seconds_per_step": 0.1 * (seed + 1)}
        write(tmp_path, Cell("aiw", "full", 1e-3, seed), validation=0.75, test=accuracy, **seconds)
    write(tmp_path, Cell("aiw", "full", 1e-4, 0), validation=0.5)
    write(tmp_path, Cell("aiw", "full", 1e-4, 1), test=0.0)  # of a rate that was not chosen
    text = quality.tables(quality.Results(SUITE, tmp_path))
    mean, error = 100 * np.mean(tests), 100 * np.std(tests, ddof=1) / math.sqrt(3)
    # Ratios of the cells: 2, 6, 7.33. The grid's largest rate gets a star.
    expected = ["1,000", "0.001 *", "75.0", f"{mean:.1f} ± {error:.1f}", "3", "1.20", "6.00", "2"]
    first, second = text.split("### syllogism")
    assert row_of(first, "full fine-tuning") == expected
    assert row_of(first, "LoRA") == row_of(second, "full fine-tuning") == [""] * 8
    assert row_of(first, "most frequent answer")[3] == "25.0"


def test_one_seed_has_no_error(tmp_path):
    for rate in SUITE.rates["lora"]:
        write(tmp_path, Cell("aiw", "lora", rate, 0), validation=float(rate == 2e-3), test=0.5)
    text = quality.tables(quality.Results(SUITE, tmp_path)).split("### syllogism")[0]
    assert row_of(text, "LoRA")[1:5] == ["0.002", "100.0", "50.0", "1"]


def test_plot_of_a_half_filled_table(tmp_path):
    write(tmp_path, Cell("aiw", "full", 1e-3, 0), validation=1.0)
    write(tmp_path, Cell("aiw", "full", 1e-4, 0), validation=0.0)
    write(tmp_path, Cell("aiw", "full", 1e-3, 1))
    quality.draw(quality.Results(SUITE, tmp_path), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_page_shows_what_the_cells_say():
    page = quality.PAGE.read_text(encoding="utf-8")
    for model, suite in quality.SUITES.items():
        text = quality.tables(quality.Results(suite, quality.RESULTS / model))
        assert quality.fill_page(page, model, text) == page, f"run benchmarks/quality.py --model {model} --table"
    assert [label for label in quality.LABELS] == list(quality_cell.METHODS)


def test_page_without_markers_is_refused():
    with pytest.raises(SystemExit, match="must have the lines"):
        quality.fill_page("# A page\n", "minilm", "text")


# ---- Real cells ----


def test_sft_has_as_many_numbers_as_lora():
    from tiny_models import bert

    count = quality_cell.lora_parameters(bert(), 3)
    head = sum(parameter.numel() for parameter in bert().classifier.parameters())
    trained = {
        method: sum(
            p.numel() for p in quality_cell.METHODS[method](bert(), "SEQ_CLS", 3).parameters() if p.requires_grad
        )
        for method in ("lora", "sft-rigl", "sft-sm3", "head")
    }
    layers = sum(isinstance(module, torch.nn.Linear) for module in bert().modules())
    assert trained["lora"] - head == count
    for method in ("sft-rigl", "sft-sm3"):  # the share of every layer is rounded down
        assert count - layers < trained[method] - head <= count
    assert trained["head"] == head


def test_real_cell(tmp_path):
    sizes = ["--steps", "2", "--batch", "8", "--validation", "4", "--test", "6"]
    cell = ["--only", "sft-rigl", "--tasks", "syllogism", "--rates", "1e-3", "--seeds", "1"]
    assert quality.main([*sizes, *cell, "--results", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "syllogism-sft-rigl-lr0.001-seed0.json").read_text())
    assert result["settings"]["steps"] == 2 and result["settings"]["tasks"] == {"syllogism": {"invalid_ratio": 0.5}}
    for share, problems in (("validation", 4), ("test", 6), ("majority", 6)):
        assert 0 <= result[share] <= 1 and (result[share] * problems).is_integer()
    assert 0 < result["frozen_cpu_seconds_per_step"] and 0 < result["cpu_seconds_per_step"]
    # A gradient and, from SftAdamW, three numbers for each that is trained.
    assert result["step_bytes"] > 4 * result["trained"]
    assert 12 * result["trained"] < result["optimizer_bytes"] < 13 * result["trained"]
    assert 300_000 < result["trained"] < 340_000 and result["head"] == 2 * 385
    assert (tmp_path / "quality.png").exists()


def test_real_cell_of_a_language_model(tmp_path):
    from tiny_models import make_tokenizer, save_llama

    suite = dataclasses.replace(
        quality_cell.SUITES["smollm2"],
        model=save_llama(tmp_path, make_tokenizer()),
        steps=2,
        batch=2,
        validation=2,
        test=2,
        rank=2,
    )
    result = quality_cell.run_cell(suite, Cell("word_sequence_reversal", "ssf", 1e-2, 1))
    assert result["validation"] == result["test"] == 0.0  # a random model that has seen four examples
    assert result["head"] == 0 and result["settings"]["model"] == suite.model
    assert math.isclose(result["losses"][0], math.log(260), rel_tol=0.1)  # a guess among the tokens
