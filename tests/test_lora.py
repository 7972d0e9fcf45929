"""LoRA beyond the invariants: the fused linear layer, what it must not bypass, and the configuration's switches."""

from __future__ import annotations

import copy
import math
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, SftConfig, SsfConfig, get_peft_model
from peft.tuners.lora import LoraLayer, fused
from peft.tuners.lora.fused import FusedLora
from peft.tuners.tuners_utils import AdditiveLayer
from peft.utils.warning import PeftWarning


class Mlp(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 8, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.down(self.up(x).relu()))


def random_lora(base: nn.Module, names=("default",), targets=("up", "down"), **kw):
    """An adapted model whose deltas are not zero."""
    model = get_peft_model(base, LoraConfig(target_modules=list(targets), **{"r": 4, **kw}), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(target_modules=list(targets), **{"r": 4, **kw}))
    model.set_adapter(list(names))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def fused_calls(monkeypatch) -> list:
    """Filled with one entry per fused layer that runs."""
    calls = []
    real = fused.fused_lora
    monkeypatch.setattr("peft.tuners.lora.layer.fused_lora", lambda *a: calls.append(a) or real(*a))
    return calls


def module_by_module(model: nn.Module) -> nn.Module:
    """A copy of the model whose LoRA layers call base_layer, lora_A and lora_B one by one."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, AdditiveLayer):
            layer._apply_adapters = lambda names, x, layer=layer: AdditiveLayer._apply_adapters(layer, names, x)
            for name in layer.lora_A:
                for factor in (layer.lora_A[name], layer.lora_B[name]):
                    factor.register_forward_hook(lambda module, args, output: output)  # not plain: no shortcut either
    return model


def run(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor, **autocast):
    """Output and gradients, the input's first."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        y = model(x)
    y.backward(upstream.to(y.dtype))
    return y, [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_results_close(ours, theirs, tolerance: float) -> None:
    for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp(min=1e-3)


# The fused linear layer


@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=["1 adapter", "2 adapters"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("bias", "lora_bias"), [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=str)
def test_fused_equals_module_by_module(names, dropout, bias, lora_bias, shape, fused_calls, seed):
    model = random_lora(Mlp(bias=bias).double(), names, lora_dropout=dropout, lora_bias=lora_bias)
    slow = module_by_module(model)
    x, upstream = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(seed)
    ours = run(model, x, upstream)
    assert len(fused_calls) == 2
    torch.manual_seed(seed)  # the same inputs are dropped, if they are dropped in the same order
    theirs = run(slow, x, upstream)
    assert len(fused_calls) == 2
    assert_results_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("what", ["frozen", "weight", "bias", "A only", "B only", "input only"])
def test_fused_computes_exactly_the_gradients_that_are_asked_for(what):
    model = random_lora(Mlp().double(), lora_bias=True)
    for key, parameter in model.named_parameters():
        wanted = {"weight": ".weight", "bias": "bias", "A only": "lora_A", "B only": "lora_B"}.get(what, "nothing")
        parameter.requires_grad_(wanted in key)
    x = torch.randn(5, 6, dtype=torch.float64)
    if what == "frozen":
        assert not model(x).requires_grad
        return
    upstream = torch.randn(5, 6, dtype=torch.float64)
    assert_results_close(run(model, x, upstream), run(module_by_module(model), x, upstream), 1e-10)


@pytest.mark.parametrize("separate", [False, True], ids=["shared input", "dropped input"])
@pytest.mark.parametrize("biases", [False, True])
def test_fused_gradients_and_gradients_of_gradients(separate, biases):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def way(rank):
        return draw(rank, 4), draw(5, rank), draw(5) if biases else None

    x, xd, y = draw(2, 3, 4), draw(2, 3, 4) if separate else None, draw(2, 3, 5)
    A, B, b = first = way(2)
    inputs = (x, xd, None, draw(5, 4), draw(5) if biases else None, ((0, 6, 1.7),), *first)
    alone = (x, None, None, None, None, *inputs[5:])  # beside another layer
    onto = (x, None, y, *alone[3:])
    rows = ((0, 1, 1.7), (2, 5, -0.3)), *first, *way(1)
    mixed, mixed_onto = (x, None, *inputs[2:5], *rows), (*onto[:5], *rows)
    for some in (inputs, alone, onto, mixed, mixed_onto):
        assert torch.autograd.gradcheck(FusedLora.apply, some)
        assert torch.autograd.gradgradcheck(FusedLora.apply, some)
    expected = 1.7 * nn.functional.linear(x @ A.T, B, b)
    torch.testing.assert_close(FusedLora.apply(*alone), expected)
    torch.testing.assert_close(FusedLora.apply(*onto), y + expected)
    result = FusedLora.apply(*mixed_onto).flatten(0, 1)
    torch.testing.assert_close(result[[0]], (y + expected).flatten(0, 1)[[0]])
    torch.testing.assert_close(result[[1, 5]], y.flatten(0, 1)[[1, 5]])


def different_loras() -> nn.Module:
    """Adapters a, b and c of different ranks and scalings, all of which train; a and c have biases."""
    model = random_lora(Mlp().double(), ["a"], r=4, lora_bias=True)
    model.add_adapter("b", LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=3))
    model.add_adapter("c", LoraConfig(target_modules=["up", "down"], r=1, lora_bias=True))
    model.set_adapter(["a", "b", "c"])
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.5)
    return model


def by_hand(model: nn.Module, x: torch.Tensor, rows: list[list[str]]) -> torch.Tensor:
    """What `Mlp` with adapters computes; row i of the batch goes through the adapters `rows[i]`."""

    def layer(one, h, names):
        return one.base_layer(h) + sum(one.scaling[n] * one.lora_B[n](one.lora_A[n](h)) for n in names)

    net = model.get_base_model()
    hidden = [layer(net.up, x[i : i + 1], names).relu() for i, names in enumerate(rows)]
    return net.norm(torch.cat([layer(net.down, h, names) for h, names in zip(hidden, rows)]))


def assert_equal_by_hand(model: nn.Module, x: torch.Tensor, rows: list[list[str]], **kwargs) -> None:
    """Output and gradients, the input's and all parameters'."""
    x.requires_grad_()
    trained, upstream = [x, *(p for p in model.parameters() if p.requires_grad)], torch.randn_like(x)
    results = []
    for y in (model(x, **kwargs), by_hand(model, x, rows)):
        grads = torch.autograd.grad((y * upstream).sum(), trained, allow_unused=True)
        results.append([y, *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, trained))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("names", ["a", "ab", "bca"])
def test_adapters_that_are_active_together_are_one_product(names, fused_calls):
    model = different_loras()
    model.base_model.set_adapter(list(names))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert_equal_by_hand(model, x, [list(names)] * 2)
    assert len(fused_calls) == 2


@pytest.mark.parametrize(
    ("names", "length", "fused"),
    [
        (["b", "b", "__base__", "a"], 2, True),
        (["b", "a", "__base__", "b"], 2, False),
        (["b", "a", "__base__", "b"], 16, True),
        (["__base__"] * 4, 2, False),
    ],
    ids=["in order", "scattered", "scattered and long", "base only"],
)
def test_mixed_batch_runs_the_base_layer_once(names, length, fused, fused_calls):
    model = different_loras()
    x = torch.randn(4, length, 6, dtype=torch.float64)
    rows = [[] if name == "__base__" else [name] for name in names]
    assert_equal_by_hand(model, x, rows, adapter_names=names)
    assert len(fused_calls) == (2 if fused else 0)
    seen, layer = [], model.get_base_model().up
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(len(output)))  # no shortcut then
    assert_equal_by_hand(model, x.detach(), rows, adapter_names=names)
    assert seen[0] == 4


def sizes(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor):
    """What `run` gives if no two numbers cancel, all being positive; rounding errors are in proportion to it."""
    model = copy.deepcopy(model).double()
    for parameter in model.parameters():
        parameter.data.abs_()
    return run(model, x.double().abs(), upstream.double().abs())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_autocast(base_dtype, lora_bias):
    """Each of the two rounds to bfloat16 at most seven times on the way to an entry."""
    model = random_lora(nn.Sequential(nn.Linear(6, 8)).to(base_dtype), targets=["0"], lora_bias=lora_bias)
    x, upstream = torch.randn(7, 6).to(base_dtype), torch.randn(7, 8)
    ours = run(model, x, upstream, dtype=torch.bfloat16)
    theirs = run(module_by_module(model), x, upstream, dtype=torch.bfloat16)
    size = sizes(model, x, upstream)
    for a, b, scale in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (size[0], *size[1]), strict=True):
        assert a.dtype == b.dtype
        assert ((a.double() - b.double()).abs() <= 14 * 2**-8 * scale).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, seed):
    model = random_lora(Mlp().double(), lora_dropout=0.3)
    x, upstream = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    torch.manual_seed(seed)
    expected = run(model, x, upstream)
    again = copy.deepcopy(model)
    inner = again.get_base_model()
    forward = inner.forward
    inner.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    torch.manual_seed(seed)
    assert_results_close(run(again, x, upstream), expected, 1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_a_language_model(use_reentrant):
    base = tiny_llama()
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model = random_lora(base, targets=["q_proj", "v_proj", "gate_proj"]).train()
    ids = torch.randint(50, (2, 9))

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    with_checkpoints = gradients()
    base.gradient_checkpointing_disable()
    for key, gradient in gradients().items():
        torch.testing.assert_close(with_checkpoints[key], gradient)


def tiny_llama(**kw) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **kw))


compilers = ["eager", "aot_eager", "inductor"]
if not any(map(shutil.which, ("gcc", "cc", "clang"))):
    compilers.remove("inductor")


@pytest.mark.parametrize("backend", compilers)
def test_compiled(backend):
    torch.compiler.reset()
    model = random_lora(Mlp().double(), lora_bias=True)
    x, upstream = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    expected = run(model, x, upstream)
    compiled = torch.compile(model, backend=backend, fullgraph=backend != "inductor")
    assert_results_close(run(compiled, x, upstream), expected, 1e-10)


# What a user or another library hangs onto the parts must be called


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer", "layer"])
@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "backward hook", "replaced forward"])
def test_hooks_and_replaced_forwards_are_called(part, kind):
    model = random_lora(Mlp().double())
    x, upstream = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    expected = run(model, x, upstream)
    layer = model.get_base_model().up
    module = {"lora_A": layer.lora_A["default"], "lora_B": layer.lora_B["default"], "base_layer": layer.base_layer}.get(
        part, layer
    )
    calls = []
    if kind == "forward hook":
        module.register_forward_hook(lambda m, args, output: calls.append(m))
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda m, args: calls.append(m))
    elif kind == "backward hook":
        module.register_full_backward_hook(lambda m, gi, go: calls.append(m))
    else:
        forward = module.forward
        module.forward = lambda *args: calls.append(module) or forward(*args)
    assert_results_close(run(model, x, upstream), expected, 1e-10)
    assert calls == [module]


def test_hook_on_all_modules_is_called(fused_calls):
    model = random_lora(Mlp())
    layer, calls = model.get_base_model().up, []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, output: calls.append(m))
    try:
        model(torch.randn(5, 6))
    finally:
        handle.remove()
    assert {layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]} <= set(calls)
    assert not fused_calls


def test_hooks_that_change_the_output_do():
    model = random_lora(Mlp())
    layer, x = model.get_base_model().up, torch.randn(5, 6)
    expected = layer.base_layer(x)
    layer.lora_B["default"].register_forward_hook(lambda m, args, output: output * 0)
    assert torch.equal(layer(x), expected)


def test_parametrised_and_subclassed_leaves_are_called(fused_calls):
    model = random_lora(Mlp().double())
    up, down, x = model.get_base_model().up, model.get_base_model().down, torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.nn.utils.parametrize.register_parametrization(up.base_layer, "weight", nn.Tanh())
        expected = up.base_layer(x) + up.delta("default", x)
        torch.testing.assert_close(up(x), expected)

        class Doubling(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        down.lora_B["default"].__class__ = Doubling
        x = torch.randn(5, 8, dtype=torch.float64)
        A, B = down.factors("default")
        torch.testing.assert_close(down(x), down.base_layer(x) + 2 * x @ A.T @ B.T * down.scaling["default"])
    assert not fused_calls


# Memory: the input of a half-precision model


class Widest(TorchDispatchMode):
    """The number of elements of the largest float32 tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("second", [False, True], ids=["1 adapter", "2 adapters"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_half_precision_input_is_never_copied_to_float32(kind, dropout, second):
    names = ["default", "second"] if second else ["default"]
    layer, shape = {"linear": (nn.Linear(8, 8), (64, 8)), "conv": (nn.Conv2d(8, 8, 1), (4, 8, 9, 9))}[kind]
    model = random_lora(nn.Sequential(layer).bfloat16(), names, targets=["0"], lora_dropout=dropout)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    with Widest() as widest:
        model(x).sum().backward()
    assert 0 < widest.largest <= 8 * 8  # the factors' gradients
    assert x.grad.dtype == torch.bfloat16


# The configuration


@pytest.mark.parametrize("method", [LoraConfig, partial(SftConfig, num_tunable_weights=20), SsfConfig])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_what_follows_a_layer_may_change_its_output_in_place(method, shape):
    """nn.ReLU(inplace=True), or Falcon, which adds attention's output to the MLP's."""
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    model = get_peft_model(base, method(target_modules=["0", "2"])).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    x, trained = torch.randn(shape, dtype=torch.float64), [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x).square().sum(), trained)
    base[1].inplace = False
    torch.testing.assert_close(found, torch.autograd.grad(model(x).square().sum(), trained))


def test_rank_and_alpha_patterns():
    base = tiny_llama()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "proj": 99},
        alpha_pattern={r".*1\.self_attn.*": 32},
    )
    with pytest.warns(PeftWarning, match=r"rank_pattern \['proj'\]"):  # the end of a name, but not a whole part of it
        model = get_peft_model(base, config)
    found = {
        key.removeprefix("base_model.model.model.layers."): (layer.r["default"], layer.lora_alpha["default"])
        for key, layer in model.named_modules()
        if hasattr(layer, "lora_alpha")
    }
    assert found == {
        "0.self_attn.q_proj": (2, 8),
        "0.self_attn.v_proj": (4, 8),
        "0.mlp.up_proj": (4, 8),
        "1.self_attn.q_proj": (2, 32),
        "1.self_attn.v_proj": (4, 32),
        "1.mlp.up_proj": (6, 8),
    }
    layer = base.model.layers[1].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (2, 16)
    assert layer.scaling["default"] == 32 / 2


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling(use_rslora):
    model = random_lora(Mlp().double(), r=4, lora_alpha=10, use_rslora=use_rslora)
    layer = model.get_base_model().up
    expected = 10 / (math.sqrt(4) if use_rslora else 4)
    assert layer.scaling["default"] == pytest.approx(expected)
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == pytest.approx(3 * expected)
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == pytest.approx(1.5 * expected)
    layer.unscale_layer(0.5)
    assert layer.scaling["default"] == pytest.approx(3 * expected)
    x = torch.randn(5, 6, dtype=torch.float64)
    A, B = layer.factors("default")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 * expected * x @ A.T @ B.T)
    layer.unscale_layer()
    assert layer.scaling["default"] == pytest.approx(expected)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_inits_start_at_the_base_model(init):
    base = nn.Sequential(nn.Linear(40, 30))
    x = torch.randn(5, 40)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(r=16, target_modules=["0"], init_lora_weights=init))
    A, B = base[0].factors("default")
    assert A.abs().sum() > 0
    if init == "orthogonal":
        assert (A.norm(dim=1) > 0).all() and (B.norm(dim=0) > 0).all()
        assert (B @ A).abs().max() < 1e-5 * B.norm() * A.norm()
        torch.testing.assert_close(model(x), expected)
    else:
        assert not B.any()
        assert torch.equal(model(x), expected)
        std = 1 / 16 if init == "gaussian" else 1 / math.sqrt(3 * 40)  # uniform in +-1/sqrt(fan in)
        assert A.std().item() == pytest.approx(std, rel=0.2)


def test_init_false_is_not_the_base_model():
    base = Mlp()
    x = torch.randn(5, 6)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize(
    ("target", "fields", "message"),
    [
        ("up", {"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank, got r=3"),
        ("conv", {"init_lora_weights": "orthogonal"}, "orthogonal' is for linear layers"),
        ("grouped", {}, r"grouped convolution \(groups=2\)"),
        ("table", {"lora_bias": True}, "lora_bias=True is for layers with a bias"),
    ],
)
def test_what_a_layer_cannot_do_is_refused_and_the_model_left_alone(target, fields, message):
    base = Mlp()
    base.conv, base.grouped, base.table = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(5, 4)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoraConfig(**{"r": 4, **fields}, target_modules=["down", target]))
    assert [name for name, _ in base.named_modules()] == names
    model = random_lora(base, targets=["down"])
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", LoraConfig(**{"r": 4, **fields}, target_modules=["down", target]))
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", set()), ("all", {"up.base_layer.bias", "down.bias", "norm.bias"}), ("lora_only", {"up.base_layer.bias"})],
)
def test_bias_modes(bias, trained, tmp_path):
    base = Mlp()
    original = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up"], bias=bias))
    flags = {key for key, p in base.named_parameters() if p.requires_grad and "lora_" not in key}
    assert flags == trained
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    x = torch.randn(5, 6)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(original, tmp_path)
    assert torch.equal(loaded(x), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    for config in (LoraConfig(r=2, target_modules=["up"], bias="all"), model.peft_config["default"]):
        if config.bias != "none":
            with pytest.raises(ValueError, match="trains the base model's biases, which adapters share"):
                model.add_adapter("second", config)


def test_adding_an_adapter_keeps_trained_biases_as_they_are():
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["up"], bias="all"))
    base = model.get_base_model()
    base.norm.bias.requires_grad_(False)  # the user's
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up"]))
    assert {key for key, p in base.named_parameters() if p.requires_grad and key.endswith("bias")} == {
        "up.base_layer.bias", "down.bias",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_lora_bias_goes_into_the_base_bias_and_back(dtype, bias):
    base = nn.Sequential(nn.Linear(6, 8, bias=bias)).to(dtype)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = random_lora(base, ["a", "b"], targets=["0"], lora_bias=True)
    x = torch.randn(5, 6, dtype=dtype)
    expected, size = model(x), sizes(model, x, torch.ones(5, 8))[0]
    model.merge_adapter()
    # Forward rounds up to ten times on the way to an entry, merging and the merged layer up to five times.
    assert ((model(x) - expected).abs() <= 8 * torch.finfo(dtype).eps * size).all()
    model.unmerge_adapter()
    plain = model.unload()
    assert plain.state_dict().keys() == before.keys()
    for key, tensor in before.items():
        if key.endswith("bias"):
            assert torch.equal(plain.state_dict()[key], tensor)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_unmerging_takes_out_what_was_merged_whatever_the_scale_is_by_then(scale):
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)).double(), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    layer = model.base_model.model[0]
    before = layer.weight.clone()
    model.merge_adapter()
    layer.set_scale("default", scale)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-7)


class ForeignLayer(nn.Module, LoraLayer):
    """As other libraries write them: nn.Module first, with a part of its own, and other names than its base's."""

    adapter_layer_names = ("lora_A", "lora_B", "foreign")
    other_param_names = ()

    def __init__(self, base_layer):
        super().__init__()
        self.part = nn.Linear(2, 2)
        LoraLayer.__init__(self, base_layer)
        self.foreign = nn.ModuleDict()


def test_layers_of_other_libraries():
    layer = ForeignLayer(nn.Linear(3, 4))
    assert isinstance(layer.part, nn.Linear) and isinstance(layer.base_layer, nn.Linear)
    assert isinstance(layer.lora_A, nn.ModuleDict) and isinstance(layer.lora_embedding_A, nn.ParameterDict)
    assert layer.r == layer.scaling == {} and layer.use_dora == {}
    layer.foreign["a"] = nn.Linear(2, 2)
    assert layer._available_adapters == {"a"}
    layer.delete_adapter("a")
    assert layer._available_adapters == set() and len(layer.foreign) == 0


def test_adapters_in_half_precision_are_put_together_in_that_of_the_input():
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False))
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=4, target_modules=["0"], init_lora_weights=False))
    layer, x = model.base_model.model[0], torch.randn(5, 8)
    layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    model.base_model.set_adapter(["default", "b"])
    delta = sum(layer.scaling[n] * layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double() for n in layer.r)
    expected = layer.base_layer.double()(x.double()) + x.double() @ delta.T
    layer.base_layer.float()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
