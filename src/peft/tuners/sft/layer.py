"""Sparse deltas and the layer that adds them: `W` with `values` added at `indices`.

On plain linear layers and convolutions forward and backward go through `kernels.written_product`, which writes the
delta into the frozen weight for the duration of one product. Embeddings add it to the vectors that they look up. Beside
linear layers that cannot be written (hooks, packed weights) stands a sparse product. What is left takes a copy of its
weight: norms, convolutions that cannot be written, transforms of torch.func. How deltas of whole rows, columns or
blocks lie in a weight is in `structured`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...utils.mixed_batch import run_by_row
from ...utils.quantization_utils import is_quantized
from ..ops import CONVOLUTIONS, ConvOp, EmbeddingOp, LinearOp, is_plain, no_global_hooks
from ..tuners_utils import AdditiveLayer
from .gradients import Candidates, Uses
from .kernels import add, added, is_writable, lookup, sparse_product, written_product
from .structured import GroupCandidates, Layout, add_product, make_layout

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
        elastic: the number of slots may change, under a global budget.
        sized_by_file: the number of slots is to be that of the first tensors that are loaded.
        counts: `num_deltas` of the configuration, in which the number of trained numbers is kept right under `key`.
        candidate_count: how many candidates are chosen when gradients are gathered.
        is_selected: the positions were chosen (`select_static`) or loaded, not just drawn.
        observer: while set, the layer computes with `observer(W)`, W as stored, in place of W. `select_static` sees
            the gradients of whole weights by it.
    """

    def __init__(
        self,
        shape: torch.Size,
        k: int,
        dtype: torch.dtype,
        layout: Layout | None = None,
        counts: dict[str, int] | None = None,
        key: str = "",
        elastic: bool = False,
        sized_by_file: bool = False,
    ):
        super().__init__()
        self.counts, self.key = counts, key
        self.elastic, self.sized_by_file = elastic, sized_by_file
        self.shape = torch.Size(shape)
        self.layout = layout
        index_dtype = torch.int32 if self.choices < 2**31 else torch.int64
        slots = k // self.slot_size
        self.values = nn.Parameter(torch.zeros(slots if layout is None else (slots, self.slot_size), dtype=dtype))
        chosen = torch.zeros(slots) if self.values.is_meta else random_positions(self.choices, slots)
        self.indices = nn.Parameter(chosen.to(index_dtype), requires_grad=False)
        self.is_selected = False
        self.observer: Callable[[torch.Tensor], torch.Tensor] | None = None
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

    def positions(self, slots: torch.Tensor | None = None) -> torch.Tensor:
        """Flat row-major positions (m,) or (m, s), int64, of all numbers of some slots (m,) in the weight as stored.

        Args:
            slots: As in `indices`; None: those.
        """
        slots = self.indices.detach() if slots is None else slots
        return slots.long() if self.layout is None else self.layout.positions(slots)

    def extra_repr(self) -> str:
        what = "" if self.layout is None else f" in {type(self.layout).__name__.lower()} of {self.slot_size}"
        return f"{self.values.numel()} of {'x'.join(map(str, self.shape))}{what}, dtype={self.values.dtype}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "values" in state_dict:
            self.resize(state_dict[prefix + "values"].shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_selected |= prefix + "indices" in state_dict

    @torch.no_grad()
    def choose(self, positions: torch.Tensor) -> None:
        """Start at `positions` (k,), sorted and distinct, with values 0."""
        self.resize(positions.numel())
        self.indices.copy_(positions)
        self.values.zero_()
        self.is_selected = True

    @torch.no_grad()
    def resize(self, k: int) -> None:
        """Make room for k positions if it may; all are to be set afterwards."""
        if (self.elastic or self.sized_by_file) and k != self.values.shape[0]:
            self._set(self.values.new_zeros(k, *self.values.shape[1:]), self.indices.new_zeros(k))

    def _set(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        _put(self.values, values)
        _put(self.indices, indices)
        if self.counts is not None:
            self.counts[self.key] = values.numel()

    # Reselection

    @torch.no_grad()
    def exchange(self, given_up: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Give up slots and take up positions or groups with value 0, not necessarily as many, all sorted again.
        `values` and `indices` stay the same parameters, but lose their `.grad` if their number changes.

        Args:
            given_up: (m,) slots.
            positions: (n,) that are not there yet.

        Returns:
            (slots - m + n,) the slot in which every slot's content was before, -1 for the new ones; the optimiser's
            state must follow it (`SftOptimizer.move_slots`).
        """
        kept = torch.ones(self.indices.numel(), dtype=torch.bool, device=self.indices.device)
        kept[given_up] = False
        slots = kept.nonzero().squeeze(1)
        indices = torch.cat([self.indices[slots], positions.to(self.indices.dtype)])
        order = indices.argsort()
        source = torch.cat([slots, slots.new_full((positions.numel(),), -1)])[order]
        values = self.values.new_zeros(source.numel(), *self.values.shape[1:])
        values[source >= 0] = self.values[source[source >= 0]]
        self._set(values, indices[order])
        return source

    # Gathering of gradients for a reselection ("rigl")

    def start_gathering(self, ranks: Ranks | None = None, count: int | None = None) -> None:
        """From now on: choose c = `count` candidates (None: as many as there are slots) in the next backward pass, with
        the processes of `ranks` if there are others, and sum up their gradients in every one."""
        self.is_gathering = True
        self.ranks = ranks
        self.candidate_count = self.slots if count is None else count
        self.uses = Uses()
        self.candidates: torch.Tensor | None = None  # (c,) of the type of indices, sorted
        self.candidate_grad: torch.Tensor | None = None  # (c,) or (c, s) float32, summed over micro-batches

    def new_candidates(self) -> Candidates | GroupCandidates:
        """What sees the dense gradient and then chooses the candidates."""
        return Candidates(self) if self.layout is None else GroupCandidates(self)

    def stop_gathering(self) -> None:
        self.is_gathering = False
        self.ranks: Ranks | None = None
        self.candidate_count = 0
        self.uses: Uses | None = None
        self.candidates = None
        self.candidate_grad = None

    def take_candidate_grad(self) -> torch.Tensor | None:
        """The candidates' gradient since the last call, (c,) or (c, s) float32, as `.grad` would have it; None: there
        is none."""
        taken, self.candidate_grad = self.candidate_grad, None
        return taken

    def observe(self, gradient: torch.Tensor) -> None:
        """Add the gradient at the candidates, (c,) or (c, s), of one backward pass."""
        gradient = gradient.detach().float()
        self.candidate_grad = gradient if self.candidate_grad is None else self.candidate_grad + gradient

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


def _put(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter data of another length. What holds the parameter, such as an optimiser, holds it still.

    A graph that is still alive keeps the parameter's gradient accumulator, which knows the old length. torch makes a
    new one only when the type of the data changes.
    """
    if parameter.shape == data.shape:
        parameter.copy_(data)
        return
    parameter.grad = None
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = data


class SftLayer(AdditiveLayer, nn.Module):
    """SFT on any layer with a weight."""

    adapter_layer_names = module_dicts = ("sft_delta",)
    widens_parameters = False  # SftConfig.dtype says what the values are

    def update_layer(self, name, config, *, key: str):
        # A packed weight has no type of its own.
        natural = torch.float32 if is_quantized(self.get_base_layer()) else self.op.weight.dtype
        dtype = natural if config.dtype == "auto" else getattr(torch, config.dtype)
        layout = make_layout(self.op, config, type(self.get_base_layer()).__name__)
        counts, is_global = config.num_deltas, config.budget == "global"
        self.sft_delta[name] = SparseDelta(
            self.op.stored_shape, counts[key], dtype, layout, counts, key, is_global, config.sized_by_file
        )

    def before_load(self, name, path, tensors):
        values = tensors.get(f"{path}.sft_delta.{name}.values")
        if values is not None:
            self.sft_delta[name].resize(values.shape[0])

    def after_load(self, name):
        self.sft_delta[name].sort()
        self.sft_delta[name].sized_by_file = False

    def delta_weight(self, name):
        delta = self.sft_delta[name]
        dense = torch.zeros(delta.dense_numel, dtype=delta.values.dtype, device=delta.values.device)
        return self.op.to_view(_added(dense, delta).view(delta.shape))

    def fold(self, name, W, b):
        stored = self.op.to_view(W)
        delta = self.sft_delta[name]
        if delta.observer is not None:  # its values are all 0 then
            return self.op.to_view(delta.observer(stored)), b
        return self.op.to_view(_added(stored.reshape(-1), delta).view(stored.shape)), b

    def remember(self, name, W, b):
        """The delta's positions, which may be others by the time of unmerging, and the base weight's numbers there:
        with them unmerging is exact."""
        positions = self.sft_delta[name].positions()
        return positions, self.op.to_view(W.detach()).reshape(-1)[positions]

    def unfold(self, name, W, b, memory):
        stored = self.op.to_view(W).contiguous().clone()
        positions, numbers = memory
        stored.view(-1)[positions] = numbers.to(stored.dtype)  # wider where it was not the first to be folded
        return self.op.to_view(stored), b

    def post(self, name, x, y, before=()):
        delta = self.sft_delta[name]
        if delta.layout is None:
            return y + sparse_product(x, delta, self.op).to(y.dtype)
        return add_product(y, x, self.op, delta)

    @property
    def base_is_apart(self):
        return self.op.kind != "Embedding"  # vectors are looked up in the sum of table and delta

    def _apply_by_row(self, names, x, *args, **kwargs):
        # A delta that is written into the weight for some rows costs less than one beside the product of all.
        return run_by_row(self._apply_or_base, names, (x, *args), kwargs)

    def _apply_adapters(self, names, x, *args, **kwargs):
        base, op = self.base_layer, self.op
        deltas = [self.sft_delta[name] for name in names]
        if torch._C._are_functorch_transforms_active() or any(d.observer is not None for d in deltas):
            return op.op(x, *self.folded(names))  # they need the whole weight
        if isinstance(op, EmbeddingOp) and op.own_forward is None:
            return lookup(x, op, deltas)
        is_plain_call = not args and not kwargs and no_global_hooks() and is_plain(base, (nn.Linear, *CONVOLUTIONS))
        if is_plain_call and not is_quantized(base) and is_writable(base.weight):
            # Written into weights of half precision, a structured delta would be rounded like them (see `structured`).
            if isinstance(op, ConvOp) or base.weight.dtype.itemsize >= 4 or all(d.layout is None for d in deltas):
                return written_product(x, op, deltas)
        if isinstance(op, LinearOp):
            return super()._apply_adapters(names, x, *args, **kwargs)
        return op.op(x, *self.folded(names), *args, **kwargs)


def _added(flat: torch.Tensor, delta: SparseDelta) -> torch.Tensor:
    """A copy of the flattened weight (n,) with the delta added, differentiable.

    Raises:
        RuntimeError: A transform of torch.func is active, which runs no backward pass, while gradients are gathered.
    """
    if not torch._C._are_functorch_transforms_active():
        return add(flat, delta)
    if delta.is_gathering:
        raise RuntimeError(
            "Gradients taken by torch.func cannot be gathered for a reselection. Train with loss.backward(), or close "
            "the SftSelector, which keeps the positions as they are"
        )
    return added(flat, delta.values.flatten(), delta.positions().flatten())
