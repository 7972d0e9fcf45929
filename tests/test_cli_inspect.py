"""`peft inspect`: what it says an adapter changes in each layer."""

from __future__ import annotations

import json

import cli_runs
import pytest
import torch
from tiny_models import adapted, bert, llama, methods
from torch import nn

from peft.cli import report
from peft.cli.inspect import measure_deltas

pytest_plugins = ["cli_runs"]
pytestmark = pytest.mark.usefixtures("loud_transformers")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def save(tmp_path):
    """Save a base model and an adapter for it; both folders, and the model."""

    def make(base: nn.Module, method: str, task: str, **config):
        base.save_pretrained(tmp_path / "base")
        base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
        model = adapted(base, method=method, task_type=task, **config)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", model

    return make


def run(*argv: str) -> int:
    return cli_runs.run("inspect", *argv)


def changes(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Norm of the change and of the weight by module, from merging."""
    names = {name for name, _ in model.get_base_model().named_modules() if name.endswith((".q_proj", ".v_proj"))}
    layers = {name: model.get_base_model().get_submodule(name) for name in names}
    before = {name: layer.weight.detach().double().clone() for name, layer in layers.items()}
    model.merge_adapter()
    after = {name: layer.weight.detach().double() for name, layer in layers.items()}
    return {name: ((after[name] - before[name]).norm().item(), before[name].norm().item()) for name in names}


@methods
def test_deltas_are_those_of_merging(method, save):
    base, adapter, model = save(llama(), method, "CAUSAL_LM")
    deltas = measure_deltas(adapter, str(base))
    expected = changes(model)
    assert deltas.keys() == expected.keys() and len(deltas) == 4
    trained, weights = 0, 0
    for name, delta in deltas.items():
        norm, base_norm = expected[name]
        assert (delta.norm, delta.base_norm) == (pytest.approx(norm, rel=1e-4), pytest.approx(base_norm, rel=1e-6))
        assert delta.relative == pytest.approx(norm / base_norm, rel=1e-4)
        trained, weights = trained + delta.trained, weights + delta.weights
    assert trained == sum(
        tensor.numel()
        for layer in model.base_model.layers()
        for _, tensor in layer.adapter_tensors("default")
        if tensor.is_floating_point()
    )
    assert weights == sum(layer.weight.numel() for layer in model.base_model.layers())

    # Without the base model's weights: the same, but for what only they could tell.
    for name, delta in measure_deltas(adapter, None).items():
        assert (delta.trained, delta.weights) == (deltas[name].trained, deltas[name].weights)
        assert delta.norm == (None if method == "ssf" else pytest.approx(deltas[name].norm))
        assert delta.base_norm is delta.relative is None


@methods
def test_table_and_picture(method, save, tmp_path, capsys):
    base, adapter, _ = save(llama(), method, "CAUSAL_LM")
    deltas = measure_deltas(adapter, str(base))
    picture = tmp_path / "deltas.png"
    assert run(adapter, "--model", base, "-o", picture) == 0
    assert picture.read_bytes().startswith(PNG)
    printed = capsys.readouterr().out.splitlines()
    header = next(line for line in printed if line.startswith("layer "))
    assert header.split() == ["layer", "trained", "share", "norm", "relative", "norm"]
    rows = {line.split()[0]: line.split()[1:] for line in printed if line}
    for number in range(2):
        q, v = (deltas[f"model.layers.{number}.self_attn.{name}"] for name in ("q_proj", "v_proj"))
        norm = (q.norm**2 + v.norm**2) ** 0.5
        relative = norm / (q.base_norm**2 + v.base_norm**2) ** 0.5
        share = (q.trained + v.trained) / (q.weights + v.weights)
        assert rows[f"model.layers.{number}"] == [
            f"{q.trained + v.trained:,}", f"{share:.3%}", f"{norm:.4g}", f"{relative:.3%}"
        ]  # fmt: skip

    assert run(adapter, "--all") == 0
    printed = capsys.readouterr().out
    known = ["layer", "trained", "share"] + ([] if method == "ssf" else ["norm"])
    assert next(line for line in printed.splitlines() if line.startswith("layer ")).split() == known
    assert len([line for line in printed.splitlines() if line.split()[:1] == ["model.layers.1.self_attn.q_proj"]]) >= 2


def test_adapters_of_other_tasks(save, capsys):
    """The base model is built as what the adapter was made for."""
    _, adapter, _ = save(bert(), "sft", "SEQ_CLS", target_modules=["query", "dense"])
    assert run(adapter) == 0
    printed = capsys.readouterr().out
    assert "bert.encoder.layer.1 " in printed and "bert.pooler.dense " in printed  # which is in no numbered layer


def test_a_picture_of_one_module(tmp_path):
    report.draw_deltas({"head": report.Delta(3, 10, None, None)}, "title", tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)


def test_a_base_model_that_has_moved(save, tmp_path, capsys):
    base, adapter, _ = save(llama(), "sft", "CAUSAL_LM")
    base.rename(tmp_path / "moved")
    assert run(adapter) == 0
    captured = capsys.readouterr()
    assert "is not shown: cannot read the configuration" in captured.err and "--model says where" in captured.err
    assert not any(line.startswith("layer ") for line in captured.out.splitlines())
    picture = tmp_path / "deltas.png"
    assert run(adapter, "-o", picture) == 2 and not picture.exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert run(adapter, "--model", tmp_path / "moved", "-o", picture) == 0
    assert picture.exists()


def test_what_is_refused(save, tmp_path, monkeypatch, capsys):
    base, adapter, _ = save(llama(), "sft", "CAUSAL_LM")
    capsys.readouterr()
    for argv, expected in [
        ((adapter, "-o", "deltas.txt"), "must be a file name that ends in .png, got 'deltas.txt'"),
        ((adapter, "-o", tmp_path / "nowhere" / "deltas.png"), "No such file or directory"),
        ((base, "--model", base), "are for adapters"),
        ((base, "-o", "deltas.png"), "are for adapters"),
        ((adapter, "--model", tmp_path / "nowhere"), "cannot load the model"),
    ]:
        assert run(*argv) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and expected in error[0]

    other = tmp_path / "other"
    bert().save_pretrained(other)
    assert run(adapter, "--model", other) == 2
    assert "cannot load" in capsys.readouterr().err

    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert run(adapter) == 0
    assert "names no base model" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(adapter, "-o", tmp_path / "deltas.png") == 2
    assert "--plot needs the package matplotlib" in capsys.readouterr().err


def test_the_meta_device_keeps_the_adapter(save):
    """An empty base model has no place to which the adapter's tensors could be brought."""
    from transformers import AutoModelForCausalLM

    from peft import PeftModel, load_peft_weights

    base, adapter, model = save(llama(), "lora", "CAUSAL_LM")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.get_base_model().config)
    loaded = PeftModel.from_pretrained(empty, str(adapter), torch_device="cpu", low_cpu_mem_usage=True)
    weight = loaded.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(
        weight, load_peft_weights(str(adapter))["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    )
