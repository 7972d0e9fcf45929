"""Sparse deltas and the layer that adds them: `W` with `values` added at `indices`.

On plain linear layers forward and backward go through `kernels.sparse_linear`, which writes the delta into the frozen
weight for the duration of one product. Everywhere else (convolutions, embeddings, layers with hooks, packed weights)
it is a product with the folded weight or a sparse product beside the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ...utils.quantization_utils import is_quantized
from ..ops import is_plain, no_global_hooks
from ..tuners_utils import AdditiveLayer
from .config import DTYPES
from .kernels import scatter_add, sparse_linear, sparse_product


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
    """k trained numbers at k positions of one weight.

    Attributes:
        values: (k,) trained.
        indices: (k,) flat row-major positions in the weight as it is stored, sorted, distinct; int32 while the weight
            has fewer than 2**31 elements, else int64. A frozen parameter, not a buffer: DDP would broadcast a buffer on
            every forward, and who copies an adapter through `named_parameters()` (TRL's DPO) would forget it.
        shape: of the weight as stored.
        elastic: k may change, under a global budget.
        candidate_count: how many candidates are chosen when gradients are gathered.
        is_selected: the positions were chosen (`select_static`) or loaded, not just drawn.
        observer: while set, the layer computes with `observer(W)`, W as stored, in place of W. `select_static` sees
            the gradients of whole weights by it.
    """

    def __init__(self, shape: torch.Size, k: int, dtype: torch.dtype, elastic: bool = False):
        super().__init__()
        self.elastic = elastic
        self.shape = torch.Size(shape)
        index_dtype = torch.int32 if self.dense_numel < 2**31 else torch.int64
        self.values = nn.Parameter(torch.zeros(k, dtype=dtype))
        positions = torch.zeros(k) if self.values.is_meta else random_positions(self.dense_numel, k)
        self.indices = nn.Parameter(positions.to(index_dtype), requires_grad=False)
        self.is_selected = False
        self.observer: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.stop_gathering()

    @property
    def dense_numel(self) -> int:
        return math.prod(self.shape)

    def extra_repr(self) -> str:
        return f"{self.values.numel()} of {'x'.join(map(str, self.shape))}, dtype={self.values.dtype}"

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
        if self.elastic and k != self.values.shape[0]:
            _put(self.values, self.values.new_zeros(k, *self.values.shape[1:]))
            _put(self.indices, self.indices.new_zeros(k))

    @torch.no_grad()
    def exchange(self, given_up: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Give up slots and take up positions with value 0, not necessarily as many. `values` and `indices` stay the
        same parameters, but lose their `.grad` if k changes.

        Args:
            given_up: (m,) slots.
            positions: (n,) that are not there yet.

        Returns:
            (k - m + n,) the slot in which every position was before, -1 for the new ones.
        """
        kept = torch.ones(self.indices.numel(), dtype=torch.bool, device=self.indices.device)
        kept[given_up] = False
        slots = kept.nonzero().squeeze(1)
        indices = torch.cat([self.indices[slots], positions.to(self.indices.dtype)])
        order = indices.argsort()
        source = torch.cat([slots, slots.new_full((positions.numel(),), -1)])[order]
        values = self.values.new_zeros(source.numel(), *self.values.shape[1:])
        values[source >= 0] = self.values[source[source >= 0]]
        _put(self.indices, indices[order])
        _put(self.values, values)
        return source

    # Gathering of gradients for a reselection ("rigl")

    def start_gathering(self, count: int | None = None) -> None:
        """From now on: choose candidates in the next backward pass, and sum up their gradients in every one.

        Args:
            count: Number of candidates c; None: k.
        """
        self.is_gathering = True
        self.candidate_count = self.indices.numel() if count is None else count
        self.candidates: torch.Tensor | None = None  # (c,) int64, sorted
        self.candidate_grad: torch.Tensor | None = None  # (c,) float32, summed over micro-batches

    def stop_gathering(self) -> None:
        self.is_gathering = False
        self.candidate_count = 0
        self.candidates = None
        self.candidate_grad = None

    def take_candidate_grad(self) -> torch.Tensor | None:
        """The candidates' gradient since the last call, (c,) float32, as `.grad` would have it; None: there is none."""
        taken, self.candidate_grad = self.candidate_grad, None
        return taken

    def observe(self, gradient: torch.Tensor) -> None:
        """Add the gradient at the candidates, (c,), of one backward pass."""
        gradient = gradient.detach().float()
        self.candidate_grad = gradient if self.candidate_grad is None else self.candidate_grad + gradient

    # Reselection

    @torch.no_grad()
    def replace(self, positions: torch.Tensor, new_indices: torch.Tensor) -> torch.Tensor:
        """Let the slots `positions` (m,) stand for `new_indices` (m,) with value 0, and sort all slots again.

        Returns:
            (k,) permutation p: slot i now holds what slot p[i] held; the optimiser's state must follow it.
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
            ValueError: a position that the weight does not have, or one twice.
        """
        order = self.indices.argsort()
        self.indices.copy_(self.indices[order])
        self.values.copy_(self.values[order])
        if self.indices.numel() == 0:
            return
        if self.indices[0] < 0 or self.indices[-1] >= self.dense_numel:
            raise ValueError(
                f"Delta positions must be in 0..{self.dense_numel - 1} (a weight of shape {tuple(self.shape)}), got "
                f"{self.indices[0].item()}..{self.indices[-1].item()}"
            )
        if (self.indices[1:] == self.indices[:-1]).any():
            raise ValueError("Delta positions must be distinct, but the file has some of them twice")


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

    adapter_layer_names = ("sft_delta",)
    widens_parameters = False  # SftConfig.dtype says what the values are

    def __init__(self, base_layer: nn.Module):
        nn.Module.__init__(self)
        AdditiveLayer.__init__(self, base_layer)
        self.sft_delta = nn.ModuleDict()

    def update_layer(self, name, config, *, k: int):
        weight = self.get_base_layer().weight
        dtype = DTYPES[config.dtype] or (weight.dtype if weight.is_floating_point() else torch.float32)
        self.sft_delta[name] = SparseDelta(self.op.stored_shape, k, dtype, elastic=config.budget == "global")

    def before_load(self, name, path, tensors):
        values = tensors.get(f"{path}.sft_delta.{name}.values")
        if values is not None:
            self.sft_delta[name].resize(values.shape[0])

    def after_load(self, name):
        self.sft_delta[name].sort()

    def delta_weight(self, name):
        delta = self.sft_delta[name]
        dense = torch.zeros(delta.dense_numel, dtype=delta.values.dtype, device=delta.values.device)
        return self.op.to_view(scatter_add(dense, delta).view(delta.shape))

    def fold(self, name, W, b):
        delta = self.sft_delta[name]
        stored = self.op.to_view(W)
        if delta.observer is not None:  # its values are all 0 then
            return self.op.to_view(delta.observer(stored)), b
        return self.op.to_view(scatter_add(stored.reshape(-1), delta).view(stored.shape)), b

    def remember(self, name, W, b):
        """The base weight's numbers at the delta's positions: with them unmerging is exact."""
        return self.op.to_view(W.detach()).reshape(-1)[self.sft_delta[name].indices.long()]

    def unfold(self, name, W, b, memory):
        stored = self.op.to_view(W).contiguous().clone()
        stored.view(-1)[self.sft_delta[name].indices.long()] = memory
        return self.op.to_view(stored), b

    def delta(self, name, x):
        return sparse_product(x, self.sft_delta[name], self.op.transposed)

    def _apply_adapters(self, names, x, *args, **kwargs):
        base, op = self.base_layer, self.op
        if any(self.sft_delta[name].observer is not None for name in names):
            return op.op(x, *self.folded(names))
        callable_only = args or kwargs or not no_global_hooks() or is_quantized(self.get_base_layer())
        writable = (
            not callable_only and is_plain(base) and not base.weight.requires_grad and base.weight.is_contiguous()
        )
        if op.kind == "Linear" and writable:
            return sparse_linear(x, base.weight, base.bias, [self.sft_delta[n] for n in names], op.transposed)
        if op.kind == "Linear":
            return super()._apply_adapters(names, x, *args, **kwargs)
        return op.op(x, *self.folded(names))
