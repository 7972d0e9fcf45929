"""Sparse deltas and the layer that adds them: `W` with `values` added at `indices`.

On plain linear layers forward and backward go through `kernels.sparse_linear`, which writes the delta into the frozen
weight for the duration of one product. Everywhere else (convolutions, embeddings, layers with hooks, packed weights)
it is a product with the folded weight or a sparse product beside the layer. Deltas of whole rows, columns or blocks
have kernels of their own (`structured`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...utils.quantization_utils import is_quantized
from ..ops import is_plain, no_global_hooks
from ..tuners_utils import AdditiveLayer
from .config import DTYPES
from .kernels import Candidates, added, scatter_add, sparse_linear, sparse_product
from .structured import GroupCandidates, Layout, add, add_product, make_layout, structured_linear

if TYPE_CHECKING:
    from .parallel import Ranks


def random_positions(n: int, k: int) -> torch.Tensor:
    """k distinct positions out of n, uniformly, sorted; int64 of shape (k,)."""
    if k > n // 4:
        return torch.randperm(n)[:k].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < k:
        more = torch.randint(n, (k - drawn.numel() + k // 8 + 8,))
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(drawn.numel())[:k]].sort().values


class SparseDelta(nn.Module):
    """Trained numbers at chosen places of one weight: k slots of one number, or g slots of one group of s numbers.

    Attributes:
        values: (k,) or (g, s) trained.
        indices: (k,) flat row-major positions in the weight as it is stored, or (g,) numbers of groups; sorted,
            distinct; int32 while there are fewer than 2**31 to choose from, else int64. A frozen parameter, not a
            buffer: DDP would broadcast a buffer on every forward, and who copies an adapter through
            `named_parameters()` (TRL's DPO) would forget it.
        shape: of the weight as stored.
        layout: how the weight is cut into groups; None: into single numbers.
    """

    def __init__(self, shape: torch.Size, k: int, dtype: torch.dtype, layout: Layout | None = None):
        super().__init__()
        self.shape = torch.Size(shape)
        self.layout = layout
        index_dtype = torch.int32 if self.choices < 2**31 else torch.int64
        slots = k // self.slot_size
        self.values = nn.Parameter(torch.zeros(slots if layout is None else (slots, self.slot_size), dtype=dtype))
        chosen = torch.zeros(slots) if self.values.is_meta else random_positions(self.choices, slots)
        self.indices = nn.Parameter(chosen.to(index_dtype), requires_grad=False)
        self.stop_gathering()

    @property
    def dense_numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slots(self) -> int:
        """Number of positions or groups that are trained."""
        return self.indices.numel()

    @property
    def slot_size(self) -> int:
        """Trained numbers in each."""
        return 1 if self.layout is None else self.layout.size

    @property
    def choices(self) -> int:
        """Number of positions or groups that there are."""
        return self.dense_numel if self.layout is None else self.layout.count

    def positions(self) -> torch.Tensor:
        """Flat row-major position of every trained number in the weight as it is stored; int64, shaped like values."""
        return self.indices.detach().long() if self.layout is None else self.layout.positions(self.indices)

    def extra_repr(self) -> str:
        what = "" if self.layout is None else f" in {type(self.layout).__name__.lower()} of {self.slot_size}"
        return f"{self.values.numel()} of {'x'.join(map(str, self.shape))}{what}, dtype={self.values.dtype}"

    # Gathering of gradients for a reselection ("rigl")

    def start_gathering(self, ranks: Ranks | None = None) -> None:
        """From now on: choose candidates in the next backward pass, and sum up their gradients in every one.

        Args:
            ranks: The processes that choose together; None: this one alone.
        """
        self.is_gathering = True
        self.ranks = ranks
        self.candidates: torch.Tensor | None = None  # like indices, sorted
        self.candidate_grad: torch.Tensor | None = None  # like values, float32, summed over micro-batches

    def new_candidates(self) -> Candidates | GroupCandidates:
        """What sees the dense gradient and then chooses the candidates."""
        return Candidates(self) if self.layout is None else GroupCandidates(self)

    def stop_gathering(self) -> None:
        self.is_gathering = False
        self.ranks: Ranks | None = None
        self.candidates = None
        self.candidate_grad = None

    def take_candidate_grad(self) -> torch.Tensor | None:
        """The candidates' gradient since the last call, float32 in the shape of values, as `.grad` would have it; None:
        there is none."""
        taken, self.candidate_grad = self.candidate_grad, None
        return taken

    def observe(self, gradient: torch.Tensor) -> None:
        """Add the gradient at the candidates, in the shape of values, of one backward pass."""
        gradient = gradient.detach().float()
        self.candidate_grad = gradient if self.candidate_grad is None else self.candidate_grad + gradient

    # Reselection

    @torch.no_grad()
    def replace(self, positions: torch.Tensor, new_indices: torch.Tensor) -> torch.Tensor:
        """Let the slots `positions` (m,) stand for `new_indices` (m,) with value 0, and sort all slots again.

        Returns:
            (slots,) permutation p: slot i now holds what slot p[i] held; the optimiser's state must follow it.
        """
        self.indices[positions] = new_indices.to(self.indices.dtype)
        self.values[positions] = 0
        order = self.indices.argsort()
        self.indices.copy_(self.indices[order])
        self.values.copy_(self.values[order])
        return order

    @torch.no_grad()
    def sort(self) -> None:
        """Sort the slots (files of the reference release are not sorted).

        Raises:
            ValueError: a position or group that the weight does not have, or one twice.
        """
        order = self.indices.argsort()
        self.indices.copy_(self.indices[order])
        self.values.copy_(self.values[order])
        if self.indices.numel() == 0:
            return
        what = "Delta positions" if self.layout is None else f"Numbers of {type(self.layout).__name__.lower()}"
        if self.indices[0] < 0 or self.indices[-1] >= self.choices:
            raise ValueError(
                f"{what} must be in 0..{self.choices - 1} (a weight of shape {tuple(self.shape)}), got "
                f"{self.indices[0].item()}..{self.indices[-1].item()}"
            )
        if (self.indices[1:] == self.indices[:-1]).any():
            raise ValueError(f"{what} must be distinct, but the file has some of them twice")


class SftLayer(AdditiveLayer, nn.Module):
    """SFT on any layer with a weight."""

    adapter_layer_names = ("sft_delta",)
    widens_parameters = False  # SftConfig.dtype says what the values are

    def __init__(self, base_layer: nn.Module):
        nn.Module.__init__(self)
        AdditiveLayer.__init__(self, base_layer)
        self.sft_delta = nn.ModuleDict()

    def update_layer(self, name, config, *, k: int):
        weight = self.get_base_layer().weight
        dtype = DTYPES[config.dtype] or (weight.dtype if weight.is_floating_point() else torch.float32)
        layout = make_layout(self.op, config, type(self.get_base_layer()).__name__)
        self.sft_delta[name] = SparseDelta(self.op.stored_shape, k, dtype, layout)

    def after_load(self, name):
        self.sft_delta[name].sort()

    def delta_weight(self, name):
        delta = self.sft_delta[name]
        dense = torch.zeros(delta.dense_numel, dtype=delta.values.dtype, device=delta.values.device)
        return self.op.to_view(_added(dense, delta).view(delta.shape))

    def fold(self, name, W, b):
        stored = self.op.to_view(W)
        return self.op.to_view(_added(stored.reshape(-1), self.sft_delta[name]).view(stored.shape)), b

    def remember(self, name, W, b):
        """The base weight's numbers at the delta's positions: with them unmerging is exact."""
        return self.op.to_view(W.detach()).reshape(-1)[self.sft_delta[name].positions()]

    def unfold(self, name, W, b, memory):
        stored = self.op.to_view(W).contiguous().clone()
        stored.view(-1)[self.sft_delta[name].positions()] = memory
        return self.op.to_view(stored), b

    def post(self, name, x, y, before=()):
        delta = self.sft_delta[name]
        if delta.layout is None:
            return y + sparse_product(x, delta, self.op.transposed).to(y.dtype)
        return add_product(y, x, delta)

    def _apply_adapters(self, names, x, *args, **kwargs):
        base, op = self.base_layer, self.op
        if op.kind != "Linear" or torch._C._are_functorch_transforms_active():  # they cannot see through the kernels
            return op.op(x, *self.folded(names))
        callable_only = args or kwargs or not no_global_hooks() or is_quantized(self.get_base_layer())
        writable = (
            not callable_only
            and is_plain(base)
            and not base.weight.requires_grad
            and base.weight.is_contiguous()
            and (not base.weight.is_inference() or torch.is_inference_mode_enabled())
        )
        deltas = [self.sft_delta[n] for n in names]
        if writable and all(d.layout is None for d in deltas):
            return sparse_linear(x, base.weight, base.bias, deltas, op.transposed)
        # Written into weights of half precision, a structured delta would be rounded like them (see `structured`).
        wide = writable and base.weight.dtype in (torch.float32, torch.float64)
        if wide and all(d.layout is not None for d in deltas):
            return structured_linear(x, base.weight, base.bias, deltas, op.transposed)
        return super()._apply_adapters(names, x, *args, **kwargs)


def _added(flat: torch.Tensor, delta: SparseDelta) -> torch.Tensor:
    """A copy of the flattened weight (n,) with the delta added, differentiable.

    Raises:
        RuntimeError: A transform of torch.func is active while gradients are gathered: it runs no backward pass in
            which they could be.
    """
    if not torch._C._are_functorch_transforms_active():
        return scatter_add(flat, delta) if delta.layout is None else add(flat, delta)
    if delta.is_gathering:
        raise RuntimeError(
            "Gradients taken by torch.func cannot be gathered for a reselection. Train with loss.backward(), or close "
            "the SftSelector, which keeps the positions as they are"
        )
    return added(flat, delta.values.flatten(), delta.positions().flatten())
