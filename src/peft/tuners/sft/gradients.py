"""The gradient of one weight in a backward pass, as far as it is needed: at the trained positions, at the candidates
for a reselection, and once per gathering window as a whole, to choose them.

It is known by what it is made of (`ProductGradient`: the factors of a matrix product or a convolution;
`LookupGradient`: the vectors of the tokens in a batch), so that a part of it can be had without the rest. Where torch
has a sampled dense-dense product (on the CPU, in float32 and float64) single entries are computed by themselves.
Elsewhere, and where candidates are chosen, it is formed in row blocks of at most `WORKSPACE_BYTES`, never as a whole.

Letters: N rows or images of a batch, O output channels, I input channels (of one group), G groups, *K kernel, *L places
in the output, k trained numbers, T tokens in a batch, E width of an embedding.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import find

if TYPE_CHECKING:
    from ..ops import ConvOp, LinearOp
    from .layer import SparseDelta

WORKSPACE_BYTES = 64 * 2**20
# Up to this share of a weight the sampled product beats the dense one: at 1.3 % of 1536 x 576 with 512 rows it takes
# 0.8 ms against 10 (one core), and it grows with the share.
SAMPLED_DENSITY = 0.1
# Of a convolution the windows have to be laid out for it, which is worth it up to this share, if each window serves as
# many output channels. A whole step at 1 %, one core, ms: 320 channels, kernel 3 x 3, 31 against 38; 512, kernel 1, 14
# against 17; 128, kernel 3 x 3, 9 against 9.
SAMPLED_WINDOWS = 0.03
SAMPLED_CHANNELS = 128
WINDOW_BYTES = 4 * 2**20  # laid out at a time: what stays in a cache
# Rows in a block of factors laid out for the sampled product. Several threads lay out blocks side by side, while torch
# transposes a whole matrix with one. One thread is faster with a single block.
SAMPLED_ROWS = 128
# A first-level cache of 64-byte lines has 64 sets (of 8 or 12 lines), so that addresses with the same remainder by this
# compete for one set. Numbers of one column, `stride` bytes apart, come into few sets where that shares large factors
# with it: then more than a few rows at a time drive each other out before all columns of a line have been read. With
# two threads 512 x 1536 take 0.20 ms a few rows at a time and 0.52 at once, 512 x 4096 0.78 and 2.15.
CACHE_PERIOD, CACHE_WAYS = 4096, 8


class WeightGradient:
    """The gradient of a weight, to be asked for parts of it."""

    dtype: torch.dtype

    def rows(self, delta: SparseDelta, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of it as a matrix: (O, I * K) for a delta of groups; as it is stored otherwise."""
        raise NotImplementedError

    def at(self, deltas: Sequence[SparseDelta], slots: Sequence[Tensor]) -> list[Tensor]:
        """What the `slots` (m,) of every delta would have as the gradient of their values, (m,) or (m, s)."""
        raise NotImplementedError


class ProductGradient(WeightGradient):
    """`gy^T x` for a linear layer, and its like for a convolution.

    Args:
        gy: gradient of the output.
        x: `x(form)` is the (framed) input, or `form` of it; None: itself.
    """

    def __init__(self, op: LinearOp | ConvOp, gy: Tensor, x: Callable[[Callable | None], Tensor]):
        self.op, self._x = op, x
        self.gy = op.by_channel(gy)  # (N, O, *L)
        self.dtype = gy.dtype

    @functools.cached_property
    def x(self) -> Tensor:
        """(N, G * I, *S)."""
        return self.op.by_channel(self._x(None))

    def rows(self, delta, start, stop):
        if delta.layout is None:
            return self._stored_rows(start, stop)
        return self.op.weight_gradient(self.gy, self.x, start, stop).flatten(1)

    def _stored_rows(self, start: int, stop: int) -> Tensor:
        if self.op.transposed:
            return self.x[:, start:stop].T @ self.gy
        return self.op.weight_gradient(self.gy, self.x, start, stop).flatten(1)

    def at(self, deltas, slots):
        entries = iter(self._entries([s for delta, s in zip(deltas, slots) if delta.layout is None], deltas[0].shape))
        return [next(entries) if delta.layout is None else self._of_groups(delta, s) for delta, s in zip(deltas, slots)]

    def _of_groups(self, delta: SparseDelta, groups: Tensor) -> Tensor:
        layout = delta.layout
        if layout.is_thin:
            return layout.gradient(self.op, self.gy, layout.inputs(self.x, groups), groups)
        positions = layout.positions(groups)
        return self._from_blocks([positions.flatten()], delta.shape)[0].view(positions.shape)

    def _entries(self, wanted: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        """Entries at sorted flat positions of the weight as it is stored."""
        share = SAMPLED_DENSITY
        if self.op.kernel:
            share = SAMPLED_WINDOWS if self.gy.shape[1] // self.op.groups >= SAMPLED_CHANNELS else 0.0
        few = all(positions.numel() <= share * math.prod(shape) for positions in wanted)
        if few and can_compress(self.gy):
            return [self._sampled(positions) for positions in wanted]
        return self._from_blocks(wanted, shape)

    @functools.cached_property
    def _gy_blocks(self) -> Tensor:
        return transposed_blocks(self.gy)  # (n, O, N / n)

    def _sampled(self, positions: Tensor) -> Tensor:
        if self.op.kernel:
            return self._sampled_windows(positions.long())
        left, right = self._gy_blocks, self._x(transposed_blocks)
        return _sampled_product(*((right, left) if self.op.transposed else (left, right)), positions)

    def _sampled_windows(self, positions: Tensor) -> Tensor:
        """Of a convolution; the windows of some input channels at a time."""
        op, left = self.op, self.gy.transpose(0, 1).flatten(1).contiguous()  # (O, N * L)
        windows = op.windows(self.x, self.gy.shape[2:])  # (G * I, *K, N, *L), a view
        kernel, width = math.prod(op.kernel), math.prod(op.weight_shape[1:])
        row = positions // width
        column = positions % width + row // (len(left) // op.groups) * width  # in a matrix (O, G * I * K)
        step = max(1, WINDOW_BYTES // max(1, windows[0].numel() * left.element_size()))
        sampled = left.new_empty(len(positions))
        for start in range(0, len(windows), step):
            block = windows[start : start + step].reshape(-1, left.shape[1])  # (channels * K, N * L)
            inside = column - start * kernel
            slots = ((inside >= 0) & (inside < len(block))).nonzero().squeeze(1)
            sampled[slots] = _sampled_product(left[None], block[None], row[slots] * len(block) + inside[slots])
        return sampled

    def _from_blocks(self, wanted: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        if not wanted:
            return []
        width = math.prod(shape[1:])
        step = max(1, WORKSPACE_BYTES // max(1, width * self.dtype.itemsize))
        starts = range(0, shape[0], step)
        edges = torch.tensor([*starts, shape[0]], device=self.gy.device) * width
        bounds = [torch.searchsorted(positions.long(), edges).tolist() for positions in wanted]
        parts: list[list[Tensor]] = [[] for _ in wanted]
        for n, start in enumerate(starts):
            block = self._stored_rows(start, min(start + step, shape[0])).flatten()
            for part, positions, bound in zip(parts, wanted, bounds):
                part.append(block[positions[bound[n] : bound[n + 1]] - start * width])
        return [torch.cat(part) for part in parts]


class LookupGradient(WeightGradient):
    """Of an embedding: `vectors` (T, E) at some `tokens` (T,), sorted and distinct, and zero at all others."""

    def __init__(self, tokens: Tensor, vectors: Tensor):
        self.tokens, self.vectors = tokens, vectors
        self.dtype = vectors.dtype

    def rows(self, delta, start, stop):
        if delta.layout is not None:  # the view: channels are rows
            block = self.vectors.new_zeros(stop - start, delta.shape[0])
            return block.index_copy_(1, self.tokens, self.vectors[:, start:stop].T)
        block = self.vectors.new_zeros(stop - start, delta.shape[1])
        first, last = torch.searchsorted(self.tokens, self.tokens.new_tensor([start, stop])).tolist()
        return block.index_copy_(0, self.tokens[first:last] - start, self.vectors[first:last])

    def at(self, deltas, slots):
        gradients = []
        for delta, some in zip(deltas, slots):
            numbers, places = touched(delta, some, self.tokens)
            gradient = self.vectors.new_zeros(len(some), *delta.values.shape[1:])
            gradient.view(-1)[numbers] = self.vectors.view(-1)[places]
            gradients.append(gradient)
        return gradients


class WholeGradient(WeightGradient):
    """A gradient that is there, (n,), as the weight is stored."""

    def __init__(self, gradient: Tensor):
        self.gradient = gradient
        self.dtype = gradient.dtype

    def rows(self, delta, start, stop):
        whole = self.gradient.view(delta.shape)
        is_turned = delta.layout is not None and delta.layout.transposed
        return (whole.T if is_turned else whole.reshape(len(whole), -1))[start:stop]

    def at(self, deltas, slots):
        return [self.gradient[delta.positions(some)] for delta, some in zip(deltas, slots)]


def touched(delta: SparseDelta, slots: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers in some slots (m,) of an embedding's delta that belong to tokens (T,); both sorted, distinct.

    Returns:
        (c,) where they are among the m or m * s numbers of the slots, and (c,) where in the vectors (T, E), flat.
    """
    width = delta.shape[1]
    if delta.layout is None:  # the slots of one token are a run
        first, stop = (torch.searchsorted(slots, (tokens + n).to(slots.dtype) * width) for n in (0, 1))
        lengths = stop - first
        row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(lengths)
        numbers = torch.arange(len(row), device=tokens.device) + (first - lengths.cumsum(0) + lengths)[row]
        return numbers, slots[numbers] - (tokens[row] - row) * width
    positions = delta.positions(slots).flatten()
    row, is_touched = find(positions // width, tokens)
    numbers = is_touched.nonzero().squeeze(1)
    return numbers, row[numbers] * width + positions[numbers] % width


# ---- Single entries of a product ----


def transposed_blocks(t: Tensor) -> Tensor:
    """(..., C) -> (n, C, m), contiguous: the N rows in n blocks of m; rows that N lacks are 0."""
    t = t.reshape(-1, t.shape[-1])
    if torch.get_num_threads() == 1 or len(t) <= SAMPLED_ROWS:
        return t.T.contiguous()[None]
    n = math.ceil(len(t) / SAMPLED_ROWS)
    rows = math.ceil(len(t) / n)
    if n * rows > len(t):
        t = F.pad(t, (0, 0, 0, n * rows - len(t)))
    blocks = t.view(n, rows, t.shape[1]).transpose(1, 2)
    step = CACHE_WAYS * CACHE_PERIOD // math.gcd(t.stride(0) * t.element_size(), CACHE_PERIOD)
    if step >= rows:
        return blocks.contiguous()
    laid_out = t.new_empty(blocks.shape)
    for start in range(0, rows, step):
        laid_out[:, :, start : start + step] = blocks[:, :, start : start + step]
    return laid_out


def can_compress(t: Tensor) -> bool:
    """Whether products with compressed sparse matrices are there for this kind of tensor, and fast."""
    return t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()


def _sampled_product(left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    """Entries (k,) of the sum of `left[i] right[i]^T` (R, C): left (n, R, m), right (n, C, m).

    Products with a sparse pattern for their result; with both factors in this layout torch makes no copies of them.
    """
    zeros = torch.zeros(positions.numel(), dtype=left.dtype)
    pattern = compressed(zeros, positions, (left.shape[1], right.shape[1]))
    for left_block, right_block in zip(left, right):
        torch.sparse.sampled_addmm(pattern, left_block, right_block.T, out=pattern)
    return pattern.values()


def compressed(values: Tensor, positions: Tensor, shape: tuple[int, int], transposed: bool = False) -> Tensor:
    """The sparse matrix (R, C) with values (k,) at sorted flat positions (k,), by rows; its transpose, by columns."""
    _silence_beta_warning()
    rows, columns = shape
    edges = torch.arange(0, rows * columns + 1, columns, dtype=positions.dtype)
    starts = torch.searchsorted(positions, edges, out_int32=True)
    make, shape = (torch.sparse_csc_tensor, (columns, rows)) if transposed else (torch.sparse_csr_tensor, shape)
    return make(starts, (positions % columns).int(), values, shape, check_invariants=False)


@functools.cache
def _silence_beta_warning() -> None:
    """torch warns once per process that compressed sparse tensors are in beta; the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


# ---- Gathering for a reselection ----


class Candidates:
    """Running choice of the positions of largest absolute gradient, `candidate_count` of them, for one delta."""

    def __init__(self, delta: SparseDelta):
        self.delta = delta
        self.size = torch.empty(0, device=delta.indices.device)
        self.position = torch.empty(0, dtype=torch.int64, device=delta.indices.device)

    def see(self, gradient: Tensor, start: int) -> None:
        """Take in this process's dense gradient (n,) from flat position `start` on."""
        ranks = self.delta.ranks
        self.see_sum(gradient if ranks is None else ranks.sum(self.delta, gradient.float(), start), start)

    def see_sum(self, gradient: Tensor, start: int) -> None:
        """Take in the gradient (n,) of the positions from `start` on, summed over all processes."""
        k = self.delta.candidate_count
        size, position = gradient.abs().topk(min(k, gradient.numel()))
        size, position = torch.cat([self.size, size]), torch.cat([self.position, position + start])
        self.size, best = size.topk(min(k, size.numel()))
        self.position = position[best]

    def choose(self) -> None:
        """All has been seen: the delta gets its candidates."""
        self.delta.candidates = self.position.sort().values.to(self.delta.indices.dtype)


class Uses:
    """The uses of one weight in the graph whose backward pass is to choose the candidates.

    A module that is called twice has a gradient for each call. The largest entries are wanted of their sum, so what
    each is made of is kept until the last of them is there.
    """

    def __init__(self) -> None:
        self._nodes: list[weakref.ref] = []
        self._gradients: list[WeightGradient] = []

    def __reduce__(self) -> Any:
        return Uses, ()  # a copy of the model is in no graph

    def expect(self, node: Any) -> None:
        """There will be a gradient from this node of the graph, if a backward pass comes to it."""
        self._nodes.append(weakref.ref(node))

    def take(self, node: Any, gradient: WeightGradient) -> list[WeightGradient] | None:
        """Take in the gradient of a node; all of them if that was the last of the backward pass, else None."""
        self._gradients.append(gradient)
        self._nodes = [ref for ref in self._nodes if ref() is not None and ref() is not node]
        if any(torch._C._will_engine_execute_node(ref()) for ref in self._nodes):
            return None
        gradients, self._gradients = self._gradients, []
        return gradients


def expect(node: Any, deltas: Sequence[SparseDelta]) -> None:
    """Announce, in forward, that `node` will call `gradients_of`."""
    for delta in deltas:
        if delta.is_gathering and delta.candidates is None:
            delta.uses.expect(node)


def gradients_of(node: Any, gradient: WeightGradient, deltas: Sequence[SparseDelta], slots: Sequence[Tensor]) -> list:
    """The gradients of the values in `slots`; deltas that are gathering observe the same gradient.

    Args:
        node: of the autograd graph that is being run, as in `expect`.
    """
    gathering = [delta for delta in deltas if delta.is_gathering]
    known = [delta for delta in gathering if delta.candidates is not None]
    for delta in gathering:
        if delta.ranks is not None:
            delta.ranks.enter(delta)
        if delta.candidates is None:
            _choose(delta, delta.uses.take(node, gradient))
    samples = gradient.at([*deltas, *known], [*slots, *(delta.candidates for delta in known)])
    for delta, sample in zip(known, samples[len(deltas) :]):
        delta.observe(sample)
    return samples[: len(deltas)]


def _choose(delta: SparseDelta, gradients: Sequence[WeightGradient] | None) -> None:
    """Give a delta its candidates by the sum of the gradients, if they are complete, and let it observe each there."""
    if gradients is None:
        return
    candidates = delta.new_candidates()
    shape = delta.shape if delta.layout is None else delta.layout.shape
    width = math.prod(shape[1:])
    align = 1 if delta.layout is None else delta.layout.align
    step = WORKSPACE_BYTES // max(1, width * gradients[0].dtype.itemsize)
    step = max(align, step // align * align)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = gradients[0].rows(delta, start, stop)
        for other in gradients[1:]:
            block = block + other.rows(delta, start, stop)
        candidates.see(block.flatten(), start * width)
    candidates.choose()
    for gradient in gradients:
        delta.observe(*gradient.at([delta], [delta.candidates]))
