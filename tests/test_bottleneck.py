"""Bottleneck adapters: where they stand, blocks as targets, what is refused. (The rest is in test_invariants.py.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_bases import BASES, WIDTH
from tiny_models import bert, gpt2, llama, logits, tokens
from torch import nn
from torch.testing import assert_close

from peft import BottleneckConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.bottleneck import BottleneckLayer


def config(**kw) -> BottleneckConfig:
    return BottleneckConfig(**{"bottleneck_size": 3, "init_weights": False, **kw})


def adapters(model: nn.Module) -> dict[str, BottleneckLayer]:
    return {key: m for key, m in model.named_modules() if isinstance(m, BottleneckLayer)}


@pytest.mark.parametrize(("make", "target"), [(llama, "down_proj"), (gpt2, "mlp.c_proj"), (bert, "output.dense")])
def test_default_targets_are_the_last_layers_of_feed_forward_blocks(make, target):
    model = get_peft_model(make(), BottleneckConfig(reduction_factor=4))
    assert all(key.endswith(target) for key in adapters(model))
    assert {layer.bottleneck_down["default"].weight.shape for layer in adapters(model).values()} == {(4, 16)}


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize(
    ("make", "target"), [(llama, "mlp"), (llama, "self_attn"), (gpt2, "mlp"), (gpt2, "attn"), (bert, "attention")]
)
def test_whole_blocks_as_targets(make, target, placement):
    """Also where they are called by keywords and give tuples; the reference is a hook on the block."""
    base, ids = make(), tokens()
    expected = logits(base, ids)
    model = get_peft_model(base, config(target_modules=[target], placement=placement)).eval()
    found = adapters(model)
    adapted = logits(model, ids)
    rows = logits(model, ids, adapter_names=["default", "__base__"])
    assert_close(rows, torch.stack([adapted[0], expected[1]]))
    model.unload()
    assert torch.equal(logits(base, ids), expected)

    def beside(layer):
        def hook(module, args, kwargs, result):
            x = args[0] if args else kwargs["hidden_states"]
            y = result[0] if isinstance(result, tuple) else result
            h = F.relu(layer.bottleneck_down["default"](y if placement == "sequential" else x))
            y = y + layer.bottleneck_up["default"](h)
            return (y, *result[1:]) if isinstance(result, tuple) else y

        return hook

    for key, layer in found.items():
        base.get_submodule(key.removeprefix("base_model.model.")).register_forward_hook(beside(layer), with_kwargs=True)
    assert_close(logits(base, ids), adapted)
    assert not torch.allclose(adapted, expected, atol=1e-4)


def test_a_block_of_another_width():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)))
    model, x = get_peft_model(net, config(target_modules=["0"], placement="parallel")), torch.randn(5, 4)
    layer = net[0]
    assert (layer.in_features, layer.out_features) == (4, 6)
    hidden = F.relu(layer.bottleneck_down["default"](x))
    assert_close(model(x), layer.base_layer(x) + layer.bottleneck_up["default"](hidden))


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"])
def test_non_linearities_and_replacing_the_output(name):
    net, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(5, 4)
    model = get_peft_model(net, config(target_modules=["0"], non_linearity=name, residual=False, scaling=2.0))
    layer = net[0]
    hidden = layer.bottleneck_down["default"](layer.base_layer(x))
    assert_close(model(x), 2 * layer.bottleneck_up["default"](getattr(F, name)(hidden)))


def test_dropout_in_training_only():
    net, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(50, 4)
    model = get_peft_model(net, config(target_modules=["0"], dropout=0.5))
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_files_hold_the_adapter_alone(tmp_path):
    base, ids = llama(), tokens()
    fresh = llama()
    fresh.load_state_dict(base.state_dict())
    model = get_peft_model(base, config(target_modules=["layers.0.mlp"], scaling="learned"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert loaded.peft_config["default"].peft_type == PeftType.BOTTLENECK
    assert torch.equal(logits(loaded, ids), logits(model.eval(), ids))
    from peft import load_peft_weights

    keys = ("down.bias", "down.weight", "scale", "up.bias", "up.weight")
    assert sorted(load_peft_weights(tmp_path)) == [f"base_model.model.model.layers.0.mlp.bottleneck_{k}" for k in keys]


def test_merging_is_refused_and_changes_nothing():
    model, ids = get_peft_model(llama(), config()).eval(), tokens()
    expected = logits(model, ids)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(TypeError, match="is not linear, so that it cannot be merged .* unload"):
            merge()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Embedding(4, 4)], ids=["conv", "embedding"])
def test_parallel_to_layers_whose_input_is_of_another_shape_is_refused(layer):
    with pytest.raises(ValueError, match=rf"0 \({type(layer).__name__}\): placement='parallel' needs"):
        get_peft_model(nn.Sequential(layer), config(target_modules=["0"], placement="parallel"))


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("target", ["0", "0.0"], ids=["block", "layer"])
def test_packed_base(base, target):
    net, x = nn.Sequential(nn.Sequential(BASES[base].pack(nn.Linear(WIDTH, WIDTH)))), torch.randn(4, WIDTH)
    plain = net.train()(x)
    model = get_peft_model(net, config(target_modules=[target])).train()
    layer = next(iter(adapters(model).values()))
    y = model(x)
    assert_close(y, plain + layer.bottleneck_up["default"](F.relu(layer.bottleneck_down["default"](plain))))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
