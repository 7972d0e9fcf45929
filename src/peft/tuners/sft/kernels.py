"""What a layer computes with `W + delta`, the delta sparse, without a dense copy of the weight.

`written_product` (linear layers, convolutions) writes the delta into the frozen weight for the duration of one product
and puts the base numbers back, so that outside the product the weight is the base weight, bit for bit. `lookup`
(embeddings) adds to the vectors that a batch looks up what the delta has in them. `sparse_product` leaves a linear
layer's weight alone and multiplies by the sparse delta alone. `add` is the plain dense formulation, for everything
else. All but `sparse_product` take structured deltas too (`structured`).

Gradients of the values are the entries of the weight's gradient at the delta's positions: see `gradients`.

Letters: N rows of the input, I in, O out, T tokens, E width of an embedding, k trained numbers; a linear layer's weight
is stored (O, I), or (I, O) if `transposed`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...utils.autocast import no_autocast
from ..recompute import keep
from .gradients import (
    LookupGradient,
    ProductGradient,
    WholeGradient,
    can_compress,
    compressed,
    expect,
    gradients_of,
    touched,
)

if TYPE_CHECKING:
    from ..ops import ConvOp, EmbeddingOp, LinearOp

# Two threads in one module would each take the other's sum for the base number. (So would two processes, which no lock
# of ours keeps apart: `is_writable` refuses memory that they share.)
_writing = threading.Lock()


def is_writable(weight: torch.Tensor) -> bool:
    """Whether a delta can be written into the weight: frozen, dense in memory (channels last, too), and in memory of
    this process alone (`share_memory` shares a CPU tensor; of a GPU's `is_shared` is always true and says nothing)."""
    dense = weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()
    if not dense or weight.requires_grad or (weight.is_cpu and weight.is_shared()):
        return False
    return not weight.is_inference() or torch.is_inference_mode_enabled()


@contextlib.contextmanager
def _written(slots: Sequence[_Slots], values: Sequence[torch.Tensor]):
    """While this lasts the weight has the deltas in it; on leaving it is what it was, bit for bit."""
    base: list[torch.Tensor] = []
    with _writing:
        try:
            for slot, v in zip(slots, values):
                base.append(slot.read())
                slot.write(wide_sum(base[-1], v))
            yield
        finally:
            for slot, numbers in reversed(list(zip(slots, base))):
                slot.write(numbers)


class _Slots:
    """Where the numbers of a delta stand in a weight.

    Written through `.data`, whose version counter is its own: autograd graphs that saved the weight stay valid.

    Attributes:
        derived: what `Layout.places` made of the indices, one or two int64 for every group, or line of a block; given
            to another `_Slots` of the same weight and indices it is not computed again.
    """

    def __init__(self, weight: torch.Tensor, transposed: bool, delta, indices, derived: Sequence[torch.Tensor] = ()):
        weight = weight.data
        self.layout, self.derived = delta.layout, derived
        if delta.layout is not None and weight.is_contiguous():
            self.weight = weight.T if transposed else weight.flatten(1)
            self.places = self.derived = derived or delta.layout.places(indices)
            return
        self.layout = None
        self.weight = weight.as_strided((weight.numel(),), (1,))  # as it lies in memory
        self.places = rest = delta.positions(indices)
        if not weight.is_contiguous():
            self.places = 0
            for size, stride in zip(reversed(weight.shape), reversed(weight.stride())):
                self.places, rest = self.places + rest % size * stride, rest // size

    def read(self) -> torch.Tensor:
        """The numbers, (k,) or (g, s)."""
        if self.layout is None:
            return self.weight.index_select(0, self.places.flatten()).view(self.places.shape)
        return self.layout.read(self.weight, self.places)

    def write(self, numbers: torch.Tensor) -> None:
        if self.layout is None:
            self.weight.index_copy_(0, self.places.flatten(), numbers.flatten())
        else:
            self.layout.write(self.weight, self.places, numbers)


def _split(tensors: Sequence[torch.Tensor], *counts: int) -> list[Sequence[torch.Tensor]]:
    """The first of them, the next, ..., and those that are left."""
    edges = list(itertools.accumulate(counts, initial=0))
    return [tensors[start:stop] for start, stop in zip(edges, [*edges[1:], None])]


def wide_sum(base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`base + values`, added in the wider of their types and rounded once."""
    return (base + values).to(base.dtype)


class _WrittenProduct(torch.autograd.Function):
    """`x (framed), weight, bias, op, deltas, dtype, *values, *indices -> op.product`."""

    @staticmethod
    def forward(ctx, x, weight, bias, op, deltas, dtype, *values_and_indices):
        n = len(deltas)
        values, indices = values_and_indices[:n], values_and_indices[n:]
        slots = [_Slots(weight, op.transposed, delta, i) for delta, i in zip(deltas, indices)]
        with _written(slots, values), no_autocast(x.device.type):
            W = op.to_view(weight.data.to(dtype))
            y = op.product(x, W, None if bias is None else bias.to(dtype))
        ctx.trained = any(ctx.needs_input_grad[6 : 6 + n])
        ctx.recipe, kept = None, []
        if ctx.trained:
            expect(ctx, deltas)
            if any(d.layout is None or d.layout.needs_input or d.is_gathering for d in deltas):
                kept, ctx.recipe = keep(x)
            else:
                kept = [d.layout.inputs(op.by_channel(x), i) for d, i in zip(deltas, indices)]
        derived = [slot.derived if ctx.needs_input_grad[0] else () for slot in slots]
        ctx.derived_counts = [len(tensors) for tensors in derived]
        ctx.save_for_backward(weight, *values_and_indices, *itertools.chain(*derived), *kept)
        ctx.op, ctx.deltas, ctx.shape = op, deltas, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        op, deltas, n = ctx.op, ctx.deltas, len(ctx.deltas)
        weight, *rest = ctx.saved_tensors
        values, indices, *derived, kept = _split(rest, n, n, *ctx.derived_counts)
        gx = gb = None
        grads: list[torch.Tensor | None] = [None] * n
        with no_autocast(gy.device.type):
            if ctx.needs_input_grad[0]:
                slots = [_Slots(weight, op.transposed, *place) for place in zip(deltas, indices, derived)]
                with _written(slots, values):
                    gx = op.input_gradient(gy, ctx.shape, op.to_view(weight.data.to(gy.dtype)))
            if ctx.needs_input_grad[2]:
                gb = op.by_channel(gy).transpose(0, 1).flatten(1).sum(1).to(ctx.bias_dtype)
            if ctx.recipe is not None:
                recipe = ctx.recipe
                gradient = ProductGradient(op, gy, lambda form: recipe(kept, form))
                grads = gradients_of(ctx, gradient, deltas, indices)
            elif ctx.trained:
                g = op.by_channel(gy)
                grads = [d.layout.gradient(op, g, inputs, i) for d, inputs, i in zip(deltas, kept, indices)]
            grads = [grad if grad is None else grad.to(v.dtype) for grad, v in zip(grads, values)]
        return gx, None, gb, None, None, None, *grads, *([None] * n)


def written_product(x: torch.Tensor, op: LinearOp | ConvOp, deltas) -> torch.Tensor:
    """What a linear layer or a convolution makes of `x` with the deltas added, in order, to its weight, which
    `is_writable`; in autocast's dtype under autocast."""
    device, weight, bias = x.device.type, op.layer.weight, op.layer.bias
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    values, indices = [d.values for d in deltas], [d.indices for d in deltas]
    framed = op.framed(x.to(dtype) if autocast else x)
    y = _WrittenProduct.apply(framed, weight, bias, op, deltas, dtype, *values, *indices)
    return y if y.dim() == x.dim() else y.squeeze(0)  # one image, without a batch


def lookup(x: torch.Tensor, op: EmbeddingOp, deltas) -> torch.Tensor:
    """What an embedding gives for the tokens `x` with the deltas added to its table, of which only the vectors of these
    tokens are copied."""
    tokens, places = torch.unique(x, return_inverse=True)
    tokens = tokens.long()
    vectors = op.vectors(tokens)
    for delta in deltas:
        vectors = _Add.apply(vectors.flatten(), delta.values, delta.indices, delta, tokens).view_as(vectors)
    return op.op_on(places, tokens, vectors)


class _SparseProduct(torch.autograd.Function):
    """`x (..., I), values, indices, op, delta -> (..., O)`, by a sparse matrix in float32 or wider."""

    @staticmethod
    def forward(ctx, x, values, indices, op, delta):
        parts, ctx.recipe = keep(x) if ctx.needs_input_grad[1] else ([], None)
        ctx.save_for_backward(values, indices, *parts)
        ctx.op, ctx.delta = op, delta
        if ctx.needs_input_grad[1]:
            expect(ctx, [delta])
        return _multiply(x, values, indices, delta.shape, op.transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        values, indices, *parts = ctx.saved_tensors
        gx = gv = None
        with no_autocast(gy.device.type):
            if ctx.needs_input_grad[0]:
                gx = _multiply(gy, values, indices, ctx.delta.shape, not ctx.op.transposed)
            if ctx.needs_input_grad[1]:
                gradient = ProductGradient(ctx.op, gy, lambda form: ctx.recipe(parts, form))
                gv = gradients_of(ctx, gradient, [ctx.delta], [indices])[0].to(values.dtype)
        return gx, gv, None, None, None


def _multiply(x, values, indices, shape, transposed):
    """`x D^T` for the sparse D of `shape`, `x D` if `transposed`."""
    wide = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    columns, values = x.reshape(-1, x.shape[-1]).to(wide).T, values.to(wide)
    if can_compress(columns):
        sparse = compressed(values, indices, tuple(shape), transposed)
    else:
        position = torch.stack([indices.long() // shape[1], indices.long() % shape[1]])
        sparse = torch.sparse_coo_tensor(position, values, tuple(shape), check_invariants=False)
        sparse = sparse.T if transposed else sparse
    y = torch.sparse.mm(sparse, columns).T.to(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def sparse_product(x: torch.Tensor, delta, op: LinearOp) -> torch.Tensor:
    """`x` (..., I) times the delta alone, (..., O), in the dtype of `x`."""
    with no_autocast(x.device.type):
        return _SparseProduct.apply(x, delta.values, delta.indices, op, delta)


class _Add(torch.autograd.Function):
    """`flat, values, indices, delta, tokens -> flat` with the delta: the flattened weight (n,), or of an embedding the
    flattened vectors (T * E,) of some tokens (T,)."""

    @staticmethod
    def forward(ctx, flat, values, indices, delta, tokens):
        ctx.save_for_backward(indices, tokens)
        ctx.delta, ctx.dtype = delta, values.dtype
        if ctx.needs_input_grad[1]:
            expect(ctx, [delta])
        if tokens is None:
            return added(flat, values.flatten(), delta.positions(indices).flatten())
        numbers, places = touched(delta, indices, tokens)
        return added(flat, values.view(-1)[numbers], places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        indices, tokens = ctx.saved_tensors
        grad = None
        if ctx.needs_input_grad[1]:
            whole = WholeGradient(gradient)
            if tokens is not None:
                whole = LookupGradient(tokens, gradient.reshape(len(tokens), ctx.delta.shape[1]))
            grad = gradients_of(ctx, whole, [ctx.delta], [indices])[0].to(ctx.dtype)
        return gradient if ctx.needs_input_grad[0] else None, grad, None, None, None


def added(flat: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A copy of `flat` (n,) with values (k,) added at the positions `indices` (k,)."""
    position = indices.long()
    return flat.index_copy(0, position, wide_sum(flat[position], values))


def add(flat: torch.Tensor, delta) -> torch.Tensor:
    """A copy of the flattened weight (n,) with the delta added, differentiable."""
    return _Add.apply(flat, delta.values, delta.indices, delta, None)
