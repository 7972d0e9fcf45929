"""Variants of LoRA beyond the invariants: DoRA's start, its files, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import adapted, llama, logits, tokens
from torch import nn

from peft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model


def dora(*targets: str, **kw) -> LoraConfig:
    return LoraConfig(r=2, use_dora=True, target_modules=list(targets or ("q_proj", "v_proj")), **kw)


def test_dora_starts_from_the_norms_of_the_rows():
    base = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(3, 4, 2), nn.Embedding(7, 6))
    rows = [base[0].weight, base[1].weight.flatten(1), base[2].weight.T]
    model = get_peft_model(base, dora("0", "1", "2"))
    for layer, weight in zip(model.get_base_model(), rows):
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert layer.use_dora == {"default": True}
        torch.testing.assert_close(magnitude.flatten(), weight.double().norm(dim=1).float())
    assert model.get_base_model()[1].lora_magnitude_vector["default"].weight.shape == (1, 4, 1, 1)


def test_the_magnitude_of_a_half_precision_model_is_not_rounded():
    base = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    expected = base[0].weight.double().norm(dim=1).float()
    for autocast in (True, False):
        model = get_peft_model(base, dora("0"), autocast_adapter_dtype=autocast)
        torch.testing.assert_close(base[0].lora_magnitude_vector["default"].weight.data, expected)
        model.unload()


def test_dora_with_a_delta_from_the_start_begins_at_the_norms_of_both():
    base = nn.Sequential(nn.Linear(6, 5))
    W = base[0].weight.detach().clone()
    model = get_peft_model(base, dora("0", init_lora_weights=False))
    V = W + base[0].get_delta_weight("default")
    torch.testing.assert_close(model.merge_and_unload()[0].weight.detach(), V.detach())


def test_dora_of_rows_that_are_zero():
    """A head that starts at zero must neither give nor learn NaN."""
    base = nn.Sequential(nn.Linear(6, 5))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, dora("0"))
    x = torch.randn(3, 6)
    assert torch.equal(model(x), base[0].get_base_layer()(x))
    layer = base[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    model(x).square().sum().backward()
    gradient = layer.lora_magnitude_vector["default"].weight.grad
    assert gradient.isfinite().all() and gradient.any()


def test_dora_is_a_tensor_without_weight_in_its_name_in_files(tmp_path):
    base, ids = llama(), tokens()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, use_dora=True)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    keys = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "magnitude" in key}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector" in keys
    assert not any(key.endswith(".weight") for key in keys) and len(keys) == 4
    for low_cpu_mem_usage in (False, True):
        fresh = llama()
        fresh.load_state_dict(state)
        loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, ids), expected)


def test_dropout_drops_the_input_of_the_adapter_only():
    base = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(base, dora("0", lora_dropout=0.5)).train()
    x = torch.randn(3, 6)
    assert torch.equal(model(x), base[0].get_base_layer()(x))  # B is zero, so nothing can be missing


def test_a_new_dora_beside_a_merged_adapter_is_refused():
    base = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged into it: call unmerge_adapter"):
        model.add_adapter("b", dora("0"))
    assert list(model.peft_config) == ["default"] and "b" not in base[0].lora_A


@pytest.mark.parametrize("given", [LoraRuntimeConfig(ephemeral_gpu_offload=True), {"ephemeral_gpu_offload": True}])
def test_weights_are_worked_on_where_the_runtime_configuration_says(given, monkeypatch):
    asked = []
    monkeypatch.setattr("peft.tuners.lora.init.infer_device", lambda: asked.append(1) or "cpu")
    base = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(base, dora("0", runtime_config=given))
    assert asked and base[0].lora_magnitude_vector["default"].weight.device.type == "cpu"
    assert "runtime_config" not in model.peft_config["default"].to_dict()
    asked.clear()
    get_peft_model(nn.Sequential(nn.Linear(6, 5)), dora("0"))
    assert not asked


def test_loading_with_ephemeral_gpu_offload_works_on_an_accelerator(tmp_path, monkeypatch):
    asked = []
    get_peft_model(nn.Sequential(nn.Linear(6, 5)), dora("0")).save_pretrained(tmp_path)
    monkeypatch.setattr("peft.tuners.lora.init.infer_device", lambda: asked.append(1) or "cpu")
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5)), tmp_path, ephemeral_gpu_offload=True)
    assert len(asked) == 1
    model.load_adapter(tmp_path, "b", ephemeral_gpu_offload=True)
    assert len(asked) == 2
    model.load_adapter(tmp_path, "c")
    assert len(asked) == 2
