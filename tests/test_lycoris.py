"""LoHa and LoKr: the forms of their factors, how LoKr splits sizes, dropping, scaling, and what is not formed."""

from __future__ import annotations

import pytest
import torch
from invariant_cases import OPS, loha_formula, lokr_formula
from tiny_models import llama, logits, losses_of_training, tokens
from torch import nn
from torch.testing import assert_close

from peft import LoHaConfig, LoKrConfig, get_peft_model
from peft.tuners.loha.layer import Conv2d, Linear, LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner

CONFIGS = {"loha": LoHaConfig, "lokr": LoKrConfig}
FORMULAS = {"loha": loha_formula, "lokr": lokr_formula}
methods = pytest.mark.parametrize("method", list(CONFIGS))


def adapted(layer: nn.Module, method: str, **kw):
    """A float64 model of one layer with random factors, and its adapter layer."""
    config = CONFIGS[method](**{"r": 2, "alpha": 4, "init_weights": False, "target_modules": ["0"], **kw})
    model = get_peft_model(nn.Sequential(layer).double(), config).eval()
    return model, model.get_base_model()[0]


@pytest.mark.parametrize("op", ["linear", "conv1d", "conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize(
    ("method", "kw"),
    [("loha", {}), ("loha", {"r": 7}), ("lokr", {}), ("lokr", {"r": 8, "alpha": 16}), ("lokr", {"decompose_factor": 1}),
     ("lokr", {"decompose_both": True, "decompose_factor": 6, "r": 1, "alpha": 2})],
)  # fmt: skip
def test_every_form_of_the_factors(op, method, kw):
    """Kernels that share the factors of the inputs; the other form is in test_invariants.py."""
    case = OPS[op]
    x, base = case.draw(), case.make()
    x = x.double() if x.is_floating_point() else x
    model, layer = adapted(base, method, **kw)
    W, b = base.weight.detach().clone(), getattr(base, "bias", None)
    expected = FORMULAS[method](case, W, b, dict(layer.adapter_tensors("default")), x, scaling=layer.scaling["default"])
    assert_close(model(x), expected)
    merged = model.merge_and_unload()
    assert_close(merged(x), expected)


@methods
def test_grouped_convolutions(method):
    model, layer = adapted(nn.Conv2d(4, 6, 3, groups=2), method)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    forward = model(x)
    assert layer.get_delta_weight("default").shape == (6, 2, 3, 3)
    assert_close(model.merge_and_unload()(x), forward)


def test_the_sizes_that_lokr_splits_into():
    """Table of the LyCORIS library."""
    assert [factorization(n) for n in (1, 7, 128, 250, 360, 512, 1024)] == [
        (1, 1), (1, 7), (8, 16), (10, 25), (18, 20), (16, 32), (32, 32),
    ]  # fmt: skip
    assert [factorization(128, f) for f in (2, 4, 16, 3, 1000)] == [(2, 64), (4, 32), (16, 8), (2, 64), (8, 16)]
    assert [factorization(250, f) for f in (2, 4, 8, 16)] == [(2, 125), (2, 125), (5, 50), (10, 25)]


def test_what_lokr_decomposes():
    def shapes(**kw):
        _, layer = adapted(nn.Linear(64, 48), "lokr", **kw)
        return {path.removeprefix("lokr_"): tuple(t.shape) for path, t in layer.adapter_tensors("default")}

    assert shapes(r=2) == {"w1": (6, 8), "w2_a": (8, 2), "w2_b": (2, 8)}
    assert shapes(r=4) == {"w1": (6, 8), "w2": (8, 8)}  # a product would take as many numbers
    assert shapes(r=3, decompose_both=True) == {"w1_a": (6, 3), "w1_b": (3, 8), "w2_a": (8, 3), "w2_b": (3, 8)}
    assert shapes(r=2, decompose_factor=4) == {"w1": (4, 4), "w2_a": (12, 2), "w2_b": (2, 16)}


@pytest.mark.parametrize(
    ("kw", "zero"),
    [({}, "lokr_w1"), ({"decompose_both": True}, "lokr_w1_a"), ({"init_weights": "lycoris"}, "lokr_w2_b"),
     ({"init_weights": "lycoris", "r": 8}, "lokr_w2"), ({"init_weights": False}, None)],
)  # fmt: skip
def test_what_of_lokr_starts_at_zero(kw, zero):
    _, layer = adapted(nn.Linear(64, 48), "lokr", **{"init_weights": True, **kw})
    assert [path for path, t in layer.adapter_tensors("default") if not t.any()] == ([zero] if zero else [])


@methods
@pytest.mark.parametrize("layer", [nn.Linear(6, 40), nn.Conv2d(4, 40, 3)], ids=["linear", "conv2d"])
def test_rank_dropout_drops_output_channels(method, layer):
    model, adapter = adapted(layer, method, rank_dropout=0.5)
    x = torch.randn(2, *((6,) if isinstance(layer, nn.Linear) else (4, 5, 5)), dtype=torch.float64)
    base, delta = adapter.base_layer(x), model(x) - adapter.base_layer(x)
    model.train()
    share = ((model(x) - base) / delta).transpose(0, 1).flatten(1)  # (channel, ...)
    left = share[:, 0] > 0.5
    assert 1 < left.sum() < 39  # outside by chance once in 10**10 runs
    factor = 40 / left.sum() if method == "loha" else 1.0
    assert_close(share, torch.where(left, factor, 0.0).double()[:, None].expand_as(share), rtol=0, atol=1e-6)
    model.merge_adapter()  # whole, also in training
    assert_close(adapter(x), base + delta)


def test_rank_dropout_scale_of_lokr():
    model, adapter = adapted(nn.Linear(6, 40), "lokr", rank_dropout=0.5, rank_dropout_scale=True)
    x = torch.randn(2, 6, dtype=torch.float64)
    base = adapter.base_layer(x)
    delta = model(x) - base
    share = (model.train()(x) - base) / delta
    assert_close(share.mean().item(), 1.0, rtol=0, atol=1e-5)
    assert share.max() > 1.1


@methods
def test_module_dropout_drops_all_or_nothing(method):
    model, adapter = adapted(nn.Linear(6, 10), method, module_dropout=0.5)
    x = torch.randn(2, 6, dtype=torch.float64)
    outputs = {"with": model(x), "without": adapter.base_layer(x)}
    model.train()
    drawn = [
        next((k for k, y in outputs.items() if torch.equal(y, out)), None) for out in (model(x) for _ in range(64))
    ]
    assert set(drawn) == {"with", "without"} and 10 < drawn.count("with") < 54


@methods
def test_scaling(method):
    model, layer = adapted(nn.Linear(6, 10), method, r=2, alpha=3)
    delta = layer.get_delta_weight("default")
    layer.scale_layer(2.0)
    assert_close(layer.get_delta_weight("default"), 2 * delta)
    layer.unscale_layer(4.0)
    assert layer.scaling == {"default": 0.75}
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.5}
    before = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    layer.set_scale("default", 5.0)
    model.unmerge_adapter()  # as it was merged
    assert_close(layer.base_layer.weight, before)
    assert layer.scaling == {"default": 7.5}


@methods
def test_patterns_and_default_targets(method):
    model = get_peft_model(
        llama(), CONFIGS[method](r=3, alpha=6, rank_pattern={"v_proj": 1}, alpha_pattern={"0.self_attn.q_proj": 1.5})
    )
    layers = {key.split("layers.")[1]: m for key, m in model.named_modules() if isinstance(m, LycorisLayer)}
    assert {key: (m.r["default"], m.scaling["default"]) for key, m in layers.items()} == {
        "0.self_attn.q_proj": (3, 0.5), "0.self_attn.v_proj": (1, 6.0),
        "1.self_attn.q_proj": (3, 2.0), "1.self_attn.v_proj": (1, 6.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(512, 384), lambda: nn.Embedding(512, 384)], ids=["linear", "embedding"]
)
def test_lokr_forms_nothing_as_large_as_the_weight(make, monkeypatch):
    model, layer = adapted(make(), "lokr", r=4)
    monkeypatch.setattr(type(layer), "product", lambda self, name: pytest.fail("the delta was formed"))
    x = torch.randn(3, 512).double() if isinstance(layer.base_layer, nn.Linear) else torch.randint(512, (3,))
    model.train()(x).square().sum().backward()
    assert all(t.grad.any() for _, t in layer.adapter_tensors("default"))


def saved_numbers(function) -> int:
    """How many numbers autograd keeps of what `function` computes."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel()}), lambda t: t):
        function()
    return sum(sizes.values())


def test_loha_keeps_nothing_as_large_as_the_weight():
    model, layer = adapted(nn.Linear(96, 80), "loha")
    model.train()
    x = torch.randn(3, 96, dtype=torch.float64, requires_grad=True)
    assert saved_numbers(lambda: layer.delta("default", x)) <= x.numel() + 2 * 2 * (96 + 80)


def test_second_derivatives_of_loha():
    _, layer = adapted(nn.Linear(5, 4), "loha", alpha=3)  # scaled by 1.5
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    factors = [t for _, t in layer.adapter_tensors("default")]

    def delta(x, *factors):
        return layer.delta("default", x)

    assert torch.autograd.gradcheck(delta, (x, *factors))
    assert torch.autograd.gradgradcheck(delta, (x, *factors))
    factors[1].requires_grad_(False)
    (gradient,) = torch.autograd.grad(layer.delta("default", x).sum(), [factors[0]])
    assert gradient.shape == factors[0].shape


def test_loha_under_autocast():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(3, 6, requires_grad=True)
    y = model(x)
    (exact,) = torch.autograd.grad(y.sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
    assert z.dtype == torch.bfloat16
    assert_close(z.float(), y, rtol=3e-2, atol=3e-2)
    assert_close(torch.autograd.grad(z.sum(), x)[0], exact, rtol=3e-2, atol=3e-2)


def test_names():
    assert issubclass(Linear, LoHaLayer) and issubclass(Conv2d, LoHaLayer) and issubclass(LoHaLayer, LycorisLayer)
    assert issubclass(LoKrLayer, LycorisLayer) and issubclass(LoHaConfig, LycorisConfig)
    model = get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"]))
    assert isinstance(model.base_model, LycorisTuner)
    assert {status.module_type for status in model.get_layer_status()} == {"loha.Linear"}


@methods
def test_training_lowers_the_loss(method):
    torch.manual_seed(0)
    model = get_peft_model(llama(), CONFIGS[method](target_modules="all-linear", task_type="CAUSAL_LM"))
    batch = tokens()
    before = logits(model, batch)
    losses = losses_of_training(model, batch, steps=8, lr=1e-2)
    assert losses[-1] < losses[0] and not torch.equal(logits(model, batch), before)
