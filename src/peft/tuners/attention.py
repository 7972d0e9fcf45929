"""Adapters on `nn.MultiheadAttention`, which takes the weights of its two projections and calls neither of them.

So an adapter layer around it, or around its `out_proj`, gives its weight with the adapters folded in to whoever takes
it, differentiable: torch's functions and their fast paths then do what they always do, and every method with a `fold`
works. What no weight can say (dropout of the adapter's input, another adapter for every row) is done by calling: the
projections run as layers, and between them the attention, with identities in their places.

Letters: N rows of a batch, E width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ..utils.mixed_batch import run_by_row
from ..utils.other import AdapterParts, walk
from ..utils.placement import offload_hook
from .ops import Op


def _asked(name: str) -> property:
    return property(lambda self: getattr(self._attention(), name))


def _chain(layer: nn.Module) -> Iterator[ReadLayer]:
    """The adapter layers around a base layer, of several methods one in the other."""
    while isinstance(layer, ReadLayer):
        yield layer
        layer = layer.base_layer


class ReadLayer(AdapterParts):
    """The part of `BaseTunerLayer` that is about weights which others take from the layer."""

    base_layer: nn.Module
    op: Op

    @property
    def weight(self) -> torch.Tensor:
        return self.read()[0] if self.op.is_read else self.op.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.read()[1] if self.op.is_read else self.op.bias

    def read(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(W, b)` with the active adapters of this layer and of those inside of it; without any the layer's own."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        names = [] if self._disable_adapters else self._applied_adapters()
        inner = self.base_layer
        if isinstance(inner, ReadLayer):
            W, b = inner.read()
        else:
            W, b = self.op.load() if names else (self.op.weight, self.op.bias)
        for name in names:
            W, b = self.fold(name, W, b)
        return W, b

    def _attention(self) -> nn.MultiheadAttention:
        attention = self.get_base_layer()
        if not isinstance(attention, nn.MultiheadAttention):
            raise AttributeError(f"{type(self).__name__} has no attributes of an attention")
        return attention

    def _packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention = self._attention()
        return self.read() if self.op.is_read else (attention.in_proj_weight, attention.in_proj_bias)

    # What torch's transformer layers ask an attention for.
    in_proj_weight, in_proj_bias = property(lambda self: self._packed()[0]), property(lambda self: self._packed()[1])
    embed_dim, num_heads, head_dim = _asked("embed_dim"), _asked("num_heads"), _asked("head_dim")
    batch_first, _qkv_same_embed_dim = _asked("batch_first"), _asked("_qkv_same_embed_dim")
    out_proj = _asked("out_proj")

    def _drops_now(self) -> bool:
        """Whether a forward pass drops something of what it gives to an adapter, which no weight can say."""
        return self.training and not self._disable_adapters and not self._dropping.isdisjoint(self._applied_adapters())

    def _attend(self, adapter_names: Sequence[str] | None, *args, **kwargs):
        attention = self._attention()
        layers = [*_chain(self), *_chain(attention.out_proj)]
        if adapter_names is not None or any(layer._drops_now() for layer in layers):
            return self._attend_in_pieces(adapter_names, *args, **kwargs)
        W, b = self.read()
        if W is attention.in_proj_weight:
            return attention(*args, **kwargs)
        ours = {"in_proj_weight": W} if b is None else {"in_proj_weight": W, "in_proj_bias": b}
        return torch.func.functional_call(attention, ours, args, kwargs)

    def _attend_in_pieces(self, adapter_names, query, key, value, *args, **kwargs):
        attention = self._attention()
        width, is_batch = attention.embed_dim, query.dim() == 3
        if adapter_names is not None and not is_batch:
            raise ValueError(f"A mixed batch needs a query with rows, (N, L, E), got the shape {tuple(query.shape)}")
        turn = is_batch and not attention.batch_first

        def rows_first(t: torch.Tensor) -> torch.Tensor:
            return t.transpose(0, 1) if turn else t

        inputs = {id(x): x for x in (query, key, value)}
        packed = {at: rows_first(self._projected(adapter_names, rows_first(x))) for at, x in inputs.items()}
        parts = [packed[id(x)].split(width, -1)[i] for i, x in enumerate((query, key, value))]
        eye = torch.eye(width, device=parts[0].device, dtype=parts[0].dtype)
        ours = {"in_proj_weight": eye.repeat(3, 1)}
        if attention.in_proj_bias is not None:
            ours["in_proj_bias"] = eye.new_zeros(3 * width)
        nothing = nn.Linear(width, width, bias=False, device="meta")
        nothing.weight = nn.Parameter(eye, requires_grad=False)
        out, attention.out_proj = attention.out_proj, nothing
        try:
            y, weights = torch.func.functional_call(attention, ours, (*parts, *args), kwargs)
        finally:
            attention.out_proj = out
        names = {} if adapter_names is None or not isinstance(out, ReadLayer) else {"adapter_names": adapter_names}
        return rows_first(out(rows_first(y), **names)), weights

    def _projected(self, rows: Sequence[str] | None, x: torch.Tensor) -> torch.Tensor:
        """The in-projection as a layer, (N, L, E) -> (N, L, 3 E); with the active adapters, or one for each row."""
        if rows is None:
            return self._projected_by([] if self._disable_adapters else self._applied_adapters(), None, x)
        self._refuse_merged()

        def run(name: str, x: torch.Tensor) -> torch.Tensor:
            return self._projected_by([name] if name in self._available_adapters else [], [name] * len(x), x)

        return run_by_row(run, rows, (x,), {})

    def _projected_by(self, names: Sequence[str], rows: Sequence[str] | None, x: torch.Tensor) -> torch.Tensor:
        inner = self.base_layer
        if isinstance(inner, ReadLayer):
            return self._compose(names, partial(inner._projected, rows), x)
        W, b = self.op.load()
        return self._compose(names, partial(self.op.op, W=W, b=b), x)


def drops(config) -> bool:
    """Whether an adapter drops something in training."""
    return any(value for field, value in vars(config).items() if field.endswith("dropout"))


def check_attention(model: nn.Module, key: str, targets: Mapping[str, nn.Module], folds: bool, drops: bool) -> None:
    """Refuse what an adapter of a target that is an attention, or part of one, could not do.

    Raises:
        ValueError: the attention has no packed in-projection, or is off-loaded; or its `out_proj` is a target without
            it, and the adapter is more than a change of the weight.
    """
    target, owner = targets[key], key.rpartition(".")[0]
    parent = model.get_submodule(owner)
    is_alone = isinstance(parent, nn.MultiheadAttention) and owner not in targets
    if folds and isinstance(target, nn.MultiheadAttention) and not target._qkv_same_embed_dim:
        raise ValueError(
            f"Target module {key} (MultiheadAttention) is not supported: kdim={target.kdim} or vdim={target.vdim} is "
            f"not embed_dim={target.embed_dim}, so it has three in-projections instead of the one, packed "
            "in_proj_weight that adapters and their files are for. Its out_proj alone can be a target"
        )
    attention = parent if is_alone else target
    if folds and isinstance(attention, nn.MultiheadAttention) and offload_hook(attention) is not None:
        raise ValueError(
            f"Target module {key} is an off-loaded MultiheadAttention or part of one, which gets its own weights back "
            "whenever it runs: keep it on a device, or leave it out"
        )
    if is_alone and (drops or not folds):
        why = "drops something in training" if folds else "is no change of a weight"
        raise ValueError(
            f"Target module {key} is part of a MultiheadAttention of torch, which takes its weight without calling it, "
            f"and the adapter {why}, so it would have no effect: target {owner} as a whole, or leave it out"
        )


def check_mixed(model: nn.Module) -> None:
    """Refuse a mixed batch through an `out_proj` that torch does not call.

    Raises:
        ValueError: there is one.
    """
    modules = list(walk(model))
    around = {layer.get_base_layer() for _, layer in modules if isinstance(layer, ReadLayer)}
    for key, module in modules:
        is_bare = isinstance(module, nn.MultiheadAttention) and module not in around
        if is_bare and isinstance(module.out_proj, ReadLayer):
            raise ValueError(
                f"A mixed batch cannot go through {key}.out_proj, whose weight torch takes without calling it: target "
                f"{key} as a whole, or leave it out"
            )
