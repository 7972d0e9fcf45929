"""Structured deltas: whole rows, columns or blocks of a weight are trained instead of single numbers.

How a weight is cut into groups is said in terms of the op's view `W[O, I, *K]`, not of how it is stored:

- `Rows`: all weights of one output channel, I * K numbers;
- `Columns`: all weights of one input channel, O * K numbers (of an embedding: the vector of one token);
- `Blocks`: tiles of b x b, b * b numbers. Where b does not divide O or I, the numbers beyond the last whole tile are
  not trained.

The gradient of a group is a thin dense product, which is what this is for: no sparse pattern, and for columns no more
than those columns of the input is kept for it.

Forward and input gradient run on the frozen weight with the delta written into it for the duration of one product.
Measured on the CPU (float32, one thread, N = 512, as many trained numbers as LoRA of rank 8, ms):

    O x I          row: written  thin   column: written  thin   block: written  thin   LoRA, all of it
    576 x 576           0.01     0.14            0.04    0.10           0.06    0.21   0.39
    1536 x 576          0.02     0.24            0.08    0.17           0.07    0.49   0.90

"written" is what writing and restoring adds to one product; "thin" is the product of the delta alone, added to the
frozen layer's output. The latter is what happens beside layers that cannot be written (packed, with hooks), and beside
weights of half precision, in which a sum `W + value` would lose what the delta has learnt until that is larger than the
rounding of W.

Letters: N rows of the input, O, I, K the weight's output and input channels and its kernel's size, g groups, s numbers
in each, b the side of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...utils.autocast import no_autocast
from . import gradients

if TYPE_CHECKING:
    from ..ops import ConvOp, LinearOp, Op
    from .config import SftConfig
    from .layer import SparseDelta


@dataclass(frozen=True)
class Layout:
    """How a weight is cut into numbered groups. Group numbers are tensors (g,); numbers of groups are (g, s)."""

    out_features: int  # O
    in_features: int  # I
    kernel: int  # K
    transposed: bool
    """The weight is stored (I, O)."""
    channel_groups: int
    """G of a convolution, whose input has G * I channels."""

    count: int
    """Number of groups."""
    size: int
    """Numbers in each, s."""
    align = 1
    """Row blocks of the weight must begin at multiples of this for `add_squares` to see whole groups."""
    needs_input = True
    """Whether the groups' gradients need the whole input of a linear layer or convolution."""
    is_thin = True
    """Whether there is a `gradient` for less than a whole linear layer or convolution."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as a matrix."""
        return self.out_features, self.in_features * self.kernel

    def positions(self, groups: Tensor) -> Tensor:
        """(g, s) int64, the flat row-major positions of the groups' numbers in the weight as it is stored."""
        o, i = self._coordinates(groups.detach().long())
        return (i * self.out_features + o if self.transposed else o * (self.in_features * self.kernel) + i).flatten(1)

    def _coordinates(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Output channel, and input channel with kernel (0..I*K-1), of every number: broadcast together, (g, ...)."""
        raise NotImplementedError

    def places(self, groups: Tensor) -> tuple[Tensor, ...]:
        """The groups as `read` and `write` take them, int64."""
        return (groups.long(),)

    def read(self, W: Tensor, places: Sequence[Tensor]) -> Tensor:
        """(g, s) the groups' numbers in the matrix `W` (O, I * K), a view of a contiguous weight."""
        raise NotImplementedError

    def write(self, W: Tensor, places: Sequence[Tensor], numbers: Tensor) -> None:
        """Put the groups' numbers (g, s) into such a matrix."""
        raise NotImplementedError

    def inputs(self, x: Tensor, groups: Tensor) -> Tensor:
        """What of the input `x` (N, G * I, *S) the groups' gradients depend on."""
        return x

    def gradient(self, op: LinearOp | ConvOp, gy: Tensor, inputs: Tensor, groups: Tensor) -> Tensor:
        """(g, s) the groups' part of the weight's gradient; gy (N, O, *L), inputs as `inputs()` gives them."""
        raise NotImplementedError

    def add_product(self, y: Tensor, x: Tensor, groups: Tensor, values: Tensor) -> None:
        """`y` (N, O) += `x D^T` in place, D a linear layer's weight that is zero but for the groups' `values`."""
        raise NotImplementedError

    def input_gradient(self, gy: Tensor, groups: Tensor, values: Tensor) -> Tensor:
        """`gy D`, (N, I)."""
        raise NotImplementedError

    def add_squares(self, squares: Tensor, block: Tensor, start: int) -> None:
        """Add to `squares` (count,) the squared norms of the groups in `block` (n, I * K), rows `start`... of W."""
        raise NotImplementedError

    def squares(self, stored: Tensor) -> Tensor:
        """(count,) squared norms of the groups of numbers (n,) that are laid out like the weight as it is stored."""
        across = self.in_features * self.kernel
        matrix = stored.view(across, -1).T if self.transposed else stored.view(-1, across)
        squares = torch.zeros(self.count, dtype=_wide(stored.dtype), device=stored.device)
        self.add_squares(squares, matrix, 0)
        return squares

    def factors(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Two vectors whose outer product, flattened, is the sum over every group of rows[o] * columns[i].

        Args:
            rows, columns: one number for each row and column of the weight as a matrix, as it is stored.
        """
        o, i = (columns, rows) if self.transposed else (rows, columns)
        return self._factors(o.double(), i.double())

    def _factors(self, o: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Rows(Layout):
    """One group per output channel."""

    def _coordinates(self, groups):
        return groups[:, None], torch.arange(self.size, device=groups.device)

    def read(self, W, places):
        return W.index_select(0, *places)

    def write(self, W, places, numbers):
        W.index_copy_(0, *places, numbers)

    @property
    def is_thin(self):
        return self.channel_groups == 1

    def gradient(self, op, gy, inputs, groups):
        return op.weight_gradient(gy.index_select(1, groups), inputs).flatten(1)

    def add_product(self, y, x, groups, values):
        y.index_add_(1, groups, (values @ x.T).T)

    def input_gradient(self, gy, groups, values):
        return gy.index_select(1, groups) @ values

    def add_squares(self, squares, block, start):
        squares[start : start + len(block)] += _squared_norm(block, 1)

    def _factors(self, o, i):
        return o, i.sum().view(1)


class Columns(Layout):
    """One group per input channel; the order within it is (O, K)."""

    needs_input = False

    def _coordinates(self, groups):
        o, k = (torch.arange(n, device=groups.device) for n in (self.out_features, self.kernel))
        return o[:, None], groups[:, None, None] * self.kernel + k

    def _by_channel(self, W: Tensor) -> Tensor:
        return W.unflatten(1, (self.in_features, self.kernel))

    def read(self, W, places):
        return self._by_channel(W).index_select(1, *places).transpose(0, 1).flatten(1)

    def write(self, W, places, numbers):
        numbers = numbers.unflatten(1, (self.out_features, self.kernel))
        self._by_channel(W).index_copy_(1, *places, numbers.transpose(0, 1))

    def inputs(self, x, groups):
        by_group = x.unflatten(1, (self.channel_groups, self.in_features))
        return by_group.index_select(2, groups).flatten(1, 2)

    def gradient(self, op, gy, inputs, groups):
        return op.weight_gradient(gy, inputs).transpose(0, 1).flatten(1)

    def add_product(self, y, x, groups, values):
        y.addmm_(x.index_select(1, groups), values)

    def input_gradient(self, gy, groups, values):
        return gy.new_zeros(len(gy), self.in_features).index_add_(1, groups, (values @ gy.T).T)

    def add_squares(self, squares, block, start):
        squares += _squared_norm(self._by_channel(block), (0, 2))

    def _factors(self, o, i):
        return o.sum().view(1), i.view(self.in_features, self.kernel).sum(1)


@dataclass(frozen=True)
class Blocks(Layout):
    """Tiles of b x b, numbered row by row; the order within one is row-major. For weights without a kernel."""

    b: int

    @property
    def align(self) -> int:
        return self.b

    @property
    def _across(self) -> int:
        """Whole tiles beside each other."""
        return self.in_features // self.b

    def _tiles(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Tile row and tile column of each group, (g,)."""
        return groups.div(self._across, rounding_mode="floor"), groups.remainder(self._across)

    def _tiled(self, t: Tensor) -> Tensor:
        """(N, channels) -> (N, whole tiles, b), a view."""
        whole = t.shape[1] // self.b
        return t[:, : whole * self.b].unflatten(1, (whole, self.b))

    def _coordinates(self, groups):
        row, column = self._tiles(groups)
        inner = torch.arange(self.b, device=groups.device)
        return (row[:, None] * self.b + inner)[:, :, None], (column[:, None] * self.b + inner)[:, None, :]

    def _lines(self, W: Tensor) -> Tensor:
        """The tiles' lines that lie together in memory (rows, or columns of a transposed weight), (..., b), a view."""
        stored = W.T if self.transposed else W
        return self._tiled(stored) if stored.shape[1] % self.b else stored.view(-1, self.b)

    def places(self, groups):
        """Of every line, (g * b,), in `_lines`."""
        row, column = self._tiles(groups.long())
        outer, inner, width = (column, row, self.out_features) if self.transposed else (row, column, self.in_features)
        lines = outer[:, None] * self.b + torch.arange(self.b, device=groups.device)
        if width % self.b:
            return lines.flatten(), inner.repeat_interleave(self.b)
        return ((lines * (width // self.b) + inner[:, None]).flatten(),)

    def _turned(self, numbers: Tensor) -> Tensor:
        """(g * b, b) <-> (g, b * b): tiles as they lie in memory, and row-major."""
        tiles = numbers.view(-1, self.b, self.b)
        return tiles.mT if self.transposed else tiles

    def read(self, W, places):
        return self._turned(self._lines(W)[tuple(places)]).flatten(1)

    def write(self, W, places, numbers):
        self._lines(W)[tuple(places)] = self._turned(numbers).reshape(-1, self.b)

    def _step(self, t: Tensor) -> int:
        """Tiles at a time, so that what is gathered of (N, channels) for them stays bounded: N * b numbers each."""
        return max(1, gradients.WORKSPACE_BYTES // max(1, len(t) * self.b * t.element_size()))

    def gradient(self, op, gy, inputs, groups):
        left, right = self._tiled(gy).transpose(0, 1), self._tiled(inputs).transpose(0, 1)  # (whole tiles, N, b)
        parts = []
        for some in groups.split(self._step(gy)):
            row, column = self._tiles(some)
            parts.append(torch.bmm(left.index_select(0, row).mT, right.index_select(0, column)).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add_product(self, y, x, groups, values):
        self._add_tiles(y, x, *self._tiles(groups), values.unflatten(1, (self.b, self.b)).mT)

    def input_gradient(self, gy, groups, values):
        row, column = self._tiles(groups)
        gx = gy.new_zeros(len(gy), self.in_features)
        self._add_tiles(gx, gy, column, row, values.unflatten(1, (self.b, self.b)))
        return gx

    def _add_tiles(self, y: Tensor, x: Tensor, to: Tensor, source: Tensor, tiles: Tensor) -> None:
        """`y[:, tile to[n]] += x[:, tile source[n]] @ tiles[n]` for every n."""
        step = self._step(x)
        for some, other, factors in zip(to.split(step), source.split(step), tiles.split(step)):
            products = torch.bmm(self._tiled(x).transpose(0, 1).index_select(0, other), factors)  # (g, N, b)
            self._tiled(y).index_add_(1, some, products.transpose(0, 1))

    def add_squares(self, squares, block, start):
        whole = len(block) // self.b
        grid = self._tiled(block[: whole * self.b]).unflatten(0, (whole, self.b))
        found = _squared_norm(grid, (1, 3)).flatten()
        first = start // self.b * self._across
        squares[first : first + len(found)] += found

    def _factors(self, o, i):
        return tuple(t[: len(t) // self.b * self.b].unflatten(0, (-1, self.b)).sum(1) for t in (o, i))


def _squared_norm(t: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(t, dim=dim, dtype=_wide(t.dtype)).square()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make_layout(op: Op, config: SftConfig, name: str) -> Layout | None:
    """How `config` cuts the weight of the layer called `name`; None: into single numbers.

    Raises:
        ValueError: the layer's weight has no such groups.
    """
    if config.granularity == "element":
        return None
    shape = tuple(op.weight_shape)
    refusal = f"Target module {name} ({type(op.layer).__name__}) is not supported by granularity={config.granularity!r}"
    if len(shape) < 2:
        raise ValueError(
            f"{refusal}, which needs a weight with output and input channels, not one of shape {shape}: leave it out "
            "of target_modules, or take granularity='element'"
        )
    channels_out, channels_in, kernel = shape[0], shape[1], math.prod(shape[2:])
    common = (channels_out, channels_in, kernel, op.transposed, getattr(op, "groups", 1))
    if config.granularity == "row":
        return Rows(*common, count=channels_out, size=channels_in * kernel)
    if config.granularity == "column":
        return Columns(*common, count=channels_in, size=channels_out * kernel)
    if len(shape) > 2:
        raise ValueError(
            f"{refusal}, which takes tiles of matrices, not of a weight with a kernel, {shape}: leave it out of "
            "target_modules, or take granularity='row' or 'column'"
        )
    b = config.block_size
    return Blocks(*common, count=(channels_out // b) * (channels_in // b), size=b * b, b=b)


# ---- Gathering of gradients for a reselection ----


class GroupCandidates(gradients.Candidates):
    """Choice of the groups whose gradient has the largest norm, `candidate_count` of them, for one delta.

    It sees the gradient of the view (O, I * K), whole rows, a multiple of `layout.align` at a time.
    """

    def __init__(self, delta: SparseDelta):
        self.delta = delta
        self._width = delta.layout.in_features * delta.layout.kernel
        self._squares: Tensor | float = 0.0

    def see_sum(self, gradient: Tensor, start: int) -> None:
        """Take in the gradient (n,) summed over all processes."""
        layout = self.delta.layout
        if not isinstance(self._squares, Tensor):
            self._squares = gradient.new_zeros(layout.count, dtype=_wide(gradient.dtype))
        layout.add_squares(self._squares, gradient.view(-1, self._width), start // self._width)

    def choose(self) -> None:
        """All has been seen: the delta gets its candidates."""
        best = self._squares.topk(min(self.delta.candidate_count, self._squares.numel())).indices
        self.delta.candidates = best.sort().values.to(self.delta.indices.dtype)


# ---- Products ----


class _AddProduct(torch.autograd.Function):
    """`y (N, O), x (N, I), values, indices, op, delta -> y + x D^T`; y and x of one dtype."""

    @staticmethod
    def forward(ctx, y, x, values, indices, op, delta):
        layout = delta.layout
        ctx.op, ctx.delta, ctx.whole = op, delta, delta.is_gathering or layout.needs_input
        inputs = None
        if ctx.needs_input_grad[2]:
            gradients.expect(ctx, [delta])
            inputs = x if ctx.whole else layout.inputs(x, indices)
        ctx.save_for_backward(values, indices, inputs)
        y = y.clone()
        layout.add_product(y, x, indices, values.to(x.dtype))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        values, indices, inputs = ctx.saved_tensors
        op, delta, layout = ctx.op, ctx.delta, ctx.delta.layout
        gx = gv = None
        with no_autocast(gy.device.type):
            if ctx.needs_input_grad[1]:
                gx = layout.input_gradient(gy, indices, values.to(gy.dtype))
            if inputs is not None and ctx.whole:
                gradient = gradients.ProductGradient(op, gy, lambda form: form(inputs) if form else inputs)
                (gv,) = gradients.gradients_of(ctx, gradient, [delta], [indices])
            elif inputs is not None:
                gv = layout.gradient(op, gy, inputs, indices)
            gv = gv if gv is None else gv.to(values.dtype)
        return gy if ctx.needs_input_grad[0] else None, gx, gv, None, None, None


def add_product(y: Tensor, x: Tensor, op: LinearOp, delta: SparseDelta) -> Tensor:
    """`y` (..., O) plus the product of `x` (..., I) with the delta alone, in the dtype of `y`."""
    with no_autocast(x.device.type):
        rows = x.reshape(-1, x.shape[-1]).to(y.dtype)
        y_rows = y.reshape(-1, y.shape[-1])
        return _AddProduct.apply(y_rows, rows, delta.values, delta.indices, op, delta).view(y.shape)
