"""Sparse deltas: the kernels and what they must not disturb, gathering of candidates, budgets, files."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, SftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners import ops
from peft.tuners.sft import gradients, kernels
from peft.tuners.sft.layer import SparseDelta, random_positions
from peft.tuners.sft.model import share_out

LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (7, 6)),
    "no bias": (lambda: nn.Linear(6, 10, bias=False), (2, 3, 6)),
    "Conv1D": (lambda: Conv1D(10, 6), (2, 3, 6)),
}
OTHERS = {
    "conv": (lambda: nn.Conv2d(3, 4, 2), (2, 3, 4, 4)),
    "norm": (lambda: nn.LayerNorm(6), (7, 6)),
}
linears = pytest.mark.parametrize("kind", list(LAYERS))
PATHS = ["written", "product", "blocks", "dense"]
"""How the product is formed: in the written weight, as a sparse product beside the layer (a hook wants to see the base
layer's call), in the written weight with the gradient in row blocks, or from a folded copy of the weight."""


def adapt(layer: nn.Module, names=("a",), k: int = 20, dtype: str = "auto", overlap: bool = False) -> PeftModel:
    """The layer as the module `0` of a model, with trained deltas."""
    make = lambda: SftConfig(target_modules=["0"], num_tunable_weights=k, dtype=dtype)  # noqa: E731
    model = get_peft_model(nn.Sequential(layer), make(), names[0])
    for name in names[1:]:
        model.add_adapter(name, make())
    model.set_adapter(list(names))
    for name in names:
        delta = layer_of(model).sft_delta[name]
        nn.init.normal_(delta.values)
        if overlap:
            delta.indices.data.copy_(layer_of(model).sft_delta[names[0]].indices)
    return model


def layer_of(model: PeftModel):
    return model.get_base_model()[0]


def take(path: str, model: PeftModel, monkeypatch) -> None:
    """Make the model compute in the given way."""
    layer = layer_of(model)
    if path == "product":
        layer.base_layer.register_forward_hook(lambda module, args, output: None)
    elif path == "blocks":
        monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 2 * 8 * min(layer.base_layer.weight.shape))
    elif path == "dense":
        layer._apply_adapters = lambda names, x: layer.op.op(x, *layer.folded(names))


def dense_run(model: PeftModel, x: torch.Tensor, upstream: torch.Tensor | None = None):
    """`(output, gradient of the input, gradient of the whole weight)` in float64 with the deltas in a dense weight."""
    layer = layer_of(model)
    base = copy.deepcopy(layer.get_base_layer()).double()
    with torch.no_grad():
        for name in layer.active_adapters:
            delta = layer.sft_delta[name]
            base.weight.view(-1).index_add_(0, delta.indices.long(), delta.values.double())
    x = x.detach().double().requires_grad_()
    base.weight.requires_grad_()
    y = base(x)
    y.backward(torch.ones_like(y) if upstream is None else upstream.double())
    return y.detach(), x.grad, base.weight.grad


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max().clamp(min=1e-3)


# The products


@linears
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["b", "a"]], ids="".join)
@pytest.mark.parametrize("overlap", [False, True])
def test_all_ways_are_the_dense_product(kind, path, names, overlap, monkeypatch):
    make, shape = LAYERS[kind]
    model = adapt(make().double(), names, overlap=overlap)
    take(path, model, monkeypatch)
    layer, x = layer_of(model), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = model(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected, gx, gW = dense_run(model, x, upstream)
    assert_close(y, expected)
    assert_close(x.grad, gx)
    for name in names:
        assert_close(layer.sft_delta[name].values.grad, gW.view(-1)[layer.sft_delta[name].indices.long()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_dtypes(dtype, base_dtype):
    """The sum is formed in the wider of the two types and rounded once, to the weight's."""
    model = adapt(nn.Linear(6, 10).to(base_dtype), dtype=dtype)
    delta, layer = layer_of(model).sft_delta["a"], layer_of(model)
    assert delta.values.dtype == (base_dtype if dtype == "auto" else getattr(torch, dtype))
    x = torch.randn(7, 6, dtype=base_dtype)
    weight = layer.base_layer.weight.detach().to(torch.promote_types(base_dtype, delta.values.dtype), copy=True)
    weight.view(-1)[delta.indices.long()] += delta.values.detach()
    y = model(x)
    assert torch.equal(y, F.linear(x, weight.to(base_dtype), layer.base_layer.bias))
    y.sum().backward()
    assert delta.values.grad.dtype == delta.values.dtype


@pytest.mark.parametrize("path", ["written", "product"])
def test_autocast(path, monkeypatch):
    model = adapt(nn.Linear(6, 10))
    take(path, model, monkeypatch)
    x = torch.randn(7, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.backward(torch.ones_like(y))
    expected, gx, gW = dense_run(model, x)
    delta = layer_of(model).sft_delta["a"]
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    for ours, theirs in ((y, expected), (x.grad, gx), (delta.values.grad, gW.view(-1)[delta.indices.long()])):
        assert_close(ours, theirs, 5e-2)


def test_compiled_and_checkpointed():
    model = adapt(nn.Linear(6, 10).double())
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    expected, gx, gW = dense_run(model, x)
    delta, before = layer_of(model).sft_delta["a"], layer_of(model).base_layer.weight.detach().clone()
    torch.compiler.reset()
    runs = [torch.compile(model, backend="aot_eager")]
    runs += [lambda x, r=r: checkpoint(model, x, use_reentrant=r) for r in (False, True)]
    for run in runs:
        x.grad = delta.values.grad = None
        y = run(x)
        y.sum().backward()
        assert_close(y, expected)
        assert_close(x.grad, gx)
        assert_close(delta.values.grad, gW.view(-1)[delta.indices.long()])
        assert torch.equal(layer_of(model).base_layer.weight, before)


def test_a_trained_base_weight_gets_its_gradient_too():
    model = adapt(nn.Linear(6, 10).double())
    layer, x = layer_of(model), torch.randn(7, 6, dtype=torch.float64)
    layer.base_layer.weight.requires_grad_()
    model(x).sum().backward()
    _, _, gW = dense_run(model, x)
    assert_close(layer.base_layer.weight.grad, gW)
    assert_close(layer.sft_delta["a"].values.grad, gW.view(-1)[layer.sft_delta["a"].indices.long()])


def test_a_weight_that_is_not_contiguous():
    layer = nn.Linear(6, 10).double()
    layer.weight.data = torch.randn(6, 10, dtype=torch.float64).T
    model = adapt(layer)
    weight = layer.weight.detach().clone(memory_format=torch.contiguous_format)
    weight.view(-1)[layer_of(model).sft_delta["a"].indices.long()] += layer_of(model).sft_delta["a"].values.detach()
    x = torch.randn(7, 6, dtype=torch.float64)
    y = model(x)
    assert_close(y, F.linear(x, weight, layer.bias))
    y.sum().backward()
    model.merge_adapter()
    assert_close(model(x), y)


def test_a_layer_without_deltas():
    """A small budget rounds down to nothing in some layers."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    x = torch.randn(7, 6)
    expected = base(x)
    model = get_peft_model(base, SftConfig(num_deltas={"0": 0, "1": 5}))
    base[0].sft_delta["default"].start_gathering()
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert base[0].sft_delta["default"].values.shape == base[0].sft_delta["default"].candidates.shape == (0,)
    model.merge_and_unload()


# What nothing outside a product may see


@linears
@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids="".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_is_the_base_weight_bit_for_bit(kind, names, dtype):
    make, shape = LAYERS[kind]
    model = adapt(make().to(dtype), names, overlap=True)
    weight = layer_of(model).base_layer.weight
    weight.data.view(-1)[::3] = -0.0
    before, version, memory = weight.detach().clone(), weight._version, weight.data_ptr()
    for _ in range(3):
        model(torch.randn(shape, dtype=dtype, requires_grad=True)).sum().backward()
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
    assert weight._version == version and weight.data_ptr() == memory and weight.grad is None


class Stop(BaseException):
    """As KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("when", ["writing the second delta", "forward product", "backward product"])
def test_an_error_in_the_middle_leaves_the_weight_as_it_was(error, when, monkeypatch):
    model = adapt(nn.Linear(6, 10), ["a", "b"], overlap=True)
    weight = layer_of(model).base_layer.weight
    before = weight.detach().clone()
    x = torch.randn(7, 6, requires_grad=True)

    def fail(*args):
        raise error("in the middle")

    if when == "writing the second delta":
        real, calls = kernels.wide_sum, []

        def first_only(*args):
            calls.append(args)
            return real(*args) if len(calls) == 1 else fail()

        monkeypatch.setattr(kernels, "wide_sum", first_only)
    elif when == "forward product":
        monkeypatch.setattr(ops, "linear", fail)
    if when != "backward product":
        with pytest.raises(error, match="in the middle"):
            model(x)
    else:
        y = model(x)

        class FailingProducts(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return fail() if func is torch.ops.aten.mm.default else func(*args, **(kwargs or {}))

        with pytest.raises(error, match="in the middle"), FailingProducts():
            y.sum().backward()
    assert torch.equal(weight, before)
    monkeypatch.undo()
    model(x)  # and the lock is free


def test_another_graph_that_saved_the_weight_still_runs_backward():
    model = adapt(nn.Linear(6, 10))
    weight, x = layer_of(model).base_layer.weight, torch.randn(7, 6, requires_grad=True)
    y = F.linear(x, weight)  # saves the weight for its backward pass
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    model(x.detach()).sum().backward()
    y.sum().backward()
    assert torch.equal(x.grad, expected)


def test_threads():
    """Four threads in one layer: all get the right result, and the weight stays what it is."""
    model = adapt(nn.Linear(64, 64), k=2000)
    weight, before = layer_of(model).base_layer.weight, layer_of(model).base_layer.weight.detach().clone()
    inputs = [torch.randn(32, 64, requires_grad=True) for _ in range(4)]
    expected = []
    for x in inputs:
        y = model(x)
        expected.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    errors = []

    def work(x, y, gx):
        for _ in range(30):
            ours = model(x)
            (gradient,) = torch.autograd.grad(ours.sum(), x)
            if not (torch.equal(ours, y) and torch.equal(gradient, gx)):
                errors.append((ours - y).abs().max().item())

    threads = [threading.Thread(target=work, args=(x, *e)) for x, e in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.equal(weight, before)


class Changes(TorchDispatchMode):
    """Counts the operations after which a weight is not what it was at first."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.before, self.count = weight, weight.detach().clone(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += not torch.equal(self.weight, self.before)
        return out


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, "conv"])
def test_memory_that_processes_share_is_never_written(kind, shared):
    """Another process would see the delta in it, and take it for the base number."""
    make, shape = (LAYERS | OTHERS)[kind]
    model = adapt(make().double(), ["a", "b"], overlap=True)
    layer, x = layer_of(model), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if shared:
        model.share_memory()
    assert kernels.is_writable(layer.base_layer.weight) is not shared
    with Changes(layer.base_layer.weight) as changes:
        y = model(x)
        y.sum().backward()
    assert (changes.count > 0) is not shared  # what is this process's alone is written, so a change would be seen
    expected, gx, gW = dense_run(model, x)
    assert_close(y, expected)
    assert_close(x.grad, gx)
    for name in ("a", "b"):
        assert_close(layer.sft_delta[name].values.grad, gW.view(-1)[layer.sft_delta[name].indices.long()])


class LargestNew(TorchDispatchMode):
    """The number of elements of the largest tensor that is no view of the given one."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.memory, self.largest = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                t = t if t.layout == torch.strided else t.values()  # numel() of a sparse tensor counts its zeros
                if t.untyped_storage().data_ptr() != self.memory:
                    self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("gathering", [False, True])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_no_tensor_of_the_size_of_the_weight_is_made(kind, gathering, monkeypatch):
    n = 128
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 4 * n * n // 16)
    model = adapt(nn.Linear(n, n) if kind == "linear" else Conv1D(n, n), ["a", "b"], k=100)
    if gathering:
        layer_of(model).sft_delta["b"].start_gathering()
    x = torch.randn(8, n, requires_grad=True)
    with LargestNew(layer_of(model).base_layer.weight) as new:
        model(x).sum().backward()
    assert 0 < new.largest <= n * n // 16


# Gathering of candidates for a reselection


@pytest.mark.parametrize(
    ("kind", "path"), [*((k, p) for k in LAYERS for p in PATHS), ("conv", "dense"), ("norm", "dense")]
)
def test_candidates_are_the_positions_of_the_largest_gradient(kind, path, monkeypatch):
    make, shape = (LAYERS | OTHERS)[kind]
    k = 5 if kind == "norm" else 20
    model = adapt(make().double(), k=k)
    take(path, model, monkeypatch)
    delta = layer_of(model).sft_delta["a"]
    model(torch.randn(shape, dtype=torch.float64)).sum().backward()
    assert delta.candidates is None and delta.take_candidate_grad() is None  # not asked for

    delta.start_gathering()
    sums = 0
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64)
        y = model(x)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        gradient = dense_run(model, x, upstream)[2].view(-1)
        if step == 0:
            expected = gradient.abs().topk(k).indices.sort().values
        sums = sums + gradient[expected]
        assert torch.equal(delta.candidates, expected)
    taken = delta.take_candidate_grad()
    assert taken.dtype == torch.float32
    assert_close(taken, sums, 1e-6)
    assert delta.take_candidate_grad() is None and torch.equal(delta.candidates, expected)
    delta.stop_gathering()
    model(x).sum().backward()
    assert delta.candidates is None and delta.candidate_grad is None


def test_embedding_gathers_too():
    model = adapt(nn.Embedding(9, 4).double(), k=6)
    layer = layer_of(model)
    layer.sft_delta["a"].start_gathering()
    y = model(torch.tensor([[1, 3, 3]]))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    gradient = torch.zeros(9, 4, dtype=torch.float64)
    gradient[1], gradient[3] = upstream[0, 0], upstream[0, 1] + upstream[0, 2]
    assert torch.equal(layer.sft_delta["a"].candidates, gradient.view(-1).abs().topk(6).indices.sort().values)
    assert_close(layer.sft_delta["a"].take_candidate_grad(), gradient.view(-1)[layer.sft_delta["a"].candidates], 1e-6)


def test_adapters_gather_each_for_itself():
    model = adapt(nn.Linear(6, 10).double(), ["a", "b"])
    a, b = (layer_of(model).sft_delta[name] for name in "ab")
    b.start_gathering()
    model(torch.randn(7, 6, dtype=torch.float64)).sum().backward()
    assert a.candidates is None and b.candidates.shape == (20,)


# Positions


@pytest.mark.parametrize(
    ("n", "k"), [(1, 0), (1, 1), (10, 10), (10, 3), (1000, 10), (1000, 249), (1000, 251), (10**6, 100)]
)
def test_random_positions(n, k):
    positions = random_positions(n, k)
    assert positions.shape == (k,) and positions.dtype == torch.int64
    assert torch.equal(positions, positions.unique())  # sorted and distinct
    assert k == 0 or (positions.min() >= 0 and positions.max() < n)


@pytest.mark.parametrize("k", [5, 50])
def test_random_positions_are_uniform(k):
    counts = torch.zeros(100)
    for _ in range(400):
        counts[random_positions(100, k)] += 1
    expected = 4.0 * k
    assert (counts - expected).abs().max() < 8 * expected**0.5  # eight standard deviations


@pytest.mark.parametrize(("shape", "dtype"), [((10, 6), torch.int32), ((2**15, 2**16), torch.int64)])
def test_index_dtype(shape, dtype):
    delta = SparseDelta(torch.Size(shape), 8, torch.float32)
    assert delta.indices.dtype == dtype and not delta.indices.requires_grad
    assert delta.values.requires_grad and not delta.values.any()
    assert {name for name, _ in delta.named_parameters()} == {"values", "indices"}


def test_exchange_keeps_slots_sorted_and_says_how_they_moved():
    delta = SparseDelta(torch.Size((4, 5)), 4, torch.float32)
    delta.indices.data.copy_(torch.tensor([2, 5, 9, 15]))
    delta.values.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    source = delta.exchange(torch.tensor([0, 2]), torch.tensor([7, 1]))
    assert delta.indices.tolist() == [1, 5, 7, 15]
    assert delta.values.tolist() == [0, 2, 0, 4]
    assert source.tolist() == [-1, 1, -1, 3]


# Budgets


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def budget(model: PeftModel, name: str = "default") -> dict[str, int]:
    layers = model.get_base_model().named_modules()
    return {key: m.sft_delta[name].values.numel() for key, m in layers if hasattr(m, "sft_delta")}


def test_budgets_override_one_another_and_are_saved():
    base = llama()
    sizes = {
        key: m.weight.numel() for key, m in base.named_modules() if isinstance(m, nn.Linear) and key != "lm_head"
    }  # fmt: skip
    whole = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, SftConfig(density=0.05))
    expected = {key: int(0.05 * whole) * size // sum(sizes.values()) for key, size in sizes.items()}
    assert budget(model) == model.peft_config["default"].num_deltas == expected

    model.add_adapter("again", SftConfig(density=0.05))  # a share of the base model, not of its adapters as well
    assert budget(model, "again") == expected
    total = get_peft_model(llama(), SftConfig(density=0.05, num_tunable_weights=100))
    assert budget(total) == {key: 100 * size // sum(sizes.values()) for key, size in sizes.items()}
    exact = {"model.layers.0.mlp.up_proj": 3, "model.layers.1.self_attn.q_proj": 7}
    named = get_peft_model(llama(), SftConfig(density=0.05, num_tunable_weights=100, num_deltas=exact))
    assert budget(named) == exact


def test_a_saved_budget_is_not_derived_again(tmp_path):
    model = get_peft_model(llama(), SftConfig(density=0.05))
    model.save_pretrained(tmp_path)
    larger = llama()
    larger.extra = nn.Linear(50, 50)  # the base model has more parameters by now
    config = SftConfig.from_pretrained(tmp_path)
    assert config.num_deltas == budget(model)
    config.target_modules = sorted(config.num_deltas)
    assert budget(PeftModel.from_pretrained(larger, tmp_path, config=config)) == budget(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tunable_weights": 61}, "budget of 61 trained weights is larger than the targets, which hold 60"),
        ({"density": 1.0}, r"budget of 130 trained weights is larger than the targets, which hold 60"),
        ({"num_deltas": {"0": 61}}, r"num_deltas\['0'\] = 61 is more than the 60 weights of the layer"),
        ({"num_deltas": {"1": 1}}, r"1 names are no targets \(\['1'\]\), 1 targets have no entry \(\['0'\]\)"),
    ],
)
def test_budgets_that_do_not_fit(fields, message):
    base = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))
    base[1].bias = None
    base[1].weight = nn.Parameter(torch.zeros(6, 10))  # 60 + 10 + 60 parameters in all
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, SftConfig(target_modules=["0"], **fields))
    assert type(base[0]) is nn.Linear


def test_share_out():
    assert share_out(10, {"a": 30, "b": 60, "c": 10}) == {"a": 3, "b": 6, "c": 1}
    assert share_out(9, {"a": 30, "b": 60, "c": 10}) == {"a": 2, "b": 5, "c": 0}  # rounded down
    assert share_out(100, {"a": 30, "b": 60, "c": 10}) == {"a": 30, "b": 60, "c": 10}
    with pytest.raises(ValueError, match="101 trained weights is larger than the targets, which hold 100"):
        share_out(101, {"a": 30, "b": 60, "c": 10})
    with pytest.raises(ValueError, match="budget of 1 trained weights, .* leaves every layer with none"):
        share_out(1, {"a": 30, "b": 60, "c": 10})


def test_positions_may_move_while_merged():
    model = adapt(nn.Linear(6, 5, bias=False))
    (_, _, delta), layer = next(model.active_deltas()), layer_of(model)
    delta.values.data.normal_()
    before = layer.get_base_layer().weight.clone()
    model.merge_adapter()
    free = sorted(set(range(30)) - set(delta.indices.tolist()))[:5]
    delta.exchange(torch.arange(5), torch.tensor(free))
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_an_embedding_with_sparse_gradients_trains():
    model = adapt(nn.Embedding(7, 5, sparse=True))
    _, _, delta = next(model.active_deltas())
    nn.init.zeros_(delta.values)
    plain = nn.Embedding(7, 5, _weight=layer_of(model).get_base_layer().weight.detach().clone())
    x = torch.tensor([[1, 5, 5]])
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(delta.values.grad, plain.weight.grad.flatten()[delta.positions()].to(delta.values.dtype), 1e-6)


def test_a_packed_weight_counts_what_it_encodes():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear4bit(8, 16, bias=False), nn.Linear(16, 4)).to("cpu")
    model = get_peft_model(base, SftConfig(target_modules=["0"], density=0.25))
    _, _, delta = next(model.active_deltas())
    assert delta.values.numel() == (8 * 16 + 16 * 4 + 4) // 4
    assert model.get_nb_trainable_parameters() == (49, 8 * 16 + 16 * 4 + 4 + 49)


# Files


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.0.sft_delta"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_unsorted_files_load(index_dtype, low_cpu_mem_usage, tmp_path):
    base = nn.Linear(6, 10)
    fresh, x = nn.Sequential(copy.deepcopy(base)), torch.randn(7, 6)
    model = adapt(base)
    expected = model(x)
    model.save_pretrained(tmp_path)
    order = torch.randperm(20)

    def shuffle(tensors):
        assert tensors.keys() == {f"{KEY}.values", f"{KEY}.indices"}
        tensors[f"{KEY}.values"] = tensors[f"{KEY}.values"][order]
        tensors[f"{KEY}.indices"] = tensors[f"{KEY}.indices"][order].to(index_dtype)

    rewrite(tmp_path / "a", shuffle)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage)
    delta = layer_of(loaded).sft_delta["default"]
    assert torch.equal(delta.indices, layer_of(model).sft_delta["a"].indices) and delta.indices.dtype == torch.int32
    assert torch.equal(delta.values, layer_of(model).sft_delta["a"].values)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("left_out", ["null", "missing"])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_files_without_num_deltas_have_the_sizes(granularity, left_out, low_cpu_mem_usage, tmp_path):
    """The reference release writes none, and whoever rounds a layer's share otherwise comes to other sizes."""
    base, x = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 8)), torch.randn(7, 6)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, SftConfig(target_modules=["0", "1"], num_tunable_weights=60, granularity=granularity))
    start = budget(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    del written["num_deltas"]
    if left_out == "null":
        written["num_deltas"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    expected, dense = {}, copy.deepcopy(fresh)

    def resize(tensors):
        for name, layer in dense.named_children():
            values, indices = (f"base_model.model.{name}.sft_delta.{part}" for part in ("values", "indices"))
            slots, *rest = tensors[values].shape
            slots += 1 if name == "0" else -1
            tensors[values] = torch.randn(slots, *rest)
            tensors[indices] = torch.randperm(layer.weight.numel() if not rest else len(layer.weight))[:slots].int()
            flat = layer.weight.data.view(-1) if not rest else layer.weight.data
            flat[tensors[indices].long()] += tensors[values]
            expected[name] = tensors[values].numel()

    rewrite(tmp_path, resize)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert budget(loaded) == loaded.peft_config["default"].num_deltas == expected != start
    y = loaded(x)
    torch.testing.assert_close(y, dense(x))
    y.sum().backward()
    assert all(delta.values.grad.shape == delta.values.shape for _, _, delta in loaded.active_deltas())
    loaded.save_pretrained(tmp_path / "again")
    assert SftConfig.from_pretrained(tmp_path / "again").num_deltas == expected
    first = loaded.get_parameter(f"{KEY}.default.values")
    with pytest.raises(RuntimeError, match="size mismatch"):  # its sizes are settled now
        set_peft_model_state_dict(loaded, {f"{KEY}.values": first[1:]})


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({0: -1}, r"must be in 0..59 \(a weight of shape \(10, 6\)\), got -1.."),
        ({3: 60}, r"must be in 0..59 .*\.\.60"),
        ({0: 4, 5: 4}, "must be distinct"),
    ],
)
def test_files_with_impossible_positions(positions, message, tmp_path):
    model = adapt(nn.Linear(6, 10))
    model.save_pretrained(tmp_path)

    def spoil(tensors):
        tensors[f"{KEY}.indices"] = tensors[f"{KEY}.indices"].clone()
        for slot, position in positions.items():
            tensors[f"{KEY}.indices"][slot] = position

    rewrite(tmp_path / "a", spoil)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 10)), tmp_path / "a")


def test_active_deltas():
    model = get_peft_model(llama(), SftConfig(num_tunable_weights=90, target_modules=["q_proj", "up_proj"]), "a")
    model.add_adapter("b", SftConfig(num_tunable_weights=40, target_modules=["q_proj"]))
    found = {name: (layer, delta) for layer, name, delta in model.active_deltas()}
    assert len(found) == 4 and all(name.endswith(".sft_delta.a") for name in found)
    for name, (layer, delta) in found.items():
        assert model.get_base_model().get_submodule(name) is delta and layer.sft_delta["a"] is delta
    model.set_adapter(["a", "b"])
    assert len(list(model.active_deltas())) == 6
