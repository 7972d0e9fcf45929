"""What the `peft` command refuses and how: one line on stderr, exit code 2, nothing half-written left behind."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import load_weights, run, train, words, write_jsonl
from safetensors.torch import load_file, save_file
from tiny_models import llama, make_tokenizer

from peft.cli import common

pytest_plugins = ["cli_runs"]
pytestmark = pytest.mark.usefixtures("loud_transformers")


# ---- Data, arguments, folders ----


def refused(capsys, code: int, output: Path) -> str:
    """Check the form of a refusal; returns its line."""
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert len(error.splitlines()) == 1 and error.startswith("peft "), error
    assert not output.exists()
    return error


GOOD = b'{"text": "hello"}\n'


@pytest.mark.parametrize(
    "content, expected",
    [
        (GOOD * 2 + b'{"text": \n' + GOOD, "line 3: broken JSON"),
        (GOOD + b"\n\n[1, 2]\n", "line 4: must be a JSON object, got list"),
        (GOOD + b'{"txt": "x"}\n', 'line 2: must have "text", or "prompt" and "completion", or "messages"'),
        (b'{"prompt": "x"}\n' + GOOD, 'line 1: must have "text"'),
        (GOOD + b'{"text": "x", "messages": []}\n', "line 2: must have"),
        (GOOD + b'{"text": 5}\n', 'line 2: "text" must be a string, got int'),
        (GOOD + b'{"messages": []}\n', "line 2:"),
        (GOOD + b'{"messages": [{"role": "user"}]}\n', "line 2: message 1"),
        (GOOD + b'{"text": "\xff"}\n', "line 2: not UTF-8"),
        (GOOD * 30 + b'{"text": "\\ud800 abc"}\n', r"line 31: \ud800 is half of a surrogate pair"),
        (GOOD + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 2: JSON that cannot be read"),
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (GOOD, "leave nothing to train on"),
        (GOOD * 30, "leave nothing to train on"),  # thirty copies of the row that is held out
        (None, "cannot read the data file"),
    ],
)
def test_bad_data_is_refused(content, expected, tiny, tmp_path, capsys):
    file, output = tmp_path / "data.jsonl", tmp_path / "deep" / "out"
    if content is not None:
        file.write_bytes(content)
    error = refused(capsys, train(tiny, str(file), output), output)
    assert expected in error and str(file) in error or "rows" in error
    assert not output.parent.exists()


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--rank", "4"], "--rank belongs to --method lora"),
        (["--method", "lora", "--density", "0.1"], "--density belongs to --method sft"),
        (["--density", "0.1", "--num-tunable-weights", "50"], "cannot be given together"),
        (["--epochs", "1", "--max-steps", "5"], "cannot be given together"),
        (["--resume", "--overwrite"], "cannot be given together"),
        (["--task-args", "{}"], "--task-args is for --data task:NAME"),
        (["--density", "1.5"], "must be a number in (0, 1], got '1.5'"),
        (["--lr", "nan"], "must be a positive number, got 'nan'"),
        (["--batch-size", "0"], "must be a whole number of at least 1, got '0'"),
        (["--method", "adalora"], "invalid choice: 'adalora'"),
        (["--learning-rate", "1"], "unrecognized arguments"),
        (["--target-modules", "nothing"], "nothing"),
        (["--num-tunable-weights", "100000000"], "100,000,000"),
        (["--resume"], "holds no run"),
        (["--reselection-steps", "1"], "reselection_steps must be at least 2, got 1"),
        (["--selection-algorithm", "static", "--reselection-steps", "4"], "--reselection-steps has no effect"),
        (["--static-criterion", "fisher"], "static_criterion='fisher' has no meaning with"),
        (["--block-size", "8"], "block_size=8 has no meaning with granularity='element'"),
        (["--granularity", "rows"], "invalid choice: 'rows'"),
        (["--granularity", "row", "--budget", "global"], "cannot be combined with granularity='row'"),
        (["--max-length", "2"], "within --max-length 2"),
        (["--seed", "4294967296"], "must be a whole number from 0 to 2**32 - 1"),
        (["--output", ""], "argument --output: must not be empty"),
        (["--data", "task:chain_sum", "--task-args", '{"x": NaN}'], "is not valid JSON"),
    ],
)
def test_bad_arguments_are_refused(options, expected, tiny, rows_file, tmp_path, capsys):
    code = train(tiny, rows_file, tmp_path / "out", *options)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and not (tmp_path / "out").exists()
    assert expected in error[-1]
    assert len(error) == 1 or "--max-length" in expected  # which also says how many examples are left out


def test_a_model_that_is_not_there_is_refused(rows_file, tmp_path, capsys):
    code = train(str(tmp_path / "nowhere"), rows_file, tmp_path / "out")
    assert "cannot load the tokenizer" in refused(capsys, code, tmp_path / "out")


def test_a_folder_with_an_adapter_is_safe(tiny, rows_file, tmp_path, capsys):
    output = tmp_path / "out"
    assert train(tiny, rows_file, output, "--max-steps", 1) == 0
    first = load_weights(output)
    assert train(tiny, rows_file, output, "--max-steps", 1) == 2
    assert "already holds an adapter; --overwrite" in capsys.readouterr().err
    # One that is to be replaced stays until the new one is complete.
    assert train(tiny, rows_file, output, "--max-steps", 1, "--overwrite", "--target-modules", "nothing") == 2
    assert all(torch.equal(tensor, first[key]) for key, tensor in load_weights(output).items())
    assert train(tiny, rows_file, output, "--max-steps", 1, "--overwrite", "--seed", 5) == 0
    assert any(not torch.equal(tensor, first[key]) for key, tensor in load_weights(output).items())


# ---- Files that are damaged, names of nothing ----


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A finished run, which is not changed."""
    folder = tmp_path_factory.mktemp("run")
    file = write_jsonl(folder / "rows.jsonl", [{"text": words(3)} for _ in range(12)])
    assert train(tiny, file, folder / "out", "--method", "lora", "--max-steps", 1) == 0
    return folder / "out"


def one_line(capsys, code: int) -> str:
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1, error
    return error[0]


def damaged_copy(folder: Path | str, name: str, copy: Path) -> Path:
    """A copy of a folder in which a file was cut short."""
    shutil.copytree(folder, copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    return copy


def test_a_damaged_adapter_is_refused(tiny, adapter, tmp_path, capsys):
    damaged = damaged_copy(adapter, "adapter_model.safetensors", tmp_path / "damaged")
    for argv in (["inspect", damaged], ["merge", tiny, damaged, "-o", tmp_path / "merged"]):
        error = one_line(capsys, run(*argv))
        assert f"{damaged / 'adapter_model.safetensors'}' is damaged" in error
    assert run("evaluate", damaged) == 2
    assert "adapter_model.safetensors' is damaged" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_base_model_is_refused(name, tiny, adapter, rows_file, tmp_path, capsys):
    damaged = damaged_copy(tiny, name, tmp_path / "damaged")
    for argv in (
        ["train", "--model", damaged, "--data", rows_file, "--output", tmp_path / "out"],
        ["merge", damaged, adapter, "-o", tmp_path / "out"],
        ["search", damaged, "--output", tmp_path / "out"],
    ):
        error = one_line(capsys, run(*argv))
        assert f"cannot load the {'model' if name.startswith('model') else 'tokenizer of'} {damaged}: " in error
        assert ("model.safetensors is damaged" in error) == (name == "model.safetensors")
        assert not (tmp_path / "out").exists()


def test_a_configuration_that_makes_no_sense_is_refused(tiny, tmp_path, capsys):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    for wrong, expected in ([], "cannot read the configuration"), (config | {"hidden_size": "x"}, "'hidden_size': "):
        (model / "config.json").write_text(json.dumps(wrong))
        assert expected in one_line(capsys, run("inspect", model))


def test_names_of_nothing_are_not_asked_for(tiny, adapter, tmp_path, capsys):
    """What can be no name on the hub is known to be a path. Asking would take half a minute without a network."""
    output = tmp_path / "merged"
    for name in ("./nowhere", "../a/nowhere", "runs/deep/nowhere", "~/nowhere", str(tmp_path / "nowhere")):
        for argv in (["inspect", name], ["merge", name, adapter, "-o", output], ["merge", tiny, name, "-o", output]):
            assert one_line(capsys, run(*argv)).endswith(f" {name}: there is no such folder")
    for argv in (["inspect", adapter / "metrics.json"], ["merge", tiny, adapter / "metrics.json", "-o", output]):
        assert "metrics.json: it is a file; give a folder" in one_line(capsys, run(*argv))
    # A name that the hub may have: it is looked for in the cache, since tests run without a network.
    error = one_line(capsys, run("inspect", "nobody/nothing"))
    assert "nobody/nothing: there is no such folder, and as a name on the hub: " in error


def test_a_tokenizer_of_another_model_is_refused(rows_file, tmp_path, capsys):
    llama(vocab_size=50).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    code = train(str(tmp_path / "model"), rows_file, tmp_path / "out")
    assert "but the model only 50 embeddings" in refused(capsys, code, tmp_path / "out")


def test_more_tokens_than_positions_are_refused(rows_file, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer()
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=12)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = write_jsonl(tmp_path / "long.jsonl", [{"text": 20 * letter} for letter in "abcdef"])
    capsys.readouterr()
    code = train(str(tmp_path / "model"), file, tmp_path / "out")
    assert "an example has 21 tokens, but the model 12 positions" in refused(capsys, code, tmp_path / "out")
    assert train(str(tmp_path / "model"), file, tmp_path / "out", "--max-length", 12, "--max-steps", 1) == 0


# ---- Runs that cannot be gone on with ----


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"arguments": 5, "data_digest": "", "before": null}', "\udcff"])
def test_a_run_file_of_something_else_is_refused(content, tiny, rows_file, tmp_path, capsys):
    checkpoints = tmp_path / "out" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "run.json").write_text(content, errors="surrogateescape")
    error = one_line(capsys, train(tiny, rows_file, tmp_path / "out", "--resume"))
    assert f"--resume: {checkpoints / 'run.json'} " in error and error.endswith("; --overwrite starts again")


def test_a_finished_run_is_compared(tiny, rows_file, tmp_path, capsys):
    output, options = tmp_path / "out", ("--method", "lora", "--max-steps", 1)
    assert train(tiny, rows_file, output, *options) == 0
    capsys.readouterr()
    assert train(tiny, rows_file, output, *options, "--resume", "--save-steps", 3) == 0
    assert "is finished; there is nothing to resume" in capsys.readouterr().err
    error = one_line(capsys, train(tiny, rows_file, output, "--method", "ssf", "--max-steps", 1, "--resume"))
    assert "was begun with --lr 0.001, --method lora, and not --lr 0.005, --method ssf; give the same" in error
    with open(rows_file, "a") as file:
        file.write('{"prompt": "new", "completion": " row"}\n')
    assert f"{rows_file} has changed" in one_line(capsys, train(tiny, rows_file, output, *options, "--resume"))


def test_folders_of_the_users_among_the_checkpoints_are_no_checkpoints(tiny, rows_file, tmp_path, stop_at):
    options, output = ("--method", "lora", "--max-steps", 3, "--save-steps", 1), tmp_path / "out"
    stop_at(2)
    assert train(tiny, rows_file, output, *options) == 130
    (output / "checkpoints" / "checkpoint-best").mkdir()
    stop_at(0)
    assert train(tiny, rows_file, output, *options, "--resume") == 0
    assert json.loads((output / "metrics.json").read_text())["resumed_from_step"] > 0


def test_a_damaged_checkpoint_is_not_resumed(tiny, rows_file, tmp_path, stop_at, capsys):
    options, output = ("--method", "lora", "--max-steps", 4, "--save-steps", 1), tmp_path / "out"
    stop_at(3)
    assert train(tiny, rows_file, output, *options) == 130
    optimizer = output / "checkpoints" / "checkpoint-2" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1000])
    stop_at(0)
    capsys.readouterr()
    assert train(tiny, rows_file, output, *options, "--resume") == 0
    assert f"{optimizer.parent} is not complete, or damaged: it is removed" in capsys.readouterr().err
    assert json.loads((output / "metrics.json").read_text())["resumed_from_step"] == 1


# ---- Training that diverges ----


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["sft", "lora", "ssf"])
def test_divergence_leaves_things_as_they_were(method, tiny, rows_file, tmp_path, capsys):
    output, options = tmp_path / "out", ("--method", method, "--max-steps", 12, "--save-steps", 1, "--lr", "1e30")
    assert train(tiny, rows_file, output, *options) == 2
    assert "peft train: error: training diverged" in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()
    assert train(tiny, rows_file, output, "--method", "lora", "--max-steps", 1) == 0
    before = content(output)
    assert train(tiny, rows_file, output, *options, "--overwrite") == 2
    assert content(output) == before


def test_divergence_in_the_last_step_is_noticed(tiny, tmp_path, capsys):
    """Its loss is that before the step; a task's accuracy would be 0 and no sign of it."""
    pytest.importorskip("reasoning_gym")
    sizes = ("--train-size", 4, "--eval-size", 2, "--task-args", '{"max_words": 3}')
    options = ("--method", "lora", "--max-steps", 2, "--lr", "1e39")  # the first step has a learning rate of 0
    assert train(tiny, "task:word_sequence_reversal", tmp_path / "out", *sizes, *options) == 2
    assert "its last step has left weights that are no finite numbers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_cannot_be_measured_is_refused(tiny, adapter, rows_file, tmp_path, capsys):
    broken = Path(shutil.copytree(tiny, tmp_path / "model"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert train(str(broken), rows_file, tmp_path / "out", "--max-steps", 1) == 2
    assert "the held-out loss is nan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    run_of_nan = Path(shutil.copytree(adapter, tmp_path / "run"))
    metrics = json.loads((adapter / "metrics.json").read_text())
    (run_of_nan / "metrics.json").write_text(json.dumps(metrics | {"after": math.nan}))
    assert run("evaluate", run_of_nan, "--model", broken, "--check") == 2
    assert "the held-out loss is nan" in capsys.readouterr().err
    assert run("evaluate", run_of_nan, "--check") == 1


# ---- A full disk ----


@pytest.fixture
def full_disk(monkeypatch):
    """Let saving an adapter fail half-way the n-th time; 0 takes it back."""
    from peft import PeftModel

    original = PeftModel.save_pretrained

    def arrange(failing_call: int) -> None:
        calls = []

        def save_pretrained(self, save_directory, *args, **kwargs):
            calls.append(save_directory)
            if len(calls) == failing_call:
                path = Path(save_directory) / "adapter_model.safetensors"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return original(self, save_directory, *args, **kwargs)

        monkeypatch.setattr(PeftModel, "save_pretrained", save_pretrained)

    return arrange


def test_a_full_disk_at_the_first_checkpoint_leaves_nothing(tiny, rows_file, tmp_path, full_disk, capsys):
    full_disk(1)
    assert train(tiny, rows_file, tmp_path / "out", "--max-steps", 4) == 2
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_the_end_keeps_what_can_be_resumed(tiny, rows_file, tmp_path, full_disk, capsys):
    options, output = ("--max-steps", 4, "--save-steps", 2), tmp_path / "out"
    full_disk(3)  # two checkpoints, then the result
    assert train(tiny, rows_file, output, *options) == 2
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in output.iterdir()] == ["checkpoints"]
    full_disk(0)
    assert train(tiny, rows_file, output, *options, "--resume") == 0
    assert train(tiny, rows_file, tmp_path / "unbroken", *options) == 0
    weights, expected = load_weights(output), load_weights(tmp_path / "unbroken")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "error, explained",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_how_libraries_report_a_full_disk(error, explained):
    assert (common.explain(error) is not None) == explained


def test_an_error_of_ours_keeps_its_traceback(tiny, rows_file, tmp_path, monkeypatch):
    from peft.cli import train as module

    def broken(*args):
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(module, "measure", broken)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        train(tiny, rows_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- The machine ----


def test_several_processes_cannot_share_a_global_budget(rows_file, tmp_path, monkeypatch, capsys):
    """They are refused before anything is loaded: the model is not even there."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = train(str(tmp_path / "nowhere"), rows_file, tmp_path / "out", "--budget", "global")
    assert "which needs a single process: start one, or" in refused(capsys, code, tmp_path / "out")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_lack_of_memory_is_explained(error, tiny, rows_file, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr("peft.cli.train.measure", fail)
    assert train(tiny, rows_file, tmp_path / "out") == 2
    assert "error: out of memory; for training, lower --batch-size" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_output_that_nobody_reads(tiny, monkeypatch):
    """`peft inspect MODEL --all | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:  # closing it writes what is left, as Python does at its end
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run("inspect", tiny, "--all") == 141


def test_any_name_of_a_file_can_be_drawn_and_written(tiny, rows_file, tmp_path):
    """Names that are no Unicode, and what matplotlib would take for a formula."""
    name = tmp_path / "caf\udce9 $\\frac$.jsonl"
    Path(rows_file).rename(name)
    assert train(tiny, str(name), tmp_path / "out", "--method", "lora", "--max-steps", 1) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["arguments"]["data"] == str(name)
    assert (tmp_path / "out" / "loss.png").exists()
