"""`peft search`: what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json

import cli_runs
import pytest
from transformers import AutoModelForCausalLM

from peft import CompactLoraConfig, LoraConfig, SftConfig, SsfConfig, get_peft_model
from peft.tuners.denas import apply_structure, read_structure

pytest_plugins = ["cli_runs"]
pytestmark = pytest.mark.usefixtures("loud_transformers")


def run(*argv) -> int:
    return cli_runs.run("search", *argv)


@pytest.mark.parametrize(
    ("method", "options", "config"),
    [
        ("lora", ["--max-params", "0.0011"], CompactLoraConfig),
        ("lora", ["--score", "deltatuner", "--rounds", "2", "--population", "6", "--rank", "4"], CompactLoraConfig),
        ("ssf", ["--max-params", "0.0008"], SsfConfig),
        ("sft", ["--density", "0.02", "--granularity", "module"], SftConfig),
    ],
)
def test_structure_history_and_pictures(method, options, config, tiny, tmp_path, capsys):
    output = tmp_path / "found"
    assert run(tiny, "--method", method, "--output", output, *options) == 0
    names = {"best_model_structure.txt", "history.csv", "history.json", "search.png", "structure.png"}
    assert {path.name for path in output.iterdir()} == names
    history = json.loads((output / "history.json").read_text())["history"]
    best = max(history, key=lambda row: (row["score"], -row["params"]))  # of equals the smallest, then the first
    assert best["structure"] == read_structure(output)
    assert f"{best['params']:,}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tiny)
    if method == "lora":
        adapted = get_peft_model(model, CompactLoraConfig(best_structure=str(output)))
    else:
        own = config(density=0.02) if method == "sft" else config()
        adapted = get_peft_model(model, apply_structure(own, model, output))
    assert adapted.get_nb_trainable_parameters()[0] == best["params"]


def test_data_of_ones_own_decide(tiny, tmp_path):
    """The scores are those of the batch in the file."""
    scores = []
    for text in ("aaaa bbbb", "The quick brown fox"):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps({"text": text + str(i)}) + "\n" for i in range(4)))
        assert run(tiny, "--output", tmp_path / "found", "--overwrite", "--data", file) == 0
        scores.append(json.loads((tmp_path / "found" / "history.json").read_text())["history"][0]["score"])
    assert scores[0] != scores[1]
    assert run(tiny, "--output", tmp_path / "other", "--data", file, "--batch-size", 5) == 2


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the package optuna")
def test_search_is_shared_through_the_storage(tiny, tmp_path):
    options = ["--engine", "nsga2", "--population", 5, "--storage", tmp_path / "journal.log"]
    assert run(tiny, "--output", tmp_path / "a", *options, "--rounds", 1) == 0
    assert run(tiny, "--output", tmp_path / "b", *options, "--rounds", 2) == 0
    first, second = (json.loads((tmp_path / name / "history.json").read_text()) for name in "ab")
    assert second["history"][: len(first["history"])] == first["history"] and second["front"]
    import optuna

    (study,) = optuna.get_all_study_summaries(
        optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log")))
    )
    assert study.n_trials == 10  # five of the first call, five of the second; some propose what was scored before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ssf"], "SSF grows with every layer"),
        (["--max-params", "1e-6"], "less than the smallest structure needs"),
        (["--method", "ssf", "--rank", "4"], "--rank belongs to --method lora"),
        (["--density", "0.1"], "--density belongs to --method sft"),
        (["--storage", "x.log"], "--storage is for --engine tpe and nsga2"),
        (["--latency-objective"], "--latency-objective is for --engine nsga2"),
        (["--engine", "exact", "--score", "deltatuner"], "engine='exact' needs a score that is a sum"),
        (["--max-params", "0"], "must be a positive number"),
        (["--data", "nowhere.jsonl"], "cannot read the data file nowhere.jsonl"),
    ],
)
def test_what_is_refused(options, message, tiny, tmp_path, capsys):
    assert run(tiny, "--output", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_structure_that_is_there_is_safe(tiny, tmp_path, capsys):
    (tmp_path / "best_model_structure.txt").write_text("{}")
    assert run(tiny, "--output", tmp_path) == 2
    assert "already holds a structure; --overwrite" in capsys.readouterr().err
    assert run(tiny, "--output", tmp_path, "--overwrite") == 0
    assert set(read_structure(tmp_path)) == {"num_hidden_layers", "r", "alpha"}


def test_same_default_targets_as_the_method(tiny, tmp_path):
    """Without --target-modules the architecture's usual targets of LoRA are chosen from, all linear layers of SFT."""
    assert run(tiny, "--output", tmp_path, "--granularity", "module") == 0
    model = AutoModelForCausalLM.from_pretrained(tiny)
    names = {key.rpartition(".")[2] for key in get_peft_model(model, LoraConfig()).base_model.targeted_module_names}
    assert {kind.rpartition(".")[2] for kind in read_structure(tmp_path)["r"]} == names
