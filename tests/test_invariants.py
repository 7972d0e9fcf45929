"""What every method must satisfy, for every kind of layer (DESIGN.md): one set of tests over methods x ops x dtypes.

A new method gets a row in `METHODS` (how to configure it, which ops it has, what it does to an output according to an
independent float64 formula), a new kind of layer a row in `OPS`, both in `invariant_cases.py`; the tests are the same
for all.

Letters: N rows of a batch, O output channels, I input channels.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from invariant_cases import EVERY_BAD, METHODS, OPS, N, Net, TinyRMSNorm
from torch import nn

from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

PAIRS = [(method, op) for method, case in METHODS.items() for op in case.ops]
REFUSED = [(method, op) for method, case in METHODS.items() if not case.some_ops for op in OPS if op not in case.ops]
ON_LINEAR = [method for method, case in METHODS.items() if "linear" in case.ops]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
all_pairs = pytest.mark.parametrize(("method", "op"), PAIRS)
merging_pairs = pytest.mark.parametrize(("method", "op"), [(m, op) for m, op in PAIRS if METHODS[m].merges])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
counts = pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids=["1 adapter", "2 adapters"])


def make_base(op: str, dtype: torch.dtype) -> Net:
    base = Net(OPS[op].make)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.7)
    return base.to(dtype)


def draw_input(op: str, dtype: torch.dtype) -> torch.Tensor:
    x = OPS[op].draw()
    return x.to(dtype) if x.is_floating_point() else x


def config_for(method: str, dtype: torch.dtype = torch.float32, **kw):
    wide = METHODS[method].wide if dtype == torch.float64 else {}
    return METHODS[method].config(target_modules=["layer"], **wide, **kw)


def randomise(model: nn.Module, names: list[str], without_shift: bool = False) -> None:
    """Trained values for the adapters: 0.5 beside a zero start, so that every part of them matters."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for name in names:
                for path, parameter in layer.adapter_tensors(name):
                    if parameter.is_floating_point() and not (without_shift and path == "ssf_shift"):
                        parameter.data.add_(0.5 * torch.randn_like(parameter))


def adapt(base: nn.Module, method: str, names: list[str], dtype: torch.dtype, trained: bool = True, **kw) -> PeftModel:
    model = get_peft_model(base, config_for(method, dtype, **kw), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config_for(method, dtype, **kw))
    if trained:
        # An RMS norm has no place for a shift: what can be merged there is the scale (the refusal has its own test).
        randomise(model, names, without_shift=isinstance(base.layer.get_base_layer(), TinyRMSNorm))
    if len(names) > 1:
        activate(model, method, names)
    return model


def activate(model: PeftModel, method: str, names: list[str]) -> None:
    """All of them, or the first where each replaces the layer and the others cannot but be there."""
    if METHODS[method].combines:
        model.set_adapter(names)
        return
    with pytest.raises(ValueError, match=r"Only one adapter can replace .*, but \['a', 'b'\]"):
        model.set_adapter(names)
    model.set_adapter(names[0])


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def base_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return snapshot(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit: zeros have signs."""
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor) and torch.equal(ours[key].signbit(), tensor.signbit()), key


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, *between: torch.Tensor) -> None:
    """Relative to the largest entry, as single ones may cancel; also of what lay between and was rounded."""
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max()
    largest = max(tensor.double().abs().max() for tensor in (theirs, *between)).clamp(min=1e-3)
    assert difference <= tolerance * largest, difference.item()


def reference(method: str, op: str, model: PeftModel, name: str, x: torch.Tensor, base: dict[str, torch.Tensor]):
    """`(output, leaves)` of one adapter by the formula in float64; leaves by path, the input as `x`."""
    leaves = {}
    layer = model.get_base_model().layer
    for path, parameter in layer.adapter_tensors(name):
        value = parameter.detach().double() if parameter.is_floating_point() else parameter.detach()
        leaves[path] = value.requires_grad_(value.is_floating_point())
    leaves["x"] = x.detach().double().requires_grad_() if x.is_floating_point() else x
    W, b = base["weight"].double(), base["bias"].double() if "bias" in base else None
    return METHODS[method].formula(OPS[op], W, b, leaves, leaves["x"]), leaves


@all_pairs
@dtypes
@counts
def test_new_adapter_is_the_base_model(method, op, dtype, names):
    base = make_base(op, dtype)
    x = draw_input(op, dtype)
    expected = base(x)
    model = adapt(base, method, names, dtype, trained=False)
    assert torch.equal(model(x), expected)
    if METHODS[method].merges:
        model.merge_adapter()
        assert torch.equal(model(x), expected)


@all_pairs
@dtypes
def test_forward_is_the_formula(method, op, dtype):
    base = make_base(op, dtype)
    weights, x = base_tensors(base.layer), draw_input(op, dtype)
    model = adapt(base, method, ["a"], dtype)
    randomise(model, ["a"])
    expected, _ = reference(method, op, model, "a", x, weights)
    y = model(x)
    assert y.dtype == dtype
    assert_close(y, expected, TOLERANCE[dtype])


@merging_pairs
@dtypes
@counts
def test_merge_unmerge_and_unload(method, op, dtype, names):
    base = make_base(op, dtype)
    before, plain, x = base_tensors(base.layer), base.layer, draw_input(op, dtype)
    model = adapt(base, method, names, dtype)
    forward = model(x)
    assert_same(base_tensors(base.layer), before)

    model.merge_adapter()
    assert base.layer.merged_adapters == model.active_adapters
    merged_tensors = base_tensors(base.layer)
    assert {tensor.dtype for tensor in merged_tensors.values()} == {dtype}
    assert_close(model(x), forward, TOLERANCE[dtype])
    assert not torch.equal(base.layer.get_base_layer().weight, before["weight"])
    model.unmerge_adapter()
    after = base_tensors(base.layer)
    if METHODS[method].unmerges_exactly:
        assert_same(after, before)
        assert torch.equal(model(x), forward)
    else:
        assert after.keys() == before.keys()
        for key, tensor in after.items():
            assert_close(tensor, before[key], TOLERANCE[dtype], merged_tensors[key])

    base.layer.get_base_layer().load_state_dict(before)
    untouched = copy.deepcopy(model)
    assert untouched.unload() is untouched.base_model.model
    assert type(untouched.base_model.model.layer) is type(plain)
    assert_same(base_tensors(untouched.base_model.model.layer), before)
    merged = model.merge_and_unload()
    assert merged is base and merged.layer is plain
    assert not hasattr(merged, "peft_config")
    assert_close(merged(x), forward, TOLERANCE[dtype])


@pytest.mark.parametrize(("method", "op"), [(m, op) for m, op in PAIRS if METHODS[m].merges and METHODS[m].combines])
@dtypes
def test_one_of_two_adapters_merged(method, op, dtype):
    base = make_base(op, dtype)
    before, x = base_tensors(base.layer), draw_input(op, dtype)
    model = adapt(base, method, ["a", "b"], dtype)
    both = model(x)
    model.merge_adapter(["a"])
    assert_close(model(x), both, TOLERANCE[dtype])  # a is in the weight, b beside it
    model.merge_adapter(["b"])
    assert base.layer.merged_adapters == ["a", "b"]
    model.unmerge_adapter()
    if METHODS[method].unmerges_exactly:
        assert_same(base_tensors(base.layer), before)


@all_pairs
@dtypes
def test_disabled_is_the_base_model(method, op, dtype):
    base = make_base(op, dtype)
    x = draw_input(op, dtype)
    expected = base(x)
    model = adapt(base, method, ["a"], dtype)
    adapted = model(x)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
        with model.disable_adapter():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)


@merging_pairs
@dtypes
def test_disabled_while_merged_is_the_base_model(method, op, dtype):
    base = make_base(op, dtype)
    x = draw_input(op, dtype)
    expected = base(x)
    model = adapt(base, method, ["a"], dtype)
    model.merge_adapter()
    merged = model(x)
    with model.disable_adapter():
        inside = model(x)
    if METHODS[method].unmerges_exactly:
        assert torch.equal(inside, expected)
    else:
        assert_close(inside, expected, TOLERANCE[dtype], merged)
    assert base.layer.merged_adapters == ["a"]
    assert_close(model(x), merged, TOLERANCE[dtype])


@all_pairs
@dtypes
def test_mixed_batch_is_single_runs_row_by_row(method, op, dtype):
    base = make_base(op, dtype)
    x = draw_input(op, dtype)
    model = adapt(base, method, ["a", "b"], dtype)
    rows = ["b", "__base__", "a", "b"]
    mixed = model(x, adapter_names=rows)
    with model.disable_adapter():
        single = {"__base__": model(x)}
    for name in ("a", "b"):
        model.set_adapter(name)
        single[name] = model(x)
    assert_close(mixed, torch.stack([single[name][row] for row, name in enumerate(rows)]), TOLERANCE[dtype])
    assert not torch.equal(single["a"], single["b"])
    for name, expected in single.items():  # one adapter for all rows needs no splitting: the very same computation
        assert torch.equal(model(x, adapter_names=[name] * N), expected)


@all_pairs
@dtypes
@counts
def test_save_and_load(method, op, dtype, names, tmp_path):
    base = make_base(op, dtype)
    fresh, x = copy.deepcopy(base), draw_input(op, dtype)
    model = adapt(base, method, names, dtype)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        assert loaded.load_adapter(tmp_path / name, name) == ([], [])
    loaded.set_adapter(model.active_adapters, inference_mode=True)
    assert torch.equal(loaded(x), expected)
    for name in names:
        assert_same(
            get_peft_model_state_dict(loaded, adapter_name=name), get_peft_model_state_dict(model, adapter_name=name)
        )


@all_pairs
def test_gradients_are_those_of_the_formula(method, op):
    dtype = torch.float64
    base = make_base(op, dtype)
    weights, x = base_tensors(base.layer), draw_input(op, dtype)
    model = adapt(base, method, ["a"], dtype)
    randomise(model, ["a"])
    expected, leaves = reference(method, op, model, "a", x, weights)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    if x.is_floating_point():
        x.requires_grad_()
    y = model(x)
    assert_close(y, expected, TOLERANCE[dtype])
    y.backward(upstream)
    for path, parameter in base.layer.adapter_tensors("a"):
        if parameter.is_floating_point():
            assert parameter.dtype == dtype
            assert_close(parameter.grad, leaves[path].grad, TOLERANCE[dtype])
    if x.is_floating_point():
        assert_close(x.grad, leaves["x"].grad, TOLERANCE[dtype])
    assert all(parameter.grad is None for parameter in base.layer.get_base_layer().parameters())


@all_pairs
@dtypes
@pytest.mark.parametrize("between", ["disabled", "other rows", "other adapter", "merged and back"])
def test_backward_after_the_model_was_used_otherwise(method, op, dtype, between):
    """Forward with a, then forward of something else, then backward of the first: a's gradients (DPO does so)."""
    base = make_base(op, dtype)
    x = draw_input(op, dtype)
    model = adapt(base, method, ["a", "b"], dtype)
    model.set_adapter("a")
    parameters = [p for _, p in base.layer.adapter_tensors("a") if p.is_floating_point()]
    y = model(x)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, parameters, upstream)
    y = model(x)
    if between == "disabled":
        with model.disable_adapter(), torch.no_grad():
            model(x)
    elif between == "other rows":
        with torch.no_grad():
            model(x, adapter_names=["b", "__base__", "b", "b"])
    elif between == "other adapter":
        model.set_adapter("b")
        model(x).sum().backward()
        model.set_adapter("a")  # b's turn froze a, as in upstream; autograd asks for the flag when it gets there
    elif METHODS[method].merges:
        model.merge_adapter()
        model(x)
        model.unmerge_adapter()
    else:
        with pytest.raises(TypeError, match="cannot be merged"):
            model.merge_adapter()
    y.backward(upstream)
    for parameter, gradient in zip(parameters, expected):
        assert_close(parameter.grad, gradient, TOLERANCE[dtype] if between == "merged and back" else 0.0)


@all_pairs
def test_inference_mode_freezes(method, op, tmp_path):
    base = make_base(op, torch.float32)
    model = adapt(base, method, ["a"], torch.float32, inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        again = PeftModel.from_pretrained(make_base(op, torch.float32), tmp_path / "a", is_trainable=is_trainable)
        flags = {
            p.requires_grad for _, p in again.get_base_model().layer.adapter_tensors("default") if p.is_floating_point()
        }
        assert flags == {is_trainable}
        assert again.peft_config["default"].inference_mode is not is_trainable
    model.set_adapter("a", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@all_pairs
def test_deleting_and_adding_again_leaves_no_trace(method, op):
    base = make_base(op, torch.float32)
    x = draw_input(op, torch.float32)
    model = adapt(base, method, ["a"], torch.float32)
    model(x).sum().backward()
    keys, modules = set(model.state_dict()), {name: type(m) for name, m in model.named_modules()}
    alone, plain = model(x), vars(base.layer).keys()
    values = {attribute: dict(getattr(base.layer, attribute)) for attribute in base.layer.other_param_names}
    model.add_adapter("b", config_for(method))
    model.set_requires_grad("b", False)
    randomise(model, ["b"])
    activate(model, method, ["a", "b"])
    model.delete_adapter("b")
    assert set(model.state_dict()) == keys
    assert {name: type(m) for name, m in model.named_modules()} == modules
    assert {attribute: dict(getattr(base.layer, attribute)) for attribute in values} == values
    assert vars(base.layer).keys() == plain
    assert model.active_adapters == ["a"] and list(model.peft_config) == ["a"]
    assert torch.equal(model(x), alone)
    model.add_adapter("b", config_for(method))
    model.set_adapter("b")
    assert {p.requires_grad for _, p in base.layer.adapter_tensors("b") if p.is_floating_point()} == {True}
    with model.disable_adapter():
        expected = model(x)
    assert torch.equal(model(x), expected)  # a new adapter, not the old one


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (method, fields, text)
        for method, case in METHODS.items()
        for fields, text in (*case.bad, *EVERY_BAD)
        if all(hasattr(case.config(), field) for field in fields)
    ],
)
def test_bad_config_is_refused_with_rule_and_value(method, fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        METHODS[method].config(**fields)


@pytest.mark.parametrize(("method", "op"), REFUSED)
def test_unsupported_layer_is_refused_and_the_model_left_alone(method, op):
    base = make_base(op, torch.float32)
    base.layer, base.first = nn.Sequential(base.layer), nn.Linear(3, 3)
    base = nn.Sequential(base)
    modules = {name: type(m) for name, m in base.named_modules()}
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    kind = type(base[0].layer[0]).__name__
    config = METHODS[method].config(target_modules=["first", "layer.0"])
    with pytest.raises(ValueError, match=rf"0\.layer\.0 \({kind}\)( is|:) not supported"):
        get_peft_model(base, config)
    assert {name: type(m) for name, m in base.named_modules()} == modules
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3), nn.LSTM(4, 6), nn.BatchNorm2d(4), nn.ReLU()], ids=str)
def test_layers_of_unknown_kinds_are_refused_by_name(method, layer):
    """Alone as targets: what a method shares out over its targets (SFT its budget) comes after the check."""
    base = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ValueError, match=rf"^Target module 1 \({type(layer).__name__}\) is not supported"):
        get_peft_model(base, METHODS[method].config(target_modules=["1"]))
    assert base[1] is layer and not hasattr(base, "peft_config")


@pytest.mark.parametrize("op", ["RMSNorm", "OffsetRMSNorm"])
def test_shift_on_a_norm_without_bias_is_not_merged(op):
    base = make_base(op, torch.float32)
    before, x = base_tensors(base.layer), draw_input(op, torch.float32)
    model = adapt(base, "ssf", ["a"], torch.float32)
    randomise(model, ["a"])
    forward = model(x)
    with pytest.raises(TypeError, match="RMSNorm has no bias, so a shift cannot be merged"):
        model.merge_adapter()
    assert_same(base_tensors(base.layer), before)
    assert torch.equal(model(x), forward)


class InAndOut(BaseTunerLayer, nn.Module):
    """A method that does everything at once: `y = scale (W + D)(gain x)`, with D applied to its own, changed input."""

    adapter_layer_names = ("gain", "scale", "D")

    def update_layer(self, name, config=None):
        self.gain[name] = nn.Parameter(torch.randn(self.in_features, dtype=torch.float64))
        self.scale[name] = nn.Parameter(torch.randn(self.out_features, dtype=torch.float64))
        self.D[name] = nn.Parameter(torch.randn(self.out_features, self.in_features, dtype=torch.float64))

    def pre(self, name, x):
        return x * self.gain[name]

    def post(self, name, x, y, before=()):
        W, b = self.folded(before)
        z = self.pre(name, x)
        assert_close(y, F.linear(z, W, b), 1e-10)  # it gets the input that the adapters before it were given
        return self.scale[name] * (y + z @ self.D[name].T)

    def fold(self, name, W, b):
        scale = self.scale[name]
        return scale[:, None] * (W + self.D[name]) * self.gain[name], None if b is None else scale * b


@pytest.mark.parametrize("order", ["a", "ab", "bca"])
def test_what_methods_do_to_input_and_output_composes_as_their_weights_do(order):
    """Several methods' worth of non-commuting changes: forward equals merged, in every order of activation."""
    base = nn.Linear(6, 5).double()
    before = snapshot(base)
    layer = InAndOut(base)
    for name in "abc":
        layer.update_layer(name)
    layer.set_adapter(list(order))
    x = torch.randn(7, 6, dtype=torch.float64)
    forward = layer(x)
    assert_close(forward, F.linear(x, *layer.folded(list(order))), 1e-10)
    layer.merge()
    assert_close(layer(x), forward, 1e-10)
    layer.unmerge()
    assert_same(snapshot(base), before)
    rows = layer(x, adapter_names=["a", "b", "__base__", "c", "a", "b", "c"])
    for row, name in enumerate("ab_cabc"):
        assert_close(rows[row], F.linear(x[row], *layer.folded([name] if name != "_" else [])), 1e-10)


@pytest.fixture(scope="module")
def results_of_fresh_process(tmp_path_factory):
    """Outputs of saved adapters, of one linear layer per method, in this process and in a new one."""
    folder = tmp_path_factory.mktemp("fresh")
    here = {}
    for method in ON_LINEAR:
        base = make_base("linear", torch.float32)
        torch.save(base.state_dict(), folder / f"{method}.base")
        x = draw_input("linear", torch.float32)
        torch.save(x, folder / f"{method}.x")
        model = adapt(base, method, ["default"], torch.float32)
        here[method] = model(x).detach()
        model.save_pretrained(folder / method)
    script = f"""
import warnings
import torch
from torch import nn
from peft import PeftModel
from peft.utils.warning import PeftWarning
warnings.simplefilter("error", PeftWarning)
for method in {ON_LINEAR}:
    base = nn.Module()
    base.layer, base.other = nn.Linear(6, 5), nn.Linear(6, 5)
    base.forward = lambda x, base=base: base.layer(x)
    base.load_state_dict(torch.load(f"{{method}}.base"))
    model = PeftModel.from_pretrained(base, method)
    torch.save(model(torch.load(f"{{method}}.x")).detach(), f"{{method}}.y")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {method: (y, torch.load(folder / f"{method}.y")) for method, y in here.items()}


@pytest.mark.parametrize("method", ON_LINEAR)
def test_load_in_a_fresh_process(method, results_of_fresh_process):
    here, there = results_of_fresh_process[method]
    assert torch.equal(here, there)
