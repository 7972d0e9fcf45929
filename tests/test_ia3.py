"""IA3: default targets, what is scaled where, and what is refused. (The rest is in test_invariants.py.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_bases import BASES, WIDTH
from tiny_models import bert, gpt2, llama, logits, tokens
from torch import nn
from torch.testing import assert_close

from peft import IA3Config, PeftWarning, get_peft_model
from peft.tuners.ia3 import IA3Layer


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the adapter's parameters, by the last part of the target's name."""
    layers = {key.rpartition(".")[2]: m for key, m in model.named_modules() if isinstance(m, IA3Layer)}
    return {name: tuple(layer.ia3_l["default"].shape) for name, layer in layers.items()}


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_default_targets_scale_the_output_of_attention_and_the_input_of_the_second_layer(make):
    model = get_peft_model(make(), IA3Config())
    config, sizes = model.peft_config["default"], shapes(model)
    assert config.feedforward_modules < config.target_modules
    second = {llama: "down_proj", gpt2: "c_proj", bert: "dense"}[make]
    assert sizes.pop(second)[0] == 1 and sizes
    assert all(shape[1] == 1 for shape in sizes.values())
    ids = tokens()
    for layer in model.base_model.layers():
        layer.ia3_l["default"].data.normal_()
    expected = logits(model, ids)
    assert_close(logits(model.merge_and_unload(), ids), expected)


def test_factors_of_a_grouped_convolution_act_on_the_channels_of_each_group():
    net = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2))
    x = torch.randn(3, 4, 5, 5)
    model = get_peft_model(net, IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    factors = net[0].ia3_l["default"].data.normal_()
    conv = net[0].base_layer
    expected = F.conv2d(x * factors, conv.weight, conv.bias, groups=2)
    assert_close(model(x), expected)
    assert_close(model.merge_and_unload()(x), expected)


def test_adapters_that_scale_different_sides_live_in_one_layer():
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    model = get_peft_model(net, IA3Config(target_modules=["0"], feedforward_modules=[]))
    model.add_adapter("inside", IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    for factors in net[0].ia3_l.values():
        factors.data.normal_()
    model.set_adapter(["default", "inside"])
    base, scale, gain = net[0].base_layer, net[0].ia3_l["default"].flatten(), net[0].ia3_l["inside"]
    expected = scale * F.linear(gain * x, base.weight, base.bias)
    assert_close(model(x), expected)
    rows = model(x, adapter_names=["default", "inside", "__base__", "inside", "default"])
    assert_close(rows[1], F.linear(gain * x[1:2], base.weight, base.bias)[0])
    assert_close(rows[0], scale * base(x[0]))


def test_random_factors():
    model = get_peft_model(llama(), IA3Config(init_ia3_weights=False))
    layers = [factors.flatten() for factors in model.parameters() if factors.requires_grad]
    assert torch.cat(layers).std() > 0.3  # of 80 numbers; the 8 of one layer may be close together
    assert all(len(factors.unique()) > 1 for factors in layers)


def test_models_without_defaults_need_both_lists():
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="No default target_modules for model type 'custom'"):
        get_peft_model(net, IA3Config())
    with pytest.raises(ValueError, match="No default feedforward_modules for model type 'custom'"):
        get_peft_model(net, IA3Config(target_modules=["0"]))


def test_feedforward_modules_that_name_no_target_are_warned_of():
    with pytest.warns(PeftWarning, match=r"names what the model does not have.*feedforward_modules \['up_proj'\]"):
        get_peft_model(llama(), IA3Config(target_modules=r".*\.q_proj", feedforward_modules=["up_proj"]))


def test_scaling_the_input_of_an_embedding_is_refused():
    config = IA3Config(target_modules=["embed_tokens"], feedforward_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="embed_tokens .Embedding.: not supported in feedforward_modules"):
        get_peft_model(llama(), config)


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("feedforward", [[], ["0"]], ids=["output", "input"])
def test_packed_weights(base, feedforward):
    net, x = nn.Sequential(BASES[base].pack(nn.Linear(WIDTH, WIDTH))).train(), torch.randn(4, WIDTH)
    model = get_peft_model(net, IA3Config(target_modules=["0"], feedforward_modules=feedforward)).train()
    factors = net[0].ia3_l["default"].data.normal_().flatten()
    expected = net[0].base_layer(x * factors) if feedforward else net[0].base_layer(x) * factors
    y = model(x)
    assert_close(y, expected)
    y.sum().backward()
    assert net[0].ia3_l["default"].grad.any()
    with pytest.warns(PeftWarning, match="packed again"):
        model.merge_adapter()
    assert (model(x) - expected).norm() < 0.5 * expected.norm()  # 4 bits lose a tenth to a seventh
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
