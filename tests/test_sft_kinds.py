"""Sparse deltas in convolutions and embeddings, and in layers that are used more than once: against torch's own layers
with the deltas in a dense weight, in float64; and that no tensor as large as the weight is made on the way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import opt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, SftConfig, get_peft_model
from peft.tuners.ops import make_op
from peft.tuners.sft import gradients, kernels
from peft.tuners.sft.structured import make_layout

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 4, 6, 8)),
    "3d": (lambda: nn.Conv3d(2, 4, 2, padding=1, bias=False), (2, 2, 3, 4, 3)),
    "patches": (lambda: nn.Conv2d(3, 5, 4, stride=4), (2, 3, 8, 12)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, padding=2), (2, 4, 7)),
    "same": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 5, 5)),
    "valid": (lambda: nn.Conv1d(3, 4, 2, padding="valid"), (2, 3, 5)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "circular": (lambda: nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"), (2, 3, 5)),
    "one image": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5)),
    "channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 5, 5)),
}
EMBEDDINGS = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "max_norm": {"max_norm": 1.5},
    "p-norm": {"max_norm": 2.0, "norm_type": 1.0, "padding_idx": -1},
    "frequency": {"scale_grad_by_freq": True, "padding_idx": 3},
    "sparse": {"sparse": True},
}
GRANULARITIES = ("element", "row", "column", "block")
WORKSPACES = pytest.mark.parametrize("workspace", [None, 1], ids=["", "small workspace"])


def make_config(how: str, **fields) -> SftConfig:
    if how == "block":
        fields.setdefault("block_size", 2)
    return SftConfig(**{"granularity": how, "target_modules": ["0"], "dtype": "auto", **fields})


def adapt(layer: nn.Module, hows=("element",), slots: int = 3, **fields) -> PeftModel:
    """The layer, in float64, as the module `0` of a model, with a trained delta of `slots` slots for each of `hows`."""
    layer = layer.double()
    nn.init.normal_(layer.weight)
    model = None
    for name, how in zip("abc", hows):
        layout = make_layout(make_op(layer), make_config(how, **fields), "0")
        config = make_config(how, **fields, num_deltas={"0": slots * (layout.size if layout else 1)})
        if model is None:
            model = get_peft_model(nn.Sequential(layer), config, name)
        else:
            model.add_adapter(name, config)
    model.set_adapter(list("abc"[: len(hows)]))
    for delta in deltas_of(model):
        nn.init.normal_(delta.values)
    return model


def base_of(model: PeftModel) -> nn.Module:
    return model.get_base_model()[0].get_base_layer()


def deltas_of(model: PeftModel) -> list:
    return [delta for _, _, delta in model.active_deltas()]


def draw(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape).double()


def dense(model: PeftModel) -> nn.Module:
    """The base layer itself, with the deltas in its weight, which trains."""
    layer = copy.deepcopy(base_of(model))
    layer.requires_grad_(False)
    flat = layer.weight.detach().clone(memory_format=torch.contiguous_format).view(-1)
    for delta in deltas_of(model):
        flat[delta.positions().flatten()] += delta.values.detach().flatten()
    layer.weight = nn.Parameter(flat.view(layer.weight.shape))
    return layer


def gradient_of(layer: nn.Module) -> torch.Tensor:
    """(n,) of its weight."""
    gradient = layer.weight.grad
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)


def assert_like_dense(model: PeftModel, x: torch.Tensor) -> None:
    """Output, gradients of the input and of the values; and that the weight is what it was."""
    reference, weight = dense(model), base_of(model).weight
    before, version = weight.detach().clone(), weight._version
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for _ in range(2)]
    expected, y = reference(leaves[0]), model(leaves[1])
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    y.backward(upstream)
    if x.is_floating_point():
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    for delta in deltas_of(model):
        torch.testing.assert_close(delta.values.grad, gradient_of(reference)[delta.positions()])
    assert torch.equal(weight, before) and weight._version == version


# ---- Convolutions ----

CONVOLUTION_CASES = [(kind, how) for kind in CONVOLUTIONS for how in GRANULARITIES if how != "block"]
convolutions = pytest.mark.parametrize(("kind", "how"), CONVOLUTION_CASES)


@convolutions
@WORKSPACES
def test_convolutions_are_the_dense_ones(kind, how, workspace, monkeypatch):
    if workspace:
        monkeypatch.setattr(gradients, "WORKSPACE_BYTES", workspace)
    make, shape = CONVOLUTIONS[kind]
    model = adapt(make(), [how], slots=1 if kind == "depthwise" else 2)
    assert kernels.is_writable(base_of(model).weight)
    monkeypatch.setattr(type(model.get_base_model()[0]), "folded", None)  # it is not called
    assert_like_dense(model, draw(shape))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("window_bytes", [1, 2**20])
def test_the_sampled_product_is_the_entries_of_the_dense_one(kind, window_bytes, monkeypatch):
    """Few entries are sampled, many are taken from row blocks."""
    make, shape = CONVOLUTIONS[kind]
    monkeypatch.setattr(gradients, "SAMPLED_CHANNELS", 1)
    monkeypatch.setattr(gradients, "SAMPLED_WINDOWS", 0.1)
    monkeypatch.setattr(gradients, "WINDOW_BYTES", window_bytes)
    sampled, real = [], gradients.ProductGradient._sampled_windows
    monkeypatch.setattr(gradients.ProductGradient, "_sampled_windows", lambda *args: sampled.append(1) or real(*args))
    model = adapt(make(), slots=2)
    assert_like_dense(model, draw(shape))
    assert sampled
    sampled.clear()
    model = adapt(make(), slots=base_of(model).weight.numel() // 2)
    assert_like_dense(model, draw(shape))
    assert not sampled


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 128, 129, 300])
@pytest.mark.parametrize("width", [7, 192, 512])  # of the latter 64 and 8 rows at a time are laid out
def test_rows_are_sampled_in_blocks(width, rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    gy, x = torch.randn(rows, width).double(), torch.randn(rows, 5).double()
    blocks = gradients.transposed_blocks(gy), gradients.transposed_blocks(x)
    assert len(blocks[0]) == len(blocks[1]) == (1 if threads == 1 or rows <= 128 else 2 if rows == 129 else 3)
    positions = torch.tensor([0, 3, 11, 34], dtype=torch.int32)
    expected = (gy.T @ x).flatten()[positions.long()]
    torch.testing.assert_close(gradients._sampled_product(*blocks, positions), expected)


@pytest.mark.parametrize("kind", ["2d", "depthwise", "one image"])
def test_adapters_of_all_granularities_in_one_convolution(kind):
    make, shape = CONVOLUTIONS[kind]
    model = adapt(make(), ["row", "element", "column"], slots=1)
    x = draw(shape)
    assert_like_dense(model, x)
    y, before = model(x), base_of(model).weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(base_of(model).weight, before)


@pytest.mark.parametrize("sampled_channels", [1, 128])
@pytest.mark.parametrize("kind", ["2d", "groups", "Embedding"])
@pytest.mark.parametrize("how", ["element", "row", "column"])
def test_a_layer_without_deltas(kind, how, sampled_channels, monkeypatch):
    """A small budget rounds down to nothing in some layers."""
    monkeypatch.setattr(gradients, "SAMPLED_CHANNELS", sampled_channels)
    make, shape = CONVOLUTIONS[kind] if kind != "Embedding" else (lambda: nn.Embedding(12, 6), None)
    model = adapt(make(), [how], slots=0)
    x = torch.randint(12, (2, 3)) if shape is None else draw(shape)
    (delta,) = deltas_of(model)
    assert_like_dense(model, x)
    delta.start_gathering()
    assert_like_dense(model, x)
    assert delta.candidates.shape == (0,) and len(delta.take_candidate_grad()) == 0


@pytest.mark.parametrize("what", ["trained", "hooked"])
def test_a_convolution_that_cannot_be_written(what):
    make, shape = CONVOLUTIONS["2d"]
    model = adapt(make(), slots=5)
    base = base_of(model)
    if what == "trained":
        base.weight.requires_grad_()
    else:
        base.register_forward_pre_hook(lambda module, args: None)
    x = draw(shape)
    assert_like_dense(model, x)
    if what == "trained":
        reference = dense(model)
        base.weight.grad = None
        reference(x).sum().backward()
        model(x).sum().backward()
        torch.testing.assert_close(base.weight.grad, reference.weight.grad)


def test_a_bias_that_trains():
    make, shape = CONVOLUTIONS["groups"]
    model = adapt(make())
    reference, x = dense(model), draw(shape)
    base_of(model).bias.requires_grad_()
    reference.bias.requires_grad_()
    for run in (reference, model):
        run(x).square().sum().backward()
    torch.testing.assert_close(base_of(model).bias.grad, reference.bias.grad)


@pytest.mark.parametrize("how", ["element", "row", "column"])
def test_a_convolution_under_autocast(how):
    model = adapt(CONVOLUTIONS["2d"][0](), [how]).float()
    reference, x = dense(model), torch.randn(CONVOLUTIONS["2d"][1])
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [run(leaf) for run, leaf in zip((reference, model), leaves)]
    assert outputs[1].dtype == torch.bfloat16
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    (delta,) = deltas_of(model)
    for ours, theirs in (
        (outputs[1], outputs[0]),
        (leaves[1].grad, leaves[0].grad),
        (delta.values.grad, gradient_of(reference)[delta.positions()]),
    ):
        assert (ours - theirs).abs().max() <= 3e-2 * theirs.abs().max()


def test_the_output_of_a_convolution_can_be_changed_in_place():
    for kind in ("2d", "one image"):
        make, shape = CONVOLUTIONS[kind]
        model = adapt(make())
        reference, x = dense(model), draw(shape)
        for run in (reference, model):
            run(x).relu_().square().sum().backward()
        (delta,) = deltas_of(model)
        torch.testing.assert_close(delta.values.grad, gradient_of(reference)[delta.positions()])


# ---- Embeddings ----


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("how", GRANULARITIES)
@pytest.mark.parametrize("shape", [(2, 7), (), (0,)], ids=str)
def test_embeddings_are_the_dense_ones(kind, how, shape):
    model = adapt(nn.Embedding(12, 6, **EMBEDDINGS[kind]), [how])
    assert_like_dense(model, torch.randint(12, shape))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_batch_in_which_most_tokens_are_padding(dtype):
    model = adapt(nn.Embedding(12, 6, padding_idx=5), ["element", "column", "block"], slots=5)
    x = torch.full((4, 9), 5, dtype=dtype)
    x[:, ::3] = torch.randint(12, (4, 3))
    assert_like_dense(model, x)
    y, before = model(x), base_of(model).weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(base_of(model).weight, before)


@pytest.mark.parametrize("settings", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_a_table_that_trains_gets_its_gradient_too(settings):
    model = adapt(nn.Embedding(12, 6, **settings), ["element"])
    base_of(model).weight.requires_grad_()
    reference, x = dense(model), torch.randint(12, (3, 5))
    for run in (reference, model):
        run(x).pow(3).sum().backward()
    torch.testing.assert_close(gradient_of(base_of(model)), gradient_of(reference))


def test_a_token_that_there_is_not():
    with pytest.raises(IndexError):
        adapt(nn.Embedding(12, 6))(torch.tensor([3, 12]))


def test_an_embedding_that_scales_its_vectors():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    model = adapt(Scaled(12, 6), ["element", "column"])
    assert_like_dense(model, torch.randint(12, (3, 5)))


# ---- What is made on the way ----


class LargestNew(TorchDispatchMode):
    """Bytes of the largest storage that is not the weight's."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.known, self.largest = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                storage = (t if t.layout == torch.strided else t.values()).untyped_storage()
                if storage.data_ptr() != self.known:
                    self.largest = max(self.largest, storage.nbytes())
        return out


LARGE = {
    "Conv2d": (lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 3, 3)),
    "grouped": (lambda: nn.Conv2d(128, 128, 3, groups=2), (1, 128, 3, 3)),
    "channels last": (lambda: nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last), (1, 64, 3, 3)),
    "Embedding": (lambda: nn.Embedding(1500, 32), (int, 4)),
}


@pytest.mark.parametrize("gathering", [False, True])
@pytest.mark.parametrize(
    ("kind", "how"), [(kind, how) for kind in LARGE for how in GRANULARITIES if how != "block" or kind == "Embedding"]
)
def test_no_tensor_of_the_size_of_the_weight_is_made(kind, how, gathering, monkeypatch):
    make, shape = LARGE[kind]
    model = adapt(make(), [how, how], slots=1, **({"block_size": 4} if how == "block" else {}))
    weight = base_of(model).weight
    size = weight.numel() * 8
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", size // 16)
    monkeypatch.setattr(gradients, "WINDOW_BYTES", size // 16)
    monkeypatch.setattr(gradients, "SAMPLED_CHANNELS", 64)
    if gathering:
        for delta in deltas_of(model):
            delta.start_gathering()
    x = torch.randint(1500, (1, 4)) if shape[0] is int else torch.randn(shape).double().requires_grad_()
    with LargestNew(weight) as new:
        model(x).square().sum().backward()
    assert all((delta.candidates is not None) is gathering for delta in deltas_of(model))
    assert all(delta.values.grad is not None for delta in deltas_of(model))
    assert 0 < new.largest <= size // 7


# ---- Gathering ----

USED_AGAIN = {
    "Linear": (lambda: nn.Linear(6, 6), (5, 6)),
    "Conv1D": (lambda: Conv1D(6, 6), (5, 6)),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (2, 4, 4, 5)),
    "Embedding": (lambda: nn.Embedding(12, 6, padding_idx=2), (int, 2, 7)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (5, 6)),
}
AGAIN_CASES = [
    (kind, how)
    for kind in USED_AGAIN
    for how in GRANULARITIES
    if how == "element" or (kind != "LayerNorm" and (kind, how) != ("Conv2d", "block"))
]


def draw_again(kind: str) -> torch.Tensor:
    shape = USED_AGAIN[kind][1]
    return torch.randint(12, shape[1:]) if shape[0] is int else torch.randn(shape).double()


def expected_gathering(model: PeftModel, runs) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of the only delta, and its gradient there, by the weight's gradient in all runs together."""
    (delta,) = deltas_of(model)
    reference = dense(model)
    for x, upstream in runs:
        reference(x).backward(upstream)
    gradient = gradient_of(reference)
    if delta.layout is not None:
        gradient = gradient[delta.positions(torch.arange(delta.choices))]
    scores = gradient.abs() if delta.layout is None else gradient.norm(dim=1)
    best = scores.topk(delta.candidate_count).indices.sort().values
    return best, gradient[best].float()


def assert_gathered(model: PeftModel, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    (delta,) = deltas_of(model)
    assert torch.equal(delta.candidates.long(), expected[0])
    torch.testing.assert_close(delta.take_candidate_grad(), expected[1])


@pytest.mark.parametrize(("kind", "how"), AGAIN_CASES)
@pytest.mark.parametrize("path", ["plain", "hooked", "small workspace"])
def test_a_layer_that_is_used_again_is_judged_by_the_sum(kind, how, path, monkeypatch):
    """Three uses in one backward pass: the candidates are those of the layer with all of it as one input."""
    if path == "small workspace":
        monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 1)
    model = adapt(USED_AGAIN[kind][0](), [how], slots=2)
    if path == "hooked":
        base_of(model).register_forward_hook(lambda module, args, output: None)
    (delta,) = deltas_of(model)
    runs = [(x, torch.randn_like(model(x))) for x in (draw_again(kind) for _ in range(3))]
    delta.start_gathering()
    expected = expected_gathering(model, runs)
    alive = model(draw_again(kind))  # in another graph
    delta.values.grad = None
    torch.autograd.backward([model(x) for x, _ in runs], [upstream for _, upstream in runs])
    assert_gathered(model, expected)
    later = [(x, torch.randn_like(model(x))) for x in (draw_again(kind), draw_again(kind))]
    for x, upstream in later:  # the candidates stay, and further passes only add to their gradient
        model(x).backward(upstream)
    reference = dense(model)
    for x, upstream in later:
        reference(x).backward(upstream)
    assert_gathered(model, (expected[0], gradient_of(reference)[delta.positions(delta.candidates)].float()))
    assert alive.requires_grad


@pytest.mark.parametrize("how", ["not reentrant", "outputs without use", "autograd.grad", "chained", "retained"])
def test_uses_are_counted_as_the_backward_pass_goes(how):
    model = adapt(nn.Linear(6, 6), slots=6)
    (delta,) = deltas_of(model)
    x = torch.randn(5, 6).double().requires_grad_()

    def twice(layer):
        if how == "chained":
            return lambda x: layer(torch.tanh(layer(x)))
        return lambda x: layer(x) * layer(2 * x)

    delta.start_gathering()
    reference = dense(model)
    twice(reference)(x).square().sum().backward()
    gradient = gradient_of(reference)
    expected = gradient.abs().topk(6).indices.sort().values
    if how == "not reentrant":
        checkpoint(twice(model), x, use_reentrant=False).square().sum().backward()
    elif how == "outputs without use":
        unused = [model(x) for _ in range(2)]
        twice(model)(x).square().sum().backward()
        assert len(unused) == 2
    elif how == "autograd.grad":
        unused = model(x)
        torch.autograd.grad(twice(model)(x).square().sum(), delta.values)
        del unused
    elif how == "retained":
        loss = twice(model)(x).square().sum()
        loss.backward(retain_graph=True)
        assert_gathered(model, (expected, gradient[expected].float()))
        loss.backward()
    else:
        twice(model)(x).square().sum().backward()
    assert_gathered(model, (expected, gradient[expected].float()))


def test_a_backward_pass_that_failed_is_no_obstacle():
    model = adapt(nn.Linear(6, 6), slots=6)
    (delta,) = deltas_of(model)
    delta.start_gathering()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory")

    x = torch.randn(5, 6).double()
    with pytest.raises(RuntimeError, match="out of memory"):
        model(Broken.apply(model(x))).sum().backward()
    assert delta.candidates is None
    delta.start_gathering()  # as the selector does with an update that does not count
    upstream = torch.randn(5, 6).double()
    expected = expected_gathering(model, [(x, upstream)])
    model(x).backward(upstream)
    assert_gathered(model, expected)


def test_a_model_can_be_copied_while_it_waits_for_its_candidates():
    model = adapt(nn.Linear(6, 6))
    (delta,) = deltas_of(model)
    delta.start_gathering()
    x = torch.randn(5, 6).double()
    y = model(x)
    for other in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert other.is_gathering and other.candidates is None
    y.sum().backward()
    assert delta.candidates is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_embedding_gathers(backend):
    plain = adapt(nn.Embedding(12, 6), ["element"])
    other, x = copy.deepcopy(plain), torch.randint(12, (3, 5))
    torch.compiler.reset()
    run = torch.compile(other, backend=backend)
    for model in (plain, other):
        deltas_of(model)[0].start_gathering()
    for _ in range(2):
        plain(x).pow(3).sum().backward()
        run(x).pow(3).sum().backward()
        ours, theirs = deltas_of(other)[0], deltas_of(plain)[0]
        assert torch.equal(ours.candidates, theirs.candidates)
        torch.testing.assert_close(ours.candidate_grad, theirs.candidate_grad)
        torch.testing.assert_close(ours.values.grad, theirs.values.grad)


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_positions_that_are_counted_from_a_mask(granularity):
    """OPT's embedding takes the attention mask; which rows are looked up only its own forward knows."""
    base = opt()
    table = base.model.decoder.embed_positions.weight.detach().clone()
    config = SftConfig(target_modules=["embed_positions"], num_tunable_weights=272, granularity=granularity)
    model = get_peft_model(base, config)
    ((_, _, delta),) = model.active_deltas()
    torch.nn.init.normal_(delta.values)
    positions = model.get_base_model().model.decoder.embed_positions
    table = table + positions.delta_weight("default").detach().T
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    rows = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]])
    y = positions(mask)
    assert torch.allclose(y, table[rows])
    assert torch.allclose(positions(mask, 3), table[torch.tensor([[4], [5]])])
    gy = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, delta.values, gy)
    dense = torch.zeros_like(table).index_put_((rows,), gy, accumulate=True)
    assert torch.allclose(gradient.flatten(), dense.flatten()[delta.positions().flatten()], atol=1e-6)
