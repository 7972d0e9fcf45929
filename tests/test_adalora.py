"""AdaLoRA: the loss, the budget and who gets it, files with lost ranks, loading into other sizes, names."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import gpt2, llama, logits, tokens
from torch import nn
from torch.testing import assert_close

from peft import (
    AdaLoraConfig,
    PeftModel,
    PeftWarning,
    get_base_model_state_dict,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.adalora import AdaLoraLayer, RankAllocator, SVDLinear
from peft.tuners.lora import LoraLayer

SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}


def adalora(base: nn.Module, *names: str, **kw) -> PeftModel:
    """A model whose adapters all change it; the first is active."""
    config = AdaLoraConfig(**{**SCHEDULE, "task_type": "CAUSAL_LM", **kw})
    model = get_peft_model(base, config, (names or ("default",))[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    for layer in model.base_model.layers():
        for name in names or ("default",):
            for _, factor in layer.adapter_tensors(name):
                nn.init.normal_(factor, std=0.3)
    return model.eval()


def draw_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ranks_left(model: nn.Module) -> int:
    return sum(int((layer.lora_E["default"] != 0).sum()) for layer in model.base_model.layers())


# ---- The loss ----


def test_loss_has_the_regularisation():
    """Section 3.1, without the squares: the mean over all A and B of their distance from orthogonal ones."""
    model, ids = adalora(llama(), orth_reg_weight=0.7), tokens()
    distances = []
    for layer in model.base_model.layers():
        A, B = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        distances += [((M - torch.eye(4)) ** 2).sum().sqrt() for M in (A @ A.T, B.T @ B)]
    expected = 0.7 * sum(distances) / len(distances)
    plain = model.get_base_model()(input_ids=ids, labels=ids).loss
    assert_close((model(input_ids=ids, labels=ids).loss - plain).double(), expected, rtol=1e-5, atol=1e-5)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model(input_ids=ids).loss is None
    with model.disable_adapter():
        plain = model.get_base_model()(input_ids=ids, labels=ids).loss
        assert torch.equal(model(input_ids=ids, labels=ids).loss, plain)


@pytest.mark.parametrize("kw", [{"orth_reg_weight": 0}, {"inference_mode": True}], ids=str)
def test_loss_without_regularisation(kw):
    model, ids = adalora(llama(), **kw), tokens()
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, model.get_base_model()(input_ids=ids, labels=ids).loss)


# ---- The ranks ----


def reference_allocation(model: nn.Module, gradients: list[dict], step: int, budget: int) -> dict[str, list[bool]]:
    """Section 3.2 in float64, from all gradients so far; the factors must not have changed."""
    scores = {}
    for key, layer in model.get_base_model().named_modules():
        if not isinstance(layer, AdaLoraLayer):
            continue
        s = {}
        for attribute, factor in layer.adapter_tensors("default"):
            mean = spread = torch.zeros(factor.shape, dtype=torch.float64)
            for g in gradients:
                sensitivity = (factor * g[f"base_model.model.{key}.{attribute}.default"]).abs().double()
                mean = 0.85 * mean + 0.15 * sensitivity
                spread = 0.85 * spread + 0.15 * (sensitivity - mean).abs()
            s[attribute] = mean * spread
        scores[f"{key}.lora_E"] = s["lora_E"][:, 0] + s["lora_A"].mean(1) + s["lora_B"].mean(0)
    best = torch.cat(list(scores.values())).sort(descending=True).values[:budget].min()
    return {key: (score >= best).tolist() for key, score in scores.items()}


def test_budget_and_ranks():
    model = adalora(llama())
    tuner, config, gradients = model.base_model, model.peft_config["default"], []
    assert isinstance(tuner.rankallocator, RankAllocator) and tuner.trainable_adapter_name == "default"
    assert (tuner.rankallocator.init_bgt, tuner.rankallocator.target_bgt) == (16, 8)
    # int(8 (1 - (step - 2) / 7)^3 + 8); allocated at even steps
    budgets = [16, 16, 16, 13, 10, 9, 8, 8, 8, 8, 8, 8, 8]
    assert [tuner.rankallocator.budget_schedule(step)[0] for step in range(13)] == budgets
    for step in range(5):
        gradients.append(draw_gradients(model))
        expected = reference_allocation(model, gradients, step, budgets[4])
        assert ranks_left(model) == 16 and config.rank_pattern is None
        model.update_and_allocate(step)
    assert config.rank_pattern == expected and ranks_left(model) == 10
    for key, layer in model.get_base_model().named_modules():
        if isinstance(layer, AdaLoraLayer):
            assert (layer.lora_E["default"][:, 0] != 0).tolist() == expected[f"{key}.lora_E"]
    for step in range(5, 10):
        draw_gradients(model)
        model.update_and_allocate(step)
    final = copy.deepcopy(config.rank_pattern)
    assert sum(map(sum, final.values())) == 8 and not tuner.rankallocator.exp_avg_ipt
    for layer in tuner.layers():  # as an optimiser with momentum would
        layer.lora_E["default"].data.add_(1.0)
    for parameter in model.parameters():
        parameter.grad = None
    model.update_and_allocate(11)
    assert config.rank_pattern == final and ranks_left(model) == 8


def test_allocation_needs_gradients():
    with pytest.raises(RuntimeError, match=r"lora_E has no gradient: update_and_allocate\(\) comes after"):
        adalora(llama()).update_and_allocate(0)


def test_each_adapter_has_its_own_budget():
    model = adalora(llama(), "a", "b")
    for step in range(5):
        draw_gradients(model)
        model.update_and_allocate(step)
    assert model.peft_config["a"].rank_pattern is not None and model.peft_config["b"].rank_pattern is None
    assert all(layer.lora_E["b"].all() for layer in model.base_model.layers())
    first = model.base_model.rankallocator
    model.delete_adapter("a")
    model.add_adapter("a", AdaLoraConfig(**SCHEDULE))
    model.set_adapter("a")
    assert model.base_model.rankallocator is not first


def test_a_training_run():
    torch.manual_seed(0)
    model, batch = get_peft_model(llama(), AdaLoraConfig(**SCHEDULE, target_modules="all-linear")), tokens()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(13):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    pattern = model.peft_config["default"].rank_pattern
    assert losses[-1] < losses[0] and len(pattern) == 14 and sum(map(sum, pattern.values())) == 28
    assert ranks_left(model) <= 28


# ---- Files ----


def with_lost_ranks(base: nn.Module) -> PeftModel:
    model = adalora(base)
    for step in range(10):
        draw_gradients(model)
        model.update_and_allocate(step)
    return model


def test_files_lack_the_lost_ranks(tmp_path):
    base, ids = llama(), tokens()
    model = with_lost_ranks(copy.deepcopy(base))
    assert not torch.equal(logits(model, ids), logits(base, ids))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern == model.peft_config["default"].rank_pattern and sum(map(sum, pattern.values())) == 8
    for key, left in pattern.items():
        path = f"base_model.model.{key.removesuffix('.lora_E')}"
        shapes = [tuple(tensors[f"{path}.lora_{name}"].shape) for name in "ABE"]
        assert shapes == [(sum(left), 16), (shapes[1][0], sum(left)), (sum(left), 1)]
    assert len(tensors) == 12  # and no ranknum
    for kw in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **kw)
        assert_close(logits(loaded, ids), logits(model, ids))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], t) for key, t in tensors.items())


def test_loading_into_an_adapter_of_another_size(tmp_path):
    """As Trainer does it at the end, with the best of several checkpoints."""
    base, ids = llama(), tokens()
    model = with_lost_ranks(copy.deepcopy(base))
    model.save_pretrained(tmp_path / "best")
    other = with_lost_ranks(copy.deepcopy(base))  # the file has other ranks of other layers
    flags = {name: p.requires_grad for name, p in other.named_parameters()}
    assert other.load_adapter(tmp_path / "best", "default", is_trainable=True) == ([], [])
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags
    assert_close(logits(other, ids), logits(model, ids))
    other.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert_close(logits(loaded, ids), logits(model, ids))
    pattern = loaded.peft_config["default"].rank_pattern
    assert {key: sum(left) for key, left in pattern.items()} == {
        key: sum(left) for key, left in model.peft_config["default"].rank_pattern.items()
    }


def test_loading_what_was_saved_before_ranks_were_lost(tmp_path):
    base, ids = llama(), tokens()
    early = adalora(copy.deepcopy(base))
    early.save_pretrained(tmp_path / "early")
    late = with_lost_ranks(copy.deepcopy(base))
    allocator = late.base_model.rankallocator
    late.load_adapter(tmp_path / "early", "default", is_trainable=True)
    assert late.base_model.rankallocator is allocator  # of the same sizes
    late.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert_close(logits(loaded, ids), logits(early, ids))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_training_goes_on_with_all_ranks_in_their_places(low_cpu_mem_usage, tmp_path):
    """As Trainer resumes: into a new adapter, whose optimiser gets a state for all ranks."""
    base, ids = llama(), tokens()
    model = with_lost_ranks(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    pattern = model.peft_config["default"].rank_pattern
    fresh = AdaLoraConfig(**SCHEDULE, task_type="CAUSAL_LM")
    other = get_peft_model(copy.deepcopy(base), fresh, low_cpu_mem_usage=low_cpu_mem_usage)
    shapes = {key: p.shape for key, p in other.named_parameters()}
    other.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {key: p.shape for key, p in other.named_parameters()} == shapes
    assert other.peft_config["default"].rank_pattern == pattern
    assert_close(logits(other, ids), logits(model, ids))
    for ours, theirs in zip(other.base_model.layers(), model.base_model.layers()):
        assert torch.equal(ours.lora_E["default"], theirs.lora_E["default"])
        left = torch.tensor(pattern[ours.pattern_key])
        assert torch.equal(ours.lora_A["default"][left], theirs.lora_A["default"][left])
        assert torch.equal(ours.lora_B["default"][:, left], theirs.lora_B["default"][:, left])
    draw_gradients(other)
    other.update_and_allocate(7)  # the budget is that of the whole run
    assert other.base_model.rankallocator.init_bgt == model.base_model.rankallocator.init_bgt == 16
    other.save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert {key: t.shape for key, t in again.items()} == {key: t.shape for key, t in first.items()}


def test_tensors_alone_come_first(tmp_path):
    """Without the configuration nobody knows which ranks they were."""
    base, ids = llama(), tokens()
    model = with_lost_ranks(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for init_r in (4, 2):  # as many as the other had, and fewer than some of its layers have left
        other = adalora(copy.deepcopy(base), init_r=init_r)
        assert set_peft_model_state_dict(other, tensors) == ([], [])
        for layer in other.base_model.layers():
            E = tensors[f"base_model.model.{layer.pattern_key}"]
            found = layer.lora_E["default"]
            assert len(found) == layer.r["default"] == max(init_r, len(E))
            assert torch.equal(found[: len(E)], E) and not found[len(E) :].any()
        if init_r == 4:  # by which the delta is divided
            assert_close(logits(other, ids), logits(model, ids))


def test_a_layer_that_lost_all_its_ranks(tmp_path):
    base, ids = llama(), tokens()
    model = adalora(copy.deepcopy(base))
    keys = [key for key, m in model.get_base_model().named_modules() if isinstance(m, AdaLoraLayer)]
    model.peft_config["default"].rank_pattern = {f"{key}.lora_E": [i > 0] * 4 for i, key in enumerate(keys)}
    model.base_model.rankallocator.mask_using_rank_pattern(model, model.peft_config["default"].rank_pattern)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert_close(logits(loaded, ids), logits(model, ids))
    assert next(iter(loaded.base_model.layers())).lora_A["default"].shape == (0, 16)
    loss = loaded(input_ids=ids, labels=ids).loss
    loss.backward()
    loaded.update_and_allocate(4)
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in loaded.parameters())


# ---- The rest ----


def test_the_base_model_has_no_part_of_it():
    base = llama()
    keys = base.state_dict().keys()
    assert get_base_model_state_dict(adalora(base)).keys() == keys


def test_names_scaling_and_conv1d():
    model = adalora(gpt2(), lora_alpha=6)
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    assert isinstance(layer, SVDLinear) and isinstance(layer, LoraLayer)
    assert layer.lora_A["default"].shape == (4, 16) and layer.lora_B["default"].shape == (48, 4)
    assert layer.scaling == {"default": 6} and layer.ranknum["default"].item() == 4.0
    delta = layer.get_delta_weight("default")
    layer.scale_layer(2.0)
    assert_close(layer.get_delta_weight("default"), 2 * delta)
    assert {status.module_type for status in model.get_layer_status()} == {"adalora.SVDLinear"}


def test_dropout_is_on_the_input_of_the_delta():
    model = adalora(nn.Sequential(nn.Linear(400, 5)), target_modules=["0"], lora_dropout=0.5, task_type=None)
    layer, x = model.base_model.model[0], torch.eye(400)
    delta = model(x) - layer.base_layer(x)
    model.train()
    dropped = (model(x) - layer.base_layer(x)).abs().amax(1) < 0.5 * delta.abs().amax(1)
    assert 120 < dropped.sum() < 280  # 200, give or take eight standard deviations


def test_r_has_no_effect_and_says_so():
    with pytest.warns(PeftWarning, match="r=3 is not used: AdaLoRA goes from init_r=12 to target_r=8"):
        AdaLoraConfig(r=3, total_step=10)
