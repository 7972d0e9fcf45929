"""Initialisations of LoRA that start from the weights or the data: against their papers, and through files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama, logits, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, PeftModel, get_peft_model

TAKEN_OUT = ["pissa", "pissa_niter_500", "olora"]
inits = pytest.mark.parametrize("init", TAKEN_OUT)


def lora(init, *targets: str, **kw) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": init, "target_modules": list(targets), **kw})


def expected_factors(init: str, W: torch.Tensor, r: int, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A, B)` up to signs: PiSSA by the eigenvectors of the Gram matrices, OLoRA by Gram and Schmidt."""
    if init == "olora":
        columns = []
        for w in W.T:
            w = w - sum(((q @ w) * q for q in columns), torch.zeros_like(w))
            columns.append(w / w.norm())
            if len(columns) == r:
                break
        Q = torch.stack(columns, dim=1)
        return Q.T @ W, Q
    values, vectors = torch.linalg.eigh(W.T @ W)
    S, V = values.flip(0)[:r].sqrt(), vectors.flip(1)[:, :r]
    return (S / s).sqrt()[:, None] * V.T, (W @ V / S) * (S / s).sqrt()


@inits
@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 9), lambda: Conv1D(9, 7)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_main_part_of_the_weight_moves_into_the_adapter(init, make, use_rslora):
    base = nn.Sequential(make()).double()
    nn.init.normal_(base[0].weight)
    x, stored = torch.randn(4, 7).double(), base[0].weight.detach().clone()
    y = base(x)
    W = stored if isinstance(base[0], nn.Linear) else stored.T
    model = get_peft_model(base, lora(init, "0", use_rslora=use_rslora))
    layer = base[0]
    s = layer.scaling["default"]
    assert s == pytest.approx(6 / 3**0.5 if use_rslora else 2.0)
    torch.testing.assert_close(model(x), y)
    A, B = (factor.detach() for factor in layer.factors("default"))
    for ours, theirs, axis in zip((A, B), expected_factors(init, W, 3, s), (1, 0)):
        signs = (ours * theirs).sum(axis, keepdim=True).sign()
        torch.testing.assert_close(ours, signs * theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer.op.load()[0].detach(), W - s * B @ A)
    torch.testing.assert_close(model.merge_and_unload()[0].weight.detach(), stored)


@inits
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_is_for_the_original_model_whose_weights_change_again(init, low_cpu_mem_usage, tmp_path):
    base, ids = llama(), tokens()
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, lora(init, "q_proj", "down_proj"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, ids), expected)


@inits
@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"use_dora": True},
    ],
    ids=str,
)
def test_conversion_to_a_plain_adapter_of_twice_the_rank(init, kw, tmp_path):
    base, ids = llama(), tokens()
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, lora(init, "q_proj", "v_proj", **kw))
    model.save_pretrained(tmp_path / "start")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    saved = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and saved["r"] == 6
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(load_file(tmp_path / "plain" / "adapter_model.safetensors")[key]) == (4 if "rank_pattern" in kw else 6)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "plain")
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-5, rtol=1e-4)
    loaded.load_adapter(tmp_path / "plain", "beside")  # as a plain adapter can
    assert model.peft_config["default"].init_lora_weights == init and model.peft_config["default"].r == 3


def test_conversion_of_another_adapter_is_refused(tmp_path):
    plain = get_peft_model(llama(), lora(True, "q_proj"))
    plain.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"this adapter's \(True\) does not: leave it out"):
        plain.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start")
    other = get_peft_model(llama(), lora("pissa", "v_proj"))
    with pytest.raises(ValueError, match="tensors of another adapter"):
        other.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@inits
def test_where_the_weight_cannot_be_changed(init, tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 4))
    before = copy.deepcopy(base.state_dict())
    for targets, ranks, message in (
        (["0", "1"], {}, "is for linear layers .* this Embedding is not one"),
        (["0", "2"], {"2": 5}, "starts from r=5 directions .* has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, lora(init, *targets, rank_pattern=ranks))
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    model = get_peft_model(base, lora(True, "0"))
    with pytest.raises(ValueError, match="which other adapters of the model were made for"):
        model.add_adapter("b", lora(init, "0"))
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="not tied"):
        get_peft_model(tied, lora(init, "lm_head"))


def test_pissa_with_a_negative_scaling():
    with pytest.raises(ValueError, match="needs a positive lora_alpha, got a scaling of -2.0"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("pissa", "0", lora_alpha=-6))


def test_half_precision_weights_lose_their_main_part_in_float32():
    base = nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16))
    W = base[0].weight.detach().double()
    get_peft_model(base, lora("pissa", "0"))
    layer = base[0]
    A, B = (factor.detach().double() for factor in layer.factors("default"))
    error = (layer.op.load()[0].detach().double() + 2 * B @ A - W).norm() / W.norm()
    assert error < 6e-3 and layer.base_layer.weight.dtype == torch.bfloat16
