"""Deltas of whole rows, columns and blocks: layouts, products, gathering, reselection, budgets, files, training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from peft import (
    PeftModel,
    SftAdamW,
    SftConfig,
    SftSelector,
    SftSM3,
    SftTrainer,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.ops import make_op
from peft.tuners.sft import gradients
from peft.tuners.sft.model import share_out
from peft.tuners.sft.structured import make_layout

LAYERS = {
    "linear": (lambda: nn.Linear(7, 10), (2, 3, 7)),
    "Conv1D": (lambda: Conv1D(10, 7), (2, 3, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, (2, 3)), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), None),
}
GRANULARITIES = ("row", "column", "block")
CASES = [(kind, how) for kind in LAYERS for how in GRANULARITIES if (kind, how) != ("conv", "block")]
LINEAR_CASES = [case for case in CASES if case[0] in ("linear", "Conv1D")]
cases = pytest.mark.parametrize(("kind", "how"), CASES)
linear_cases = pytest.mark.parametrize(("kind", "how"), LINEAR_CASES)
each = pytest.mark.parametrize("how", GRANULARITIES)
B = 2


def config(how: str, **fields) -> SftConfig:
    if how == "block":
        fields.setdefault("block_size", B)
    return SftConfig(**{"granularity": how, "target_modules": ["0"], "dtype": "auto", **fields})


def adapt(kind: str, hows=("row",), slots: int = 2, dtype=torch.float64) -> PeftModel:
    """The layer as the module `0` of a model, with one trained delta of `slots` groups per entry of `hows`."""
    layer = LAYERS[kind][0]().to(dtype)
    nn.init.normal_(layer.weight)
    model = None
    for name, how in zip("abc", hows):
        layout = make_layout(make_op(layer), config(how), "0")
        made = config(how, num_deltas={"0": slots * (layout.size if layout else 1)})
        if model is None:
            model = get_peft_model(nn.Sequential(layer), made, name)
        else:
            model.add_adapter(name, made)
        nn.init.normal_(layer_of(model).sft_delta[name].values)
    model.set_adapter(list("abc"[: len(hows)]))
    return model


def layer_of(model: PeftModel):
    return model.get_base_model()[0]


def deltas_of(model: PeftModel) -> list:
    return [delta for _, _, delta in model.active_deltas()]


def draw(kind: str, dtype=torch.float64) -> torch.Tensor:
    shape = LAYERS[kind][1]
    return torch.randint(11, (3, 4)) if shape is None else torch.randn(shape, dtype=dtype)


def hook(model: PeftModel) -> None:
    """Somebody wants to see the base layer's calls, so the delta's product has to stand beside it."""
    layer_of(model).base_layer.register_forward_hook(lambda module, args, output: None)


def groups_of(layer: nn.Module, how: str, b: int = B) -> torch.Tensor:
    """(count, s) flat positions in the stored weight of every group, in the order of the groups' numbers."""
    numbers = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    view = numbers.T if isinstance(layer, (Conv1D, nn.Embedding)) else numbers
    if how == "element":
        return numbers.view(-1, 1)
    if how == "row":
        return torch.stack([view[o].flatten() for o in range(view.shape[0])])
    if how == "column":
        return torch.stack([view[:, i].flatten() for i in range(view.shape[1])])
    rows, columns = (range(0, size - b + 1, b) for size in view.shape)
    return torch.stack([view[r : r + b, c : c + b].flatten() for r in rows for c in columns])


def dense_run(model: PeftModel, x: torch.Tensor, hows, upstream: torch.Tensor):
    """`(output, gradient of the input, gradient of the weight)` with the deltas in a dense weight."""
    base = copy.deepcopy(layer_of(model).get_base_layer())
    flat = base.weight.detach().clone().view(-1)
    for delta, how in zip(deltas_of(model), hows):
        positions = groups_of(base, how)[delta.indices.long()].view(-1)
        flat[positions] += delta.values.detach().view(-1)
    base.weight = nn.Parameter(flat.view(base.weight.shape))
    leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    y = base(leaf)
    y.backward(upstream.expand_as(y))
    return y.detach(), leaf.grad if x.is_floating_point() else None, base.weight.grad.view(-1)


# ---- Layouts ----


@cases
def test_layouts_are_the_groups(kind, how):
    layer = LAYERS[kind][0]()
    layout, groups = make_layout(make_op(layer), config(how), "0"), groups_of(layer, how)
    assert (layout.count, layout.size) == groups.shape
    some = torch.randperm(layout.count)[:3].int()
    assert torch.equal(layout.positions(some), groups[some.long()])
    assert layout.positions(some[:0]).shape == (0, layout.size)
    stored = layer.weight.shape
    rows, columns = torch.rand(stored[0]), torch.rand(math.prod(stored[1:]))
    expected = torch.outer(rows.double(), columns.double()).view(-1)[groups].sum(1)
    torch.testing.assert_close(torch.outer(*layout.factors(rows, columns)).view(-1), expected)


def test_edges_that_fill_no_tile_are_not_trained():
    layer = nn.Linear(7, 10)
    model = get_peft_model(nn.Sequential(layer), config("block", block_size=3, num_tunable_weights=6 * 9))
    (delta,) = deltas_of(model)
    rows, columns = delta.positions() // 7, delta.positions() % 7
    assert delta.slots == delta.choices == 6 and rows.max() == 8 and columns.max() == 5
    with pytest.raises(ValueError, match="budget of 63 trained weights is larger than the targets, which hold 54"):
        get_peft_model(nn.Sequential(nn.Linear(7, 10)), config("block", block_size=3, num_tunable_weights=63))


def test_a_layer_smaller_than_a_run_of_a_tile_trains_nothing():
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 8), nn.Linear(8, 8))
    model = get_peft_model(layers, config("block", block_size=8, target_modules=["0", "2"], num_tunable_weights=64))
    small, large = deltas_of(model)
    model(torch.randn(4, 2)).sum().backward()
    assert small.values.grad.shape == (0, 64) and large.values.grad.shape == (1, 64)


# ---- Products and their gradients ----


@cases
@pytest.mark.parametrize("path", ["plain", "hooked"])
def test_product_and_gradients_are_the_dense_ones(kind, how, path):
    hows = [how, how]
    model = adapt(kind, hows)
    if path == "hooked":
        hook(model)
    x = draw(kind)
    for upstream in (torch.randn_like(model(x)), torch.ones((), dtype=torch.float64)):
        expected, gx, gw = dense_run(model, x, hows, upstream)
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        y = model(leaf)
        torch.testing.assert_close(y, expected)
        y.backward(upstream.expand_as(y))
        if x.is_floating_point():
            torch.testing.assert_close(leaf.grad, gx)
        for delta in deltas_of(model):
            groups = groups_of(layer_of(model).get_base_layer(), how)[delta.indices.long()]
            torch.testing.assert_close(delta.values.grad, gw[groups])
            delta.values.grad = None


@pytest.mark.parametrize("hows", [("row", "element"), ("element", "block"), ("row", "column", "block")])
def test_adapters_of_different_granularity(hows):
    model = adapt("linear", hows)
    x, upstream = draw("linear"), torch.randn(2, 3, 10, dtype=torch.float64)
    expected, gx, gw = dense_run(model, x, hows, upstream)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(leaf.grad, gx)
    for delta, how in zip(deltas_of(model), hows):
        groups = groups_of(layer_of(model).get_base_layer(), how)[delta.indices.long()]
        torch.testing.assert_close(delta.values.grad.view(groups.shape), gw[groups])
    before = layer_of(model).get_base_layer().weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).get_base_layer().weight, before)


@each
@pytest.mark.parametrize("frozen", ["input", "values"])
def test_only_what_is_asked_for_has_a_gradient(how, frozen):
    model = adapt("linear", [how])
    (delta,) = deltas_of(model)
    x = draw("linear").requires_grad_(frozen == "values")
    delta.values.requires_grad_(frozen == "input")
    upstream = torch.randn(2, 3, 10, dtype=torch.float64)
    _, gx, gw = dense_run(model, x.detach(), [how], upstream)
    for hooked in (False, True):
        x.grad = delta.values.grad = None
        if hooked:
            hook(model)
        model(x).backward(upstream)
        if frozen == "values":
            assert delta.values.grad is None
            torch.testing.assert_close(x.grad, gx)
        else:
            assert x.grad is None
            groups = groups_of(layer_of(model).get_base_layer(), how)[delta.indices.long()]
            torch.testing.assert_close(delta.values.grad, gw[groups])


@linear_cases
def test_a_layer_without_groups(kind, how):
    model = adapt(kind, [how], slots=0)
    x = draw(kind).requires_grad_()
    for _ in range(2):
        y = model(x)
        assert torch.equal(y, layer_of(model).get_base_layer()(x))
        y.sum().backward()
        (delta,) = deltas_of(model)
        assert delta.values.grad.shape == delta.values.shape == (0, delta.slot_size)
        hook(model)


@each
@pytest.mark.parametrize("how_called", ["autocast", "checkpoint", "reentrant checkpoint"])
def test_autocast_and_checkpoints(how, how_called):
    model = adapt("linear", [how], dtype=torch.float32)
    x, upstream = draw("linear", torch.float32), torch.randn(2, 3, 10)
    expected, gx, gw = dense_run(model, x, [how], upstream)
    leaf = x.clone().requires_grad_()
    if how_called == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = model(leaf)
        assert y.dtype == torch.bfloat16
    else:
        y = checkpoint(model, leaf, use_reentrant=how_called.startswith("reentrant"))
    y.backward(upstream.to(y.dtype))
    (delta,) = deltas_of(model)
    groups = groups_of(layer_of(model).get_base_layer(), how)[delta.indices.long()]
    tolerance = 3e-2 if how_called == "autocast" else 1e-5
    for ours, theirs in ((y.float(), expected), (leaf.grad, gx), (delta.values.grad, gw[groups])):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@linear_cases
def test_compiled(kind, how):
    """By a backend that turns changes in place into copies, of the weight that a delta is written into too."""
    model, x = adapt(kind, [how]), draw(kind)
    upstream = torch.randn_like(model(x))
    expected, gx, gw = dense_run(model, x, [how], upstream)
    before, leaf = layer_of(model).base_layer.weight.detach().clone(), x.clone().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(leaf)
    y.backward(upstream)
    (delta,) = deltas_of(model)
    groups = groups_of(layer_of(model).get_base_layer(), how)[delta.indices.long()]
    torch.testing.assert_close((y, leaf.grad, delta.values.grad), (expected, gx, gw[groups]))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    assert torch.equal(layer_of(model).base_layer.weight, before)


@each
def test_beside_half_precision_small_changes_are_not_lost(how):
    """Written into a bfloat16 weight they would be rounded away: 1 + 0.001 is 1 there."""
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    model = get_peft_model(nn.Sequential(layer), config(how, density=1.0, dtype="float32"))
    (delta,) = deltas_of(model)
    assert delta.values.dtype == torch.float32
    nn.init.constant_(delta.values, 0.001)
    x = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        x[:, 0], x[:, 1] = 1, -1  # the base product is 0, so what is left of the delta shows
        x[:, 2] = 0
        delta.values.view(-1)[delta.positions().view(-1).argsort()[1::8]] = 0
    torch.testing.assert_close(model(x).float(), torch.full((3, 8), 0.001), rtol=1e-2, atol=0)
    model(x).sum().backward()
    assert delta.values.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@linear_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_the_base_weight_bit_for_bit(kind, how, dtype):
    model = adapt(kind, [how], dtype=dtype)
    weight = layer_of(model).get_base_layer().weight
    before, version = weight.detach().clone(), weight._version
    y = model(draw(kind, dtype).requires_grad_())
    assert torch.equal(weight, before)
    y.sum().backward()
    assert torch.equal(weight, before) and weight._version == version and weight.grad is None


def test_of_columns_only_their_inputs_are_kept():
    model = adapt("linear", ["column"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        model(draw("linear").requires_grad_())
    assert (6, 2) in saved and (2, 3, 7) not in saved and (6, 7) not in saved


class LargestNew(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, torch.Tensor) and out.untyped_storage().size() and out._base is None:
                own = not any(isinstance(a, torch.Tensor) and a.data_ptr() == out.data_ptr() for a in args)
                self.size = max(self.size, out.numel() if own else 0)
        return result


@each
@pytest.mark.parametrize("gathering", [False, True])
def test_no_tensor_of_the_size_of_the_weight_is_made(how, gathering, monkeypatch):
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 4 * 300)
    tiles = {"block_size": 8} if how == "block" else {}
    model = get_peft_model(nn.Sequential(nn.Linear(96, 80)), config(how, num_tunable_weights=200, **tiles))
    (delta,) = deltas_of(model)
    if gathering:
        delta.start_gathering()
    with LargestNew() as largest:
        model(torch.randn(5, 96)).sum().backward()
    assert (delta.candidates is not None) is gathering
    assert 0 < largest.size <= 768  # 8 rows of the weight, a tenth of it; the input has 480


@linear_cases
@pytest.mark.parametrize("count", [1, 2])
def test_where_a_delta_stands_is_found_once_for_forward_and_backward(kind, how, count, monkeypatch):
    model = adapt(kind, (how,) * count)
    weight = layer_of(model).base_layer.weight
    frozen = weight.clone()
    layout, found = type(deltas_of(model)[0].layout), []
    places = layout.places
    monkeypatch.setattr(layout, "places", lambda self, groups: found.append(groups) or places(self, groups))
    x = draw(kind).requires_grad_()
    y = model(x)
    assert len(found) == count
    y.square().sum().backward()
    assert len(found) == count
    assert torch.equal(weight, frozen)
    y = model(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()  # the second time through the same graph
    assert len(found) == 2 * count


@pytest.mark.parametrize(
    ("kind", "how", "turned_first"),
    [
        *((kind, how, False) for kind, how in LINEAR_CASES),  # a turned one would not be written into in forward
        *(("conv", how, first) for how in ("row", "column") for first in (False, True)),
    ],
)
def test_a_weight_that_lies_otherwise_in_backward(kind, how, turned_first):
    model, x = adapt(kind, (how,)), draw(kind).requires_grad_()
    weight, (delta,) = layer_of(model).base_layer.weight, deltas_of(model)
    model(x).square().sum().backward()
    expected, x.grad, delta.values.grad = (x.grad, delta.values.grad), None, None
    frozen = weight.data
    turned = frozen.contiguous(memory_format=torch.channels_last) if kind == "conv" else frozen.T.contiguous().T
    assert turned.stride() != frozen.stride()
    weight.data = turned if turned_first else frozen
    y = model(x)
    weight.data = frozen if turned_first else turned
    y.square().sum().backward()
    torch.testing.assert_close((x.grad, delta.values.grad), expected)
    assert torch.equal(frozen, turned)  # both as they were


# ---- Gathering ----


@cases
@pytest.mark.parametrize("path", ["plain", "hooked", "small blocks"])
def test_candidates_are_the_groups_of_largest_gradient(kind, how, path, monkeypatch):
    if path == "small blocks":
        monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 1)
    model = adapt(kind, [how])
    if path == "hooked":
        hook(model)
    (delta,) = deltas_of(model)
    delta.start_gathering()
    groups = groups_of(layer_of(model).get_base_layer(), how)
    gathered = torch.zeros(groups.shape, dtype=torch.float64)
    for n in range(3):
        x = draw(kind)
        upstream = torch.randn_like(model(x))
        model(x).backward(upstream)
        gathered += dense_run(model, x, [how], upstream)[2][groups]
        if n == 0:
            expected = gathered.norm(dim=1).topk(2).indices.sort().values
        assert torch.equal(delta.candidates, expected)
        torch.testing.assert_close(delta.candidate_grad, gathered[expected].float())
    assert delta.take_candidate_grad().shape == delta.values.shape and delta.candidate_grad is None


# ---- Reselection ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), Conv1D(6, 9)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


BETAS, LR, MOMENTUM = (0.9, 0.99), 0.05, 0.3


def make_net(how: str, algorithm: str, total: int):
    made = config(
        how,
        target_modules=["first", "second"],
        selection_algorithm=algorithm,
        density=0.4,
        reselection_steps=6,
        selection_accumulation_steps=3,
        initial_reselection_rate=0.6,
    )
    net = Net().double()
    nn.init.normal_(net.second.weight)
    model = get_peft_model(net, made)
    return (model, *drive(model, made, total))


def drive(model, made, total):
    values = [delta.values for delta in deltas_of(model)]
    if made.selection_algorithm == "sm3":
        optimizer = SftSM3(values, {d.values: d for d in deltas_of(model)}, lr=LR, momentum=MOMENTUM)
    else:
        optimizer = SftAdamW(values, lr=LR, betas=BETAS)
    return optimizer, SftSelector(model, optimizer, made, total, 1)


class Simulation:
    """Sparse fine-tuning of groups of one weight by the book: a dict from group number to its numbers and state."""

    def __init__(self, delta, groups, shape, algorithm, total):
        self.groups, self.algorithm, self.total, self.t = groups, algorithm, total, 0
        self.active = {number: self.entry() for number in delta.indices.tolist()}
        self.covers = [torch.zeros(size, dtype=torch.float64) for size in shape]
        self.candidates, self.seen = None, []

    def entry(self):
        zero = torch.zeros(self.groups.shape[1], dtype=torch.float64)
        return {"value": zero, "exp_avg": zero, "exp_avg_sq": zero, "age": zero + 1}

    def step(self, gradient):
        """Take in the dense gradient (n,) of an update step."""
        if self.algorithm == "rigl" and self.t % 6 < 3:
            norms = gradient[self.groups].norm(dim=1)
            if self.candidates is None:
                self.candidates, self.seen = norms.topk(len(self.active)).indices.tolist(), []
            self.seen.append(gradient[self.groups].float().double())
        (self.adam if self.algorithm == "rigl" else self.sm3)(gradient)
        self.t += 1
        if self.t % 6 == 3:
            self.reselect()
            self.candidates = None

    def adam(self, gradient):
        for number, e in self.active.items():
            g = gradient[self.groups[number]]
            e["exp_avg"] = BETAS[0] * e["exp_avg"] + (1 - BETAS[0]) * g
            e["exp_avg_sq"] = BETAS[1] * e["exp_avg_sq"] + (1 - BETAS[1]) * g * g
            denominator = (e["exp_avg_sq"].sqrt() + 1e-6) / (1 - BETAS[1] ** e["age"]).sqrt()
            e["value"] = e["value"] - LR * e["exp_avg"] / (1 - BETAS[0] ** e["age"]) / denominator
            e["age"] = e["age"] + 1

    def sm3(self, gradient):
        new = [cover.clone() for cover in self.covers]
        for number, e in self.active.items():
            g = gradient[self.groups[number]]
            places = self.groups[number] // len(new[1]), self.groups[number] % len(new[1])
            nu = torch.minimum(self.covers[0][places[0]], self.covers[1][places[1]]) + g * g
            for cover, place in zip(new, places):
                for position, entry in zip(place.tolist(), nu):
                    cover[position] = max(cover[position], entry)
            e["exp_avg"] = MOMENTUM * e["exp_avg"] + (1 - MOMENTUM) * g / (nu + 1e-8).sqrt()
            e["value"] = e["value"] - LR * e["exp_avg"]
        self.covers = new

    def reselect(self):
        active = self.active
        m = math.floor(len(active) * (1.0 if self.t == 3 else 0.6 * (1 - self.t / self.total)))
        dropped = sorted(active, key=lambda number: (active[number]["value"].norm().item(), number))[:m]
        if self.algorithm == "sm3":
            scores = torch.outer(*self.covers).view(-1)[self.groups].sum(1).tolist()
            pool = [number for number in range(len(self.groups)) if number not in active]
        else:
            scores = sum(self.seen).norm(dim=1).tolist()
            pool = [number for number in self.candidates if number not in active or number in dropped]
        grown = sorted(pool, key=lambda number: (-scores[number], number))[:m]
        new = [number for number in grown if number not in active]
        for number in [number for number in dropped if number not in grown][: len(new)]:
            del active[number]
        for number in new:
            active[number] = self.entry()
            if self.algorithm == "rigl":
                n, seen = len(self.seen), torch.stack(self.seen)[:, number]
                active[number]["exp_avg"] = seen.mean(0) * (1 - BETAS[0] ** n)
                active[number]["exp_avg_sq"] = (seen**2).mean(0) * (1 - BETAS[1] ** n)
                active[number]["age"] = active[number]["age"] + n


@each
@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_reselection_equals_the_simulation(how, algorithm):
    total = 24
    model, optimizer, selector = make_net(how, algorithm, total)
    layers = {name: getattr(model.get_base_model(), name) for name in ("first", "second")}
    plain = Net().double()
    for name, layer in layers.items():
        getattr(plain, name).load_state_dict(layer.get_base_layer().state_dict())
    base = {name: getattr(plain, name).weight.detach().clone() for name in layers}
    simulations = {}
    for name, layer in layers.items():
        delta, groups = layer.sft_delta["default"], groups_of(layer.get_base_layer(), how)
        simulations[name] = Simulation(delta, groups, base[name].shape, algorithm, total)
    for step in range(total):
        x, target = torch.randn(8, 7, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
        for name, simulation in simulations.items():
            flat = base[name].clone().view(-1)
            for number, entry in simulation.active.items():
                flat[simulation.groups[number]] += entry["value"]
            getattr(plain, name).weight.data = flat.view(base[name].shape)
        plain.zero_grad()
        (plain(x) - target).square().mean().backward()
        for name, simulation in simulations.items():
            simulation.step(getattr(plain, name).weight.grad.view(-1))

        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
        for name, layer in layers.items():
            delta, expected = layer.sft_delta["default"], simulations[name].active
            assert delta.indices.tolist() == sorted(expected), f"after update step {step + 1}"
            state = optimizer.state[delta.values]
            keys = {"momentum_buffer": "exp_avg"} if algorithm == "sm3" else {k: k for k in optimizer.element_state}
            ours = {"value": delta.values.detach()} | {theirs: state[key] for key, theirs in keys.items()}
            for key, tensor in ours.items():
                reference = torch.stack([expected[number][key] for number in sorted(expected)])
                torch.testing.assert_close(tensor.double(), reference, rtol=1e-4, atol=1e-6)
    assert [entry["step"] for entry in selector.history] == [3, 9, 15, 21]
    assert sum(entry["moved"] for entry in selector.history) > 0
    sizes = {name: layer.sft_delta["default"].slot_size for name, layer in layers.items()}
    for entry in selector.last_report:
        assert entry["moved"] % sizes[entry["name"].split(".")[0]] == 0


@each
@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_a_selector_resumes_bit_for_bit(how, stop, tmp_path):
    total = 14
    model, optimizer, selector = make_net(how, "rigl", total)
    start = copy.deepcopy(model)
    batches = [(torch.randn(8, 7, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)) for _ in range(total)]

    def train(model, optimizer, selector, batches):
        for x, target in batches:
            (model(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            selector.step()

    train(model, optimizer, selector, batches[:stop])
    save_file(selector.state_dict(), tmp_path / "selector.safetensors")
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "rest.pt")
    train(model, optimizer, selector, batches[stop:])

    weights, moments = torch.load(tmp_path / "rest.pt")
    start.load_state_dict(weights)
    again = drive(start, selector.config, total)
    again[0].load_state_dict(moments)
    again[1].load_state_dict(load_file(tmp_path / "selector.safetensors"))
    train(start, *again, batches[stop:])
    for ours, theirs in zip(deltas_of(start), deltas_of(model)):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.values, theirs.values)
    state = load_file(tmp_path / "selector.safetensors")
    if stop < 3 or stop == 7:
        key = next(key for key in state if key.endswith(".total"))
        state[key] = state[key].flatten()
        with pytest.raises(ValueError, match=r"\.total has shape \(\d+,\), but the delta \(\d+, \d+\)"):
            selector.load_state_dict(state)


# ---- Budget ----


def test_share_out_comes_close_to_the_total():
    sizes = {"q": 576 * 576, "k": 192 * 576, "v": 192 * 576, "up": 1536 * 576, "down": 576 * 1536}
    for slots in (
        {"q": 576, "k": 576, "v": 576, "up": 576, "down": 1536},
        {"q": 576, "k": 192, "v": 192, "up": 1536, "down": 576},
        dict.fromkeys(sizes, 256),
    ):
        for total in (1536, 5000, 20_000, 123_456):
            shares = share_out(total, sizes, slots)
            assert all(shares[key] % slots[key] == 0 and 0 <= shares[key] <= sizes[key] for key in sizes)
            assert total - max(slots.values()) < sum(shares.values()) <= total
            for key, size in sizes.items():  # no layer is more than a group away from its share
                assert abs(shares[key] - total * size / sum(sizes.values())) <= slots[key]
    assert share_out(sum(sizes.values()), sizes, slots) == sizes
    assert share_out(600, sizes, dict.fromkeys(sizes, 576)) == {"q": 0, "k": 0, "v": 0, "up": 576, "down": 0}


def test_a_budget_below_one_group_is_refused():
    with pytest.raises(ValueError, match="budget of 5 trained weights is not enough for one group .* smallest has 7"):
        get_peft_model(nn.Sequential(nn.Linear(7, 10)), config("row", num_tunable_weights=5))


@pytest.mark.parametrize(
    ("how", "k", "message"),
    [
        ("row", 10, r"num_deltas\['0'\] = 10 is no multiple of 7, the weights of one group with granularity='row'"),
        ("column", 7, r"is no multiple of 10"),
        ("block", 6, r"is no multiple of 4"),
        ("block", 64, r"num_deltas\['0'\] = 64 is more than the 60 weights of the layer"),
    ],
)
def test_num_deltas_must_be_whole_groups(how, k, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(nn.Linear(7, 10)), config(how, num_deltas={"0": k}))


def test_layers_without_such_groups_are_refused():
    with pytest.raises(ValueError, match=r"0 \(Conv2d\) is not supported by granularity='block', .*'row' or 'column'"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 2)), config("block", density=0.5))
    with pytest.raises(ValueError, match=r"0 \(LayerNorm\) is not supported by granularity='row'"):
        get_peft_model(nn.Sequential(nn.LayerNorm(6)), config("row", density=0.5))


# ---- Files ----


@cases
def test_file_round_trip(kind, how, tmp_path):
    model = adapt(kind, [how], dtype=torch.float32)
    fresh = nn.Sequential(copy.deepcopy(layer_of(model).get_base_layer()))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (delta,) = deltas_of(model)
    assert saved["base_model.model.0.sft_delta.values"].shape == (2, delta.slot_size)
    assert saved["base_model.model.0.sft_delta.indices"].dtype == torch.int32
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "a")
    made = loaded.peft_config["default"]
    assert (made.granularity, made.num_deltas) == (how, {"0": 2 * delta.slot_size})
    x = draw(kind, torch.float32)
    assert torch.equal(loaded(x), model(x))


def test_a_file_of_another_granularity_is_refused(tmp_path):
    rows = adapt("linear", ["row"], dtype=torch.float32)
    rows.save_pretrained(tmp_path)
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for how, k in (("element", 14), ("column", 20), ("block", 8)):
        other = get_peft_model(nn.Sequential(nn.Linear(7, 10)), config(how, num_deltas={"0": k}))
        with pytest.raises(RuntimeError, match=r"size mismatch.*sft_delta.values: \(2, 7\) in the file"):
            set_peft_model_state_dict(other, state)
    state["base_model.model.0.sft_delta.indices"][1] = 10
    with pytest.raises(
        ValueError, match=r"Numbers of rows must be in 0..9 \(a weight of shape \(10, 7\)\), got \d..10"
    ):
        set_peft_model_state_dict(rows, state, "a")


# ---- Training ----


def llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, attention_dropout=0.2, **shape))


@each
@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_training_with_the_trainer_and_resuming_in_a_window(how, algorithm, tmp_path):
    block = {"block_size": 4} if how == "block" else {}
    made = SftConfig(
        task_type="CAUSAL_LM",
        density=0.2,
        granularity=how,
        selection_algorithm=algorithm,
        reselection_steps=5,
        selection_accumulation_steps=3,
        **block,
    )
    rate = 0.3 if algorithm == "sm3" else 0.05
    base = llama()
    rows = torch.randint(32, (12, 6))
    answers = torch.full_like(rows, 5)  # the same after everything: learned in a few steps whatever the model is
    data = [{"input_ids": row, "labels": answer} for row, answer in zip(rows, answers)]

    def trainer(folder, **fields):
        model = get_peft_model(copy.deepcopy(base), made)
        settings = {"max_steps": 12, "learning_rate": rate, "save_steps": 7, **fields}
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        return SftTrainer(Trainer)(model=model, args=arguments, train_dataset=data)

    def loss(model) -> float:
        with torch.no_grad():
            return model.eval()(input_ids=rows, labels=answers).loss.item()

    whole = trainer("whole")
    before = loss(whole.model)
    whole.train()
    assert loss(whole.model) < 0.9 * before
    assert sum(entry["moved"] for entry in whole.sft_selector.history) > 0
    resumed = trainer("resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))  # a window is open from 5 to 8
    for (_, name, ours), theirs in zip(resumed.model.active_deltas(), deltas_of(whole.model)):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.values, theirs.values), name
