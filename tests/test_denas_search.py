"""DE-NAS: the engines. They keep to budgets, find what is there, repeat themselves, stop, and go on."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import llama, tokens

from peft import DenasConfig, LoraConfig, SftConfig, SsfConfig, get_peft_model, search_structure
from peft.tuners.denas.search import Record, Search
from peft.tuners.denas.space import SearchSpace
from peft.utils.warning import PeftWarning

needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the package optuna")
SMALL = {"population_num": 8, "select_num": 4, "crossover_num": 3, "mutation_num": 3, "max_epochs": 3}
ENGINES = ["evolutionary", "random", *(pytest.param(name, marks=needs_optuna) for name in ("tpe", "nsga2"))]
engines = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def batch():
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def find(batch, model=None, config=None, **search):
    model = model or llama()
    search = (SMALL if search.get("engine") else {}) | search
    return search_structure(model, config or LoraConfig(), DenasConfig(**search), batch=batch, progress=False)


def running(table, **search) -> Search:
    """A search whose scores are this table, or what this function says of a candidate."""
    space = SearchSpace(llama(), LoraConfig(), DenasConfig(r_max=3), with_alpha=False)

    class Known:
        def __init__(self):
            self.table, self.calls = table, []

        def latency(self, codes):
            return None

        def score(self, codes, latency):
            self.calls.append(codes)
            return table(codes) if callable(table) else float(space.lookup(table, codes))

    return Search(space, Known(), DenasConfig(**search), progress=False)


# ---- What they find ----


def test_exact_is_the_best_of_all(batch):
    """Against every structure of two layers with ranks to 4."""
    model = llama()
    space = SearchSpace(model, LoraConfig(), DenasConfig(r_max=4), with_alpha=False)
    limit = 300
    result = find(batch, model, r_max=4, max_params=limit / 1e6)
    scores = {}
    for on in itertools.product([0, 1], repeat=2):
        for sizes in itertools.product(range(4), repeat=2):
            codes = space.canonical(np.array([on, sizes, (0, 0)]).T)
            if any(on) and space.params(codes) <= limit:
                one = space.to_dict(codes)
                scores[json.dumps(one)] = score_by_hand(model, batch, one)
    # The best one, or one that cannot be told from it in float32.
    assert scores[json.dumps(result.structure)] == pytest.approx(max(scores.values()), rel=1e-5)
    assert result.score == pytest.approx(max(scores.values()), rel=1e-4) and result.params <= limit


class SaveInputAndOutput:
    """Of the module's last call."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.save)
        return self

    def save(self, module, args, output):
        self.x, self.y = args[0], output

    def __exit__(self, *_):
        self.handle.remove()


def score_by_hand(model, batch, structure) -> float:
    """Nuclear norms of the gradients' best low-rank parts, each over what its tokens' gradients and inputs measure."""
    total = 0.0
    for i, (on, r) in enumerate(zip(structure["num_hidden_layers"], structure["r"])):
        for name in ("q_proj", "v_proj") if on else ():
            module = model.get_submodule(f"model.layers.{i}.self_attn.{name}")
            with SaveInputAndOutput(module) as seen:
                loss = model(**batch).loss
            x, (g,) = seen.x.detach(), torch.autograd.grad(loss, seen.y)
            G = g.flatten(0, 1).double().T @ x.flatten(0, 1).double()
            total += (torch.linalg.svdvals(G)[:r].sum() / (g.norm() * x.norm())).item()
    return total


@engines
def test_engines_find_a_better_structure_than_the_first(engine):
    """A score with one good answer, which random search is unlikely to meet exactly."""
    table = np.array([[5.0, 1.0, 0.0], [0.0, 1.0, 9.0]])  # layer 0: rank 1; layer 1: rank 3
    search = running(table, engine=engine, **SMALL | {"max_params": 1, "max_epochs": 8, "patience": None})
    best = search.run()
    assert best.score == search.best.score == max(record.score for record in search.history)
    assert best.score == 14


@engines
def test_candidates_are_distinct_and_within_the_budget(batch, engine):
    result = find(batch, engine=engine, max_params=0.0008, min_params=0.0004, config=LoraConfig(r=12))
    structures = [json.dumps(row["structure"]) for row in result.history]
    assert len(structures) == len(set(structures)) > 5
    assert all(400 <= row["params"] <= 800 for row in result.history)
    assert result.score == max(row["score"] for row in result.history)
    model = get_peft_model(llama(), result.config())
    assert model.get_nb_trainable_parameters()[0] == result.params


@engines
def test_outside_the_budget_nothing_is_scored(engine):
    search = running(np.ones((2, 3)), engine=engine, **SMALL | {"max_params": 112e-6, "patience": None})
    search.run()
    calls = search.scorer.calls
    assert all(search.space.params(codes) <= 112 for codes in calls)
    assert len(calls) == len({codes.tobytes() for codes in calls}) == len(search.history)


@engines
@pytest.mark.parametrize("score", ["gradient_coherence", "deltatuner"])
def test_same_seed_same_search(batch, engine, score):
    model = llama()
    torch.manual_seed(0)
    first = find(batch, model, engine=engine, score=score, max_epochs=2)
    torch.manual_seed(1)
    second = find(batch, model, engine=engine, score=score, max_epochs=2)
    other = find(batch, model, engine=engine, score=score, max_epochs=2, seed=2)
    assert first.history == second.history and first.structure == second.structure
    assert first.history != other.history


@pytest.mark.parametrize("config", [LoraConfig(), SsfConfig()], ids=["lora", "ssf"])
@pytest.mark.parametrize("score", ["gradient_coherence", "deltatuner"])
def test_model_is_left_as_it_was(batch, config, score):
    model = llama().train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    gradient = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.get_rng_state()
    find(batch, model, config, engine="random", score=score, max_params=0.001)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert model.lm_head.weight.grad is gradient and not hasattr(model, "peft_config")
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")
    assert not any(module._forward_hooks for module in model.modules())


# ---- Stopping and going on ----


def test_search_stops_when_nothing_gets_better():
    flat = running(lambda codes: 1.0, engine="random", **SMALL | {"max_epochs": 20, "patience": 2, "population_num": 2})
    flat.run()
    assert len(flat.history) == 3 * 2  # the first round is better than none, then two rounds are not
    more = SMALL | {"max_epochs": 4, "patience": None, "population_num": 2}
    whole = running(lambda codes: 1.0, engine="random", **more)
    whole.run()
    assert len(whole.history) == 8


def test_interrupt_keeps_the_best():
    seen = []

    def score(codes):
        seen.append(codes)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return float(len(seen))

    search = running(score, engine="random", **SMALL)
    with pytest.warns(PeftWarning, match="interrupted after 4 structures"):
        assert search.run().score == 4


def test_interrupt_before_anything_is_an_interrupt():
    def score(codes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running(score, engine="random", **SMALL).run()


@needs_optuna
@pytest.mark.parametrize("engine", ["tpe", "nsga2"])
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_killed_search_goes_on(batch, tmp_path, engine, kind):
    """Stopped after one round and called again, it ends as a search that was never stopped."""
    model = llama()
    storage = str(tmp_path / "search.log") if kind == "journal" else f"sqlite:///{tmp_path}/search.db"
    options = {"engine": engine, "score": "deltatuner", "population_num": 6, "patience": None}
    whole = find(batch, model, max_epochs=3, **options)
    part = find(batch, model, max_epochs=1, storage=storage, **options)
    assert len(part.history) <= 6
    rest = find(batch, model, max_epochs=3, storage=storage, **options)
    assert rest.history == whole.history and rest.structure == whole.structure
    assert rest.front == whole.front
    with pytest.raises(ValueError, match=r"search with other settings .*r_max"):
        find(batch, model, max_epochs=3, storage=storage, r_max=5, **options)
    with pytest.raises(ValueError, match=r"search with other settings \(\['seed'\]\)"):  # of the scored deltas
        find(batch, model, max_epochs=3, storage=storage, seed=5, **options)
    other = {name: ids + 1 for name, ids in batch.items()}
    for theirs in ((other, model), (batch, llama())):
        with pytest.raises(ValueError, match=r"search with other settings \(\['model or data'\]\)"):
            find(*theirs, max_epochs=3, storage=storage, **options)


@needs_optuna
@pytest.mark.parametrize("storage", ["nowhere/search.log", "sqlite:///nowhere/search.db", "nonsense://x", "data.jsonl"])
def test_storage_that_cannot_be_opened(batch, tmp_path, monkeypatch, storage):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"text": "no journal"}\n')
    with pytest.raises(ValueError, match=f"storage '{storage}' is no journal file or database that can be opened"):
        find(batch, engine="tpe", storage=storage)
    assert Path("data.jsonl").read_text() == '{"text": "no journal"}\n'


SEARCHER = """
import pathlib, sys, time
sys.path.insert(0, {tests!r})
import optuna
import torch
from tiny_models import llama

from peft import DenasConfig, LoraConfig, search_structure
from peft.tuners.denas.search import Scorer

own, storage, options = pathlib.Path(sys.argv[1]), sys.argv[2], {options!r}
ask = optuna.Study.ask


def scored(file):
    return len(file.read_text().splitlines()) if file.exists() else 0


def asks_with_the_others(study):
    # All expect the first trial to be theirs, and until each has scored three structures nobody is further.
    own.with_suffix(".asks").touch()
    for peer in map(pathlib.Path, sys.argv[3:]):
        while not peer.with_suffix(".asks").exists() or scored(peer) < min(scored(own), 3):
            time.sleep(0.001)
    return ask(study)


optuna.Study.ask = asks_with_the_others
score = Scorer.score


def scores_and_says_so(self, codes, latency):
    time.sleep(0.05)  # long enough for the other one to have its turn
    with own.open("a") as file:
        file.write(repr(codes.tolist()) + "\\n")
    return score(self, codes, latency)


Scorer.score = scores_and_says_so
torch.manual_seed(0)
model, ids = llama(), torch.arange(12).reshape(2, 6)
result = search_structure(
    model, LoraConfig(), DenasConfig(storage=storage, **options), batch=dict(input_ids=ids, labels=ids), progress=False
)
own.with_suffix(".history").write_text(str(len(result.history)))
"""


@needs_optuna
def test_processes_search_together_and_one_is_killed(tmp_path):
    """Two processes on one journal share the work; one is killed, the other and a third end it. Nothing is done twice.

    All draw with the same seed.
    """
    import optuna

    options = {"engine": "tpe", "score": "deltatuner", "population_num": 30, "max_epochs": 2, "patience": None}
    script, storage = tmp_path / "searcher.py", tmp_path / "search.log"
    script.write_text(SEARCHER.format(tests=str(Path(__file__).parent), options=options))
    files = [tmp_path / f"{name}.txt" for name in "abc"]

    def start(file, *peers):
        return subprocess.Popen([sys.executable, *map(str, (script, file, storage, *peers))])

    def scored(file) -> list[str]:
        return file.read_text().splitlines() if file.exists() else []

    processes = [start(files[0], files[1]), start(files[1], files[0])]
    hang = time.monotonic() + 600
    try:
        while not (len(scored(files[0])) >= 3 and len(scored(files[1])) >= 3):
            assert not any(process.poll() for process in processes) and time.monotonic() < hang
            time.sleep(0.01)
        processes[0].kill()
        processes.append(start(files[2]))
        assert [process.wait(600) for process in processes[1:]] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    done = [line for file in files for line in scored(file)]
    assert len(done) == len(set(done))
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    study = optuna.load_study(study_name="denas", storage=optuna.storages.JournalStorage(backend))
    assert 60 <= len(study.trials) <= 61  # both may begin the last one
    told = {
        json.dumps(trial.user_attrs["structure"])
        for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    }
    # The killed one may have scored a structure without having told.
    assert len(done) - 1 <= len(told) <= len(done)
    # Who ends last knows all.
    assert max(int(file.with_suffix(".history").read_text()) for file in files[1:]) == len(told)


# ---- Several objectives ----


@needs_optuna
def test_pareto_front(batch):
    result = find(batch, engine="nsga2", max_epochs=4)
    points = [(row["score"], row["params"]) for row in result.history]
    front = {(row["score"], row["params"]) for row in result.front}
    expected = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)}
    assert front == expected and len(front) > 1
    assert (result.score, result.params) in front


# ---- Latency ----


def test_latency_limits_what_is_scored(monkeypatch, batch):
    from peft.tuners.denas.supernet import Supernet

    def fake(net):  # seconds: one millisecond for each layer
        return 1e-3 * len({id(layer) for layer in net.active}) / 2

    monkeypatch.setattr(Supernet, "latency", fake)
    result = find(batch, engine="random", max_latency=1.0)
    assert {row["latency_ms"] for row in result.history} == {1.0}
    assert all(sum(row["structure"]["num_hidden_layers"]) == 1 for row in result.history)
    # Refused before anything is scored: two layers with two targets each are all there are.
    monkeypatch.setattr("peft.tuners.denas.search.Scorer.score", lambda *_: pytest.fail("a structure was scored"))
    with pytest.raises(ValueError, match="min_latency = 5 ms is more than .* with the largest adapter, 2 ms: lower it"):
        find(batch, engine="random", min_latency=5.0)
    monkeypatch.setattr(Supernet, "latency", lambda net: 1e-3 + fake(net))
    with pytest.raises(ValueError, match="max_latency = 0.5 ms is less than .* without an adapter, 1 ms: raise it"):
        find(batch, engine="random", max_latency=0.5)
    with pytest.raises(ValueError, match="found no structure within the budget: .* 0 to 1 ms"):
        find(batch, engine="random", max_latency=1.0)


def test_latency_weight_divides_the_score(batch):
    model = llama()
    result = find(batch, model, engine="random", score="deltatuner", latency_weight=1000.0, max_epochs=1)
    plain = find(batch, model, engine="random", score="deltatuner", max_epochs=1)
    scores = {json.dumps(row["structure"]): row["score"] for row in plain.history}
    for row in result.history:
        expected = scores[json.dumps(row["structure"])] / (1 + row["latency_ms"])  # 1000 * seconds
        assert row["latency_ms"] > 0 and row["score"] == pytest.approx(expected, rel=1e-3)


# ---- What comes out ----


def test_files_of_a_search(batch, tmp_path):
    result = find(batch, engine="evolutionary", max_params=0.0005)
    result.save(tmp_path, plots=True)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    content = json.loads((tmp_path / "history.json").read_text())
    assert content["history"] == result.history and len(rows) == len(result.history)
    for row, record in zip(rows, result.history):
        assert float(row["score"]) == record["score"] and json.loads(row["structure"]) == record["structure"]
    assert json.loads((tmp_path / "best_model_structure.txt").read_text()) == result.structure
    for name in ("search.png", "structure.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_many_candidates_are_looked_up_at_once(seed):
    space = SearchSpace(llama(), LoraConfig(), DenasConfig(), with_alpha=False)
    rng = np.random.default_rng(seed)
    table = rng.random((2, 12))
    codes = np.stack([space.draw(rng) for _ in range(1000)])
    one_by_one = [sum(table[u, row[u, 1]] for u in range(2) if row[u, 0]) for row in codes]
    assert space.lookup(table, codes) == pytest.approx(one_by_one)


# ---- Wrong settings ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "zen"}, "score must be one of"),
        ({"engine": "sigopt"}, "engine must be one of"),
        ({"score": "deltatuner", "engine": "exact"}, "engine='exact' needs a score that is a sum"),
        ({"engine": "exact", "max_latency": 3}, "engine='exact' knows parameters only"),
        ({"diversity_weight": 2}, "diversity_weight has no meaning with score='gradient_coherence'"),
        ({"alpha_max": 2}, "alpha_max has no meaning"),
        ({"storage": "x.log"}, "storage is Optuna's"),
        ({"engine": "tpe", "objectives": ["score", "params"]}, "objectives are what engine='nsga2'"),
        ({"engine": "nsga2", "objectives": ["params"]}, "objectives must be 'score' and at least one more"),
        ({"r_min": 5, "r_max": 4}, "r_min..r_max must be whole numbers >= 1 in order, got 5..4"),
        ({"engine": "evolutionary", "crossover_num": 40}, "is more than population_num = 50"),
        ({"max_params": -1}, "max_params must be a positive number, got -1"),
        ({"min_params": float("nan")}, "min_params must be a positive number, got nan"),
        ({"max_latency": "3"}, "max_latency must be a positive number, got '3'"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"m_prob": 1.5}, r"m_prob must be in \[0, 1\]"),
        ({"min_latency": 3, "max_latency": 2}, "min_latency=3 is more than max_latency=2"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DenasConfig(**fields)


def test_searches_that_cannot_be(batch):
    with pytest.raises(ValueError, match=r"SSF grows with every layer, .* give max_params"):
        find(batch, config=SsfConfig())
    with pytest.raises(ValueError, match="without adapters: take it back with unload"):
        find(batch, model=get_peft_model(llama(), LoraConfig()))
    with pytest.raises(ValueError, match="granularity='element', got 'row'"):
        find(batch, config=SftConfig(granularity="row", density=0.1))
    with pytest.raises(ValueError, match="r_max has no meaning for SSF"):
        find(batch, config=SsfConfig(), r_max=3, max_params=1)
    with pytest.raises(ValueError, match="take one batch, got 2"):
        find([batch, batch], engine="random", score="deltatuner")


def test_missing_optuna_says_so(batch, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'peft\[denas\]'"):
        find(batch, engine="tpe")


def test_record_is_what_optuna_is_told():
    from peft.tuners.denas.optuna_engines import objectives_of

    record = Record(np.zeros((1, 1)), 3.0, 7, None)
    assert objectives_of(record, DenasConfig(engine="nsga2")) == [3.0, 7]
    assert objectives_of(record, DenasConfig(engine="tpe")) == [3.0]
