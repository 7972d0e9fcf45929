"""Autograd functions of ours compute their backward pass in the types of their forward pass, also inside autocast.

There torch's own linear layers compute it in autocast's type.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from peft import LoraConfig, SftConfig, SsfConfig, get_peft_model
from peft.utils.autocast import no_autocast

SPARSE = ("element", "row", "column", "block")
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, init_lora_weights=False, target_modules=["0"]),
    "ssf": lambda: SsfConfig(target_modules=["0"]),
    **{how: functools.partial(SftConfig, granularity=how, density=0.4, target_modules=["0"]) for how in SPARSE},
    "block": lambda: SftConfig(granularity="block", block_size=4, density=0.4, target_modules=["0"]),
}


def gradients(model: nn.Module, x: torch.Tensor, inside: bool) -> list[torch.Tensor]:
    """Of the input and what trains, in that order; the backward pass runs `inside` an autocast region."""
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        return list(torch.autograd.grad(loss, [x, *trained]))


@pytest.mark.parametrize(
    ("method", "beside"), [*((method, False) for method in CONFIGS), *((method, True) for method in SPARSE)]
)
def test_a_backward_pass_inside_autocast(method, beside):
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), CONFIGS[method]())
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    if beside:  # the delta's product stands beside the layer
        model.get_base_model()[0].base_layer.register_forward_hook(lambda module, args, output: None)
    x = torch.randn(8, 16)
    pairs = list(zip(gradients(model, x, True), gradients(model, x, False)))
    for found, expected in pairs[1:] if beside else pairs:  # that of the input then comes from torch's own layer too
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # bfloat16 would be off by 1e-2


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_as_before_afterwards(enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        with no_autocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu") is enabled
