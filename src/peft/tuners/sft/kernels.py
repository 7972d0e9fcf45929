"""Products with `W + delta`, the delta sparse, without a dense copy of the weight.

`sparse_linear` writes the delta into the frozen weight for the duration of one matrix product and puts the base
numbers back, so that outside the product the weight is the base weight, bit for bit. `sparse_product` leaves the
weight alone and multiplies by the sparse delta alone. `add` is the plain dense formulation, for everything that is not
a matrix product. `sparse_linear` and `add` take structured deltas too (`structured`).

Gradients of the values are the entries of the weight's gradient at the delta's positions. Where torch has a sampled
dense-dense product (on the CPU, in float32 and float64) only they are computed. Elsewhere, and where a reselection has
to see the whole gradient to choose its candidates, it is formed in row blocks of at most `WORKSPACE_BYTES`, never as
a whole.

Letters: N rows of the input, I in, O out, k trained numbers; the weight is stored (O, I), or (I, O) if `transposed`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Sequence

import torch

from ..ops import linear
from ..recompute import keep

WORKSPACE_BYTES = 64 * 2**20
# Up to this share of a weight the sampled product beats the dense one: at 1.3 % of 1536 x 576 with 512 rows it takes
# 0.8 ms against 10 (one core), and it grows with the share.
SAMPLED_DENSITY = 0.1
# Two threads in one module would each take the other's sum for the base number.
_writing = threading.Lock()


@contextlib.contextmanager
def _written(weight: torch.Tensor, transposed: bool, deltas, values, indices):
    """While this lasts the weight has the deltas in it; on leaving it is what it was, bit for bit.

    Written through `.data`, whose version counter is its own: autograd graphs that saved the weight stay valid.
    """
    W, flat = weight.data.T if transposed else weight.data, weight.data.view(-1)
    base: list[torch.Tensor] = []
    with _writing:
        try:
            for delta, v, i in zip(deltas, values, indices):
                base.append(flat.index_select(0, i) if delta.layout is None else delta.layout.read(W, i))
                _write(delta, W, flat, i, wide_sum(base[-1], v))
            yield
        finally:
            for delta, numbers, i in reversed(list(zip(deltas, base, indices))):
                _write(delta, W, flat, i, numbers)


def _write(delta, W: torch.Tensor, flat: torch.Tensor, indices: torch.Tensor, numbers: torch.Tensor) -> None:
    """Put numbers into the slots of a weight, given as (O, I) and as stored (n,)."""
    if delta.layout is None:
        flat.scatter_(0, indices.long(), numbers)
    else:
        delta.layout.write(W, indices, numbers)


def wide_sum(base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`base + values`, added in the wider of their types and rounded once."""
    wide = torch.promote_types(base.dtype, values.dtype)
    return (base.to(wide) + values.to(wide)).to(base.dtype)


class Candidates:
    """Running choice of the positions of largest absolute gradient, `candidate_count` of them, for one delta."""

    def __init__(self, delta):
        self.delta = delta
        self.size = torch.empty(0, device=delta.indices.device)
        self.position = torch.empty(0, dtype=torch.int64, device=delta.indices.device)

    def see(self, gradient: torch.Tensor, start: int) -> None:
        """Take in this process's dense gradient (n,) from flat position `start` on."""
        ranks = self.delta.ranks
        self.see_sum(gradient if ranks is None else ranks.sum(self.delta, gradient.float(), start), start)

    def see_sum(self, gradient: torch.Tensor, start: int) -> None:
        """Take in the gradient (n,) of the positions from `start` on, summed over all processes."""
        k = self.delta.candidate_count
        size, position = gradient.abs().topk(min(k, gradient.numel()))
        size, position = torch.cat([self.size, size]), torch.cat([self.position, position + start])
        self.size, best = size.topk(min(k, size.numel()))
        self.position = position[best]

    def choose(self) -> None:
        """All has been seen: the delta gets its candidates."""
        self.delta.candidates = self.position.sort().values.to(self.delta.indices.dtype)


def new_candidates(deltas) -> list:
    """What will choose the candidates of those gathering deltas that have none; a backward pass has come to them."""
    for delta in deltas:
        if delta.is_gathering and delta.ranks is not None:
            delta.ranks.enter(delta)
    return [d.new_candidates() for d in deltas if d.is_gathering and d.candidates is None]


def _gather(delta, rows: int, width: int, dense: Callable, at: Callable) -> None:
    """Let a gathering delta see the gradient of one backward pass, which is a matrix (rows, width).

    Args:
        dense: `(start, stop)` -> (stop - start, width), those rows of it.
        at: slots (m,) -> (m,) or (m, s), the gradient there.
    """
    align = 1 if delta.layout is None else delta.layout.align
    for candidates in new_candidates([delta]):
        step = WORKSPACE_BYTES // (width * torch.promote_types(delta.values.dtype, torch.float32).itemsize)
        step = max(align, step // align * align)
        for start in range(0, rows, step):
            candidates.see(dense(start, min(start + step, rows)).flatten(), start * width)
        candidates.choose()
    if delta.is_gathering:
        delta.observe(at(delta.candidates))


def gather_product(delta, gy: torch.Tensor, x: torch.Tensor) -> None:
    """`_gather` for a structured delta where the weight's gradient is `gy^T x`; gy (N, O), x (N, I)."""
    layout = delta.layout
    _gather(
        delta,
        layout.out_features,
        layout.in_features,
        lambda start, stop: gy[:, start:stop].T @ x,
        lambda groups: layout.gradient(gy, layout.inputs(x, groups), groups),
    )


class _Factor:
    """One of the two factors of a weight's gradient: (N, C), and on demand (C, N) in memory too."""

    def __init__(self, rows: Callable[[], torch.Tensor], columns: Callable[[], torch.Tensor] | None = None):
        self._rows, self._columns = rows, columns

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        return self._rows()

    @functools.cached_property
    def columns(self) -> torch.Tensor:
        # Not a function made beforehand, which would hold `self`: such a cycle keeps the tensors until Python collects.
        return self._columns() if self._columns else transposed_rows(self.rows)


def transposed_rows(t: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (C, N), contiguous."""
    return t.reshape(-1, t.shape[-1]).T.contiguous()


def _weight_gradient(left: _Factor, right: _Factor, deltas, indices) -> list[torch.Tensor]:
    """Entries of `left^T right` (R, C) at sorted flat `indices`; left (N, R), right (N, C).

    Gathering deltas observe the same gradient.
    """
    new = new_candidates(deltas)
    old = [d for d in deltas if d.is_gathering and d.candidates is not None]
    samples = _entries(left, right, [*indices, *(d.candidates for d in old)], deltas[0].shape, new)
    for delta, sample in zip(old, samples[len(indices) :]):
        delta.observe(sample)
    for candidates in new:
        candidates.choose()
        delta = candidates.delta
        delta.observe(*_entries(left, right, [delta.candidates], delta.shape))
    return samples[: len(indices)]


def _entries(
    left: _Factor, right: _Factor, wanted: Sequence[torch.Tensor], shape, watchers: Sequence[Candidates] = ()
) -> list[torch.Tensor]:
    """Entries of `left^T right` (of `shape`) at the sorted flat positions `wanted`; `watchers` see all of it."""
    few = all(positions.numel() <= SAMPLED_DENSITY * math.prod(shape) for positions in wanted)
    if few and not watchers and _can_sample(left.rows):
        return [_sampled_product(left.columns, right.columns, positions) for positions in wanted]
    return _from_blocks(left.rows, right.rows, wanted, watchers)


def _can_sample(left: torch.Tensor) -> bool:
    return (
        left.device.type == "cpu" and left.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()
    )


def _sampled_product(left: torch.Tensor, right: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Entries of `left right^T` (R, C): k dot products of length N, left (R, N), right (C, N).

    One product with a sparse pattern for its result; with both factors in this layout torch makes no copies of them.
    """
    rows, columns = left.shape[0], right.shape[0]
    edges = torch.arange(rows + 1, dtype=positions.dtype) * columns
    starts = torch.searchsorted(positions, edges, out_int32=True)
    zeros = torch.zeros(positions.numel(), dtype=left.dtype)
    pattern = _csr(starts, (positions % columns).int(), zeros, (rows, columns))
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0).values()


def _csr(starts, columns, values, shape) -> torch.Tensor:
    _silence_beta_warning()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@functools.cache
def _silence_beta_warning() -> None:
    """torch warns once per process that compressed sparse tensors are in beta; the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _from_blocks(left, right, wanted: Sequence[torch.Tensor], watchers: Sequence[Candidates]) -> list[torch.Tensor]:
    rows, columns = left.shape[1], right.shape[1]
    step = max(1, WORKSPACE_BYTES // (columns * left.element_size()))
    starts = list(range(0, rows, step))
    edges = torch.tensor([*starts, rows], device=left.device) * columns
    bounds = [torch.searchsorted(positions.long(), edges).tolist() for positions in wanted]
    parts: list[list[torch.Tensor]] = [[] for _ in wanted]
    for n, start in enumerate(starts):
        block = (left[:, start : start + step].T @ right).view(-1)
        for part, positions, bound in zip(parts, wanted, bounds):
            part.append(block[positions[bound[n] : bound[n + 1]] - start * columns])
        for candidates in watchers:
            candidates.see(block, start * columns)
    return [torch.cat(part) for part in parts]


class _Linear(torch.autograd.Function):
    """`x (..., I), weight, bias, transposed, deltas, dtype, *values, *indices -> (..., O)`."""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, deltas, dtype, *values_and_indices):
        n = len(deltas)
        values, indices = values_and_indices[:n], values_and_indices[n:]
        with _written(weight, transposed, deltas, values, indices), torch.autocast(x.device.type, enabled=False):
            W = weight.data.to(dtype)
            y = linear(x, W.T if transposed else W, None if bias is None else bias.to(dtype))
        ctx.trained = any(ctx.needs_input_grad[6 : 6 + n])
        ctx.recipe, kept = None, []
        if ctx.trained and any(d.layout is None or d.layout.needs_input or d.is_gathering for d in deltas):
            kept, ctx.recipe = keep(x)
        elif ctx.trained:
            rows = x.reshape(-1, x.shape[-1])
            kept = [d.layout.inputs(rows, i) for d, i in zip(deltas, indices)]
        ctx.save_for_backward(weight, *values_and_indices, *kept)
        ctx.transposed, ctx.deltas = transposed, deltas
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        n = len(ctx.deltas)
        weight, *rest = ctx.saved_tensors
        values, indices, kept = rest[:n], rest[n : 2 * n], rest[2 * n :]
        gx = gb = None
        grads: list[torch.Tensor | None] = [None] * n
        with torch.autocast(gy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                with _written(weight, ctx.transposed, ctx.deltas, values, indices):
                    W = weight.data.to(gy.dtype)
                    gx = gy @ (W.T if ctx.transposed else W)
            g = gy.reshape(-1, gy.shape[-1])
            if ctx.needs_input_grad[2]:
                gb = g.sum(0).to(ctx.bias_dtype)
            if ctx.trained:
                of = _gradients if ctx.deltas[0].layout is None else _structured_gradients
                grads = [grad.to(v.dtype) for grad, v in zip(of(ctx, g, kept, indices), values)]
        return gx, None, gb, None, None, None, *grads, *([None] * n)


def _gradients(ctx, g: torch.Tensor, kept, indices) -> list[torch.Tensor]:
    """Gradients of the values of single weights in `_Linear`; g (N, O)."""
    x = _Factor(
        lambda: ctx.recipe(kept).reshape(-1, kept[0].shape[-1]),
        lambda: ctx.recipe(kept, transposed_rows),
    )
    g = _Factor(lambda g=g: g)
    return _weight_gradient(*((x, g) if ctx.transposed else (g, x)), ctx.deltas, indices)


def _structured_gradients(ctx, g: torch.Tensor, kept, indices) -> list[torch.Tensor]:
    """Gradients of the values of structured deltas in `_Linear`; g (N, O)."""
    if ctx.recipe is not None:
        x = ctx.recipe(kept)
        x = x.reshape(-1, x.shape[-1])
        kept = [delta.layout.inputs(x, i) for delta, i in zip(ctx.deltas, indices)]
        for delta in ctx.deltas:
            gather_product(delta, g, x)
    return [delta.layout.gradient(g, inputs, i) for delta, inputs, i in zip(ctx.deltas, kept, indices)]


def sparse_linear(x: torch.Tensor, weight, bias, deltas, transposed: bool) -> torch.Tensor:
    """The linear layer with the deltas added to its weight.

    Args:
        x: (..., I).
        weight: (O, I), or (I, O) if `transposed`; frozen.
        bias: (O,) or None.
        deltas: the `SparseDelta`s, in order; all of single weights, or all structured.

    Returns:
        (..., O), in autocast's dtype under autocast.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    values, indices = [d.values for d in deltas], [d.indices for d in deltas]
    x = x.to(dtype) if autocast else x
    return _Linear.apply(x, weight, bias, transposed, deltas, dtype, *values, *indices)


class _SparseProduct(torch.autograd.Function):
    """`x (N, I), values, indices, transposed, delta -> (N, O)`, by a sparse matrix in float32 or wider."""

    @staticmethod
    def forward(ctx, x, values, indices, transposed, delta):
        ctx.save_for_backward(x, values, indices)
        ctx.transposed, ctx.delta = transposed, delta
        return _multiply(x, values, indices, delta.shape, transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        x, values, indices = ctx.saved_tensors
        gx = gv = None
        with torch.autocast(gy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                gx = _multiply(gy, values, indices, ctx.delta.shape, not ctx.transposed)
            if ctx.needs_input_grad[1]:
                left, right = (_Factor(lambda t=t: t) for t in ((x, gy) if ctx.transposed else (gy, x)))
                gv = _weight_gradient(left, right, [ctx.delta], [indices])[0].to(values.dtype)
        return gx, gv, None, None, None


def _multiply(x, values, indices, shape, transposed):
    """`x D^T` for the sparse D of `shape`, `x D` if `transposed`."""
    wide = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    position = indices.long()
    row, column = position // shape[1], position % shape[1]
    if transposed:
        row, column, shape = column, row, (shape[1], shape[0])
    sparse = torch.sparse_coo_tensor(torch.stack([row, column]), values.to(wide), tuple(shape), check_invariants=False)
    return torch.sparse.mm(sparse, x.to(wide).T).T.to(x.dtype)


def sparse_product(x: torch.Tensor, delta, transposed: bool) -> torch.Tensor:
    """`x` (..., I) times the delta alone, (..., O), in the dtype of `x`."""
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y = _SparseProduct.apply(rows, delta.values, delta.indices, transposed, delta)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat, values, indices, delta):
        ctx.save_for_backward(indices)
        ctx.delta, ctx.dtype = delta, values.dtype
        return added(flat, values.flatten(), delta.positions(indices).flatten())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (indices,) = ctx.saved_tensors
        delta = ctx.delta
        # As groups are numbered, or as positions are: (O, I * K), or the weight as it is stored.
        is_turned = delta.layout is not None and delta.layout.transposed
        matrix = gradient.view(delta.shape).T if is_turned else gradient.view(delta.shape[0], -1)
        at = lambda slots: gradient[delta.positions(slots)]  # noqa: E731
        _gather(delta, *matrix.shape, lambda start, stop: matrix[start:stop], at)
        return gradient if ctx.needs_input_grad[0] else None, at(indices).to(ctx.dtype), None, None


def added(flat: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A copy of `flat` (n,) with values (k,) added at the positions `indices` (k,)."""
    position = indices.long()
    return flat.index_copy(0, position, wide_sum(flat[position], values))


def add(flat: torch.Tensor, delta) -> torch.Tensor:
    """A copy of the flattened weight (n,) with the delta added, differentiable."""
    return _Add.apply(flat, delta.values, delta.indices, delta)
