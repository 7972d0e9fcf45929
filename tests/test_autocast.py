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
from peft.utils.blockwise import quantize_

SPARSE = {"element": {}, "row": {}, "column": {}, "block": {"block_size": 4}}
CONFIGS = {
    "lora": functools.partial(LoraConfig, r=2, init_lora_weights=False),
    "ssf": SsfConfig,
    **{how: functools.partial(SftConfig, granularity=how, density=0.4, **fields) for how, fields in SPARSE.items()},
}


def adapt(layer: nn.Module, method: str) -> nn.Module:
    model = get_peft_model(nn.Sequential(layer), CONFIGS[method](target_modules=["0"]))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model


def gradients(model: nn.Module, x: torch.Tensor, inside: bool) -> list[torch.Tensor]:
    """Of the input and what trains, in that order; the backward pass runs `inside` an autocast region."""
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        return list(torch.autograd.grad(loss, [x, *trained]))


def check(model: nn.Module, x: torch.Tensor, but_the_input: bool = False) -> None:
    pairs = list(zip(gradients(model, x, True), gradients(model, x, False)))
    for found, expected in pairs[but_the_input:]:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # bfloat16 would be off by 1e-2


@pytest.mark.parametrize("method", CONFIGS)
def test_a_backward_pass_inside_autocast(method):
    check(adapt(nn.Linear(16, 12), method), torch.randn(8, 16))


@pytest.mark.parametrize("method", SPARSE)
def test_with_the_delta_beside_the_layer(method):
    model = adapt(nn.Linear(16, 12), method)
    model.get_base_model()[0].base_layer.register_forward_hook(lambda module, args, output: None)
    check(model, torch.randn(8, 16), but_the_input=True)  # whose gradient comes from torch's own layer too


@pytest.mark.parametrize("method", ["element", "row", "column"])
def test_of_a_convolution(method):
    check(adapt(nn.Conv2d(3, 4, 3), method), torch.randn(2, 3, 6, 5))


def test_of_a_packed_base():
    layer = nn.Linear(16, 12)
    quantize_({"0": layer})
    check(adapt(layer, "lora"), torch.randn(8, 16))


@pytest.mark.parametrize("method", ["lora", *SPARSE])
def test_compiled(method):
    """The backward pass is traced together with the forward pass, which runs outside. (What is compiled of SSF are
    torch's own functions.)"""
    torch.compiler.reset()
    check(torch.compile(adapt(nn.Linear(16, 12), method), backend="eager"), torch.randn(8, 16))


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_as_before_afterwards(enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        with no_autocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu") is enabled
