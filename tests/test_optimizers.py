"""LoRA+ and LoRA-FA: which parameter gets which learning rate, and the step against the paper's formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv, self.linear = nn.Embedding(7, 6), nn.Conv1d(6, 4, 3, padding=1), nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, ids):
        return self.norm(self.linear(self.conv(self.table(ids).mT).mT))


def adapted(**kw):
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["table", "conv", "linear"], "modules_to_save": ["norm"], **kw}
    model = get_peft_model(Net().double(), LoraConfig(**config))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return model


def loss(model):
    return (model(torch.arange(7).view(1, 7)) * torch.arange(5)).square().sum()


def test_loraplus_learning_rates_and_decay():
    model = adapted()
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1,
        loraplus_lr_embedding=2e-6, betas=(0.8, 0.9),
    )  # fmt: skip
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = {
        names[id(p)].removeprefix("base_model.model."): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        "table.lora_embedding_A.default": (2e-6, 0.1),
        "table.lora_embedding_B.default": (2e-6, 0.1),
        "conv.lora_A.default.weight": (1e-3, 0.1),
        "conv.lora_B.default.weight": (0.016, 0.1),
        "linear.lora_A.default.weight": (1e-3, 0.1),
        "linear.lora_B.default.weight": (0.016, 0.1),
        "norm.modules_to_save.default.weight": (0.016, 0.0),
        "norm.modules_to_save.default.bias": (0.016, 0.0),
    }
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    loss(model).backward()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = p.grad / (p.grad.abs() + group["eps"])  # AdamW's first
            decayed = before[names[id(p)]] * (1 - group["lr"] * group["weight_decay"])
            torch.testing.assert_close(p.detach(), decayed - group["lr"] * step, rtol=0, atol=1e-12)


def test_loraplus_defaults_and_refusals():
    model = adapted()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=4.0, momentum=0.3)
    assert {(g["lr"], g["weight_decay"], g["momentum"]) for g in optimizer.param_groups} == {
        (1e-3, 0.0, 0.3), (4e-3, 0.0, 0.3), (1e-6, 0.0, 0.3)
    }  # fmt: skip
    with pytest.raises(ValueError, match="loraplus_lr_ratio must be positive, got 0"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing in the model trains"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=4.0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lorafa_moves_b_by_the_fitted_gradient(use_rslora):
    model = adapted(alpha_pattern={"linear": 3}, use_rslora=use_rslora)
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=0.1)
    net, frozen = model.get_base_model(), []
    factors = {
        key: tuple(f.detach().clone() for f in getattr(net, key).factors("default")) for key in ("conv", "linear")
    }
    plain = copy.deepcopy(model)
    loss(plain).backward()
    loss(model).backward()
    optimizer.step()
    for key, alpha in (("conv", 6), ("linear", 3)):
        A, B = factors[key]
        s = alpha / (2**0.5 if use_rslora else 2)
        G = getattr(plain.get_base_model(), key).factors("default")[1].grad.flatten(1)
        fitted = (G @ torch.linalg.inv(A.flatten(1) @ A.flatten(1).T) / s**2).view_as(B)
        A_now, B_now = getattr(net, key).factors("default")
        # The optimiser adds 1e-8 to the diagonal of A A^T, whose smallest eigenvalue may be small.
        torch.testing.assert_close(B_now.grad, fitted, atol=1e-4 * fitted.abs().max().item(), rtol=0)
        expected = B - 0.1 * B_now.grad / (B_now.grad.abs() + 1e-6)  # AdamW's first step
        torch.testing.assert_close(B_now.detach(), expected, atol=1e-9, rtol=0)
        assert torch.equal(A_now, A)
        frozen.append(A_now.requires_grad)
    assert frozen == [False, False]


def test_the_fitted_gradient_is_the_best_change_of_the_whole_weight():
    """Of all dB, the fitted one brings s dB A closest to the weight's gradient."""
    model = adapted()
    layer = model.get_base_model().linear
    layer.base_layer.weight.requires_grad_(True)
    with torch.no_grad():  # A A^T is [[1, 1], [1, 5]]: far from what the optimiser adds to it, 1e-8
        A = nn.init.orthogonal_(layer.lora_A["default"].weight)
        A.copy_(torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=A.dtype) @ A)
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=0.1)
    loss(model).backward()
    G, B, s = layer.base_layer.weight.grad, layer.lora_B["default"].weight, layer.scaling["default"]
    best = torch.linalg.lstsq(s * A.T, G.T).solution.T
    optimizer.step()
    torch.testing.assert_close(B.grad, best, atol=1e-6 * best.abs().max().item(), rtol=0)


def test_lorafa_refuses_another_adapters_numbers():
    model = adapted()
    with pytest.raises(ValueError, match=r"has {'r': 2, 'use_rslora': False}, got {'r': 4, 'use_rslora': True}"):
        create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.1, use_rslora=True)
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match="no LoRA that trains"):
        create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=0.1)


def test_lorafa_refuses_bare_parameters():
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["linear.weight"]))
    with pytest.raises(ValueError, match="adapters of target_parameters have one per expert"):
        create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=0.1)


def test_lorafa_takes_a_closure_and_goes_on_from_its_state():
    model = adapted()
    settings = {"r": 2, "lora_alpha": 6, "lr": 0.05, "weight_decay": 0.1}
    plain = copy.deepcopy(model)
    optimizer, other = (create_lorafa_optimizer(one, **settings) for one in (model, plain))

    def compute(one, its_optimizer):
        its_optimizer.zero_grad()
        value = loss(one)
        value.backward()
        return value

    for _ in range(5):
        expected = compute(plain, other)
        other.step()
        assert torch.equal(optimizer.step(lambda: compute(model, optimizer)), expected)
    copied = copy.deepcopy(model)
    again = create_lorafa_optimizer(copied, **settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares its tensors
    for one, its_optimizer in ((model, optimizer), (plain, other), (copied, again)):
        compute(one, its_optimizer)
        its_optimizer.step()
    for ours, without_closure, theirs in zip(model.parameters(), plain.parameters(), copied.parameters()):
        assert torch.equal(ours, without_closure) and torch.equal(ours, theirs)
