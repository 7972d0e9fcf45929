"""The score that is a sum over layers: how far the gradients of a layer's tokens agree on one change of its weight.

A weight W has the inputs x (N, I) and the gradients g (N, O) of its outputs, of all N tokens of a batch. Its gradient
G = g^T x (O, I) is what changes the loss for all tokens at once; were every token free to have its own change of W, the
loss would fall by |g|_F |x|_F instead. The ratio is a number for each module and size, comes from one forward and
backward pass of the frozen model, and adds up over modules. With sigma the singular values of G in falling order, and
y (N, O) the output:

    LoRA, rank r  sum_{i<=r} sigma_i / (|g|_F |x|_F)      at most 1, since |g^T x|_* <= |g|_F |x|_F
    SSF           |sum_n g*y|_1 / (|g|_F |y|_F) + |sum_n g|_1 / (|g|_F |1|_F)
    SFT, k        sum of the k largest |G_ij| / (|g|_F |x|_F)

The numerators are the first-order decrease of the loss by a step that moves every direction equally far, as Adam's and
Muon's do: the dual of the spectral norm (LoRA), or of the largest entry (SSF, SFT). Without the denominators the last
layers of a model would win, whose gradients are the largest; that says little about the loss after training, as the
measurements in docs/source/denas.md show.

Several batches are averaged. Nothing of the model is changed, and memory is that of one weight's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...utils.peft_types import PeftType
from ..ops import Op
from .space import SearchSpace
from .structure import sft_weights

OVERSAMPLING, POWER_ITERATIONS = 20, 2
"""Singular values that fall by 7 % each come out with an error below 1e-5 (6,000 draws; 3e-2 with an oversampling of
8, which is only a tenth faster)."""
EXACT_UP_TO = 128
"""Smaller side of a matrix up to which all singular values are computed, not only the largest ones."""


def singular_values(G: Tensor, count: int) -> Tensor:
    """The `count` largest singular values of G (O, I), zeros where it has fewer; randomised for large matrices.

    Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 5.1 with power iterations.
    """
    G = G.float()
    if min(G.shape) <= max(EXACT_UP_TO, count + OVERSAMPLING):
        sigma = torch.linalg.svdvals(G)[:count]
    else:
        sigma = torch.svd_lowrank(G, q=count + OVERSAMPLING, niter=POWER_ITERATIONS)[1][:count]
    return torch.nn.functional.pad(sigma, (0, count - sigma.numel()))


def lora_value(G: Tensor, ranks: Sequence[int]) -> Tensor:
    """`sum_{i<=r} sigma_i(G)` for each rank."""
    sums = singular_values(G.flatten(1), max(ranks)).double().cumsum(0)
    return sums[torch.tensor(ranks, device=sums.device) - 1]


def sft_value(G: Tensor, counts: Sequence[int]) -> Tensor:
    """Sum of the k largest `|G_ij|` for each k."""
    top = G.flatten().abs().topk(max(counts)).values.double().cumsum(0)
    return top[torch.tensor(counts, device=top.device) - 1]


def weight_gradient(op: Op, x: Tensor, g: Tensor) -> Tensor:
    """G (O, I, *K) of one call: input `x`, gradient of the output `g`."""
    W = torch.zeros(op.weight_shape, dtype=g.dtype, device=g.device, requires_grad=True)
    with torch.enable_grad():
        return torch.autograd.grad(op.op(x.to(g.dtype) if x.is_floating_point() else x, W, None), W, g)[0]


class _Probe:
    """Hooks on one module: sums the gradients of its calls, and values them when the last has come."""

    def __init__(self, op: Op, finish):
        self.op, self.finish = op, finish
        self.calls, self.total = 0, None

    def forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if not output.requires_grad:  # the model is frozen: the first targets are where its graph begins
            output = output.detach().requires_grad_().clone()
        self.calls += 1
        kept = (x.detach(), output.detach())
        output.register_hook(lambda g: self.backward(*kept, g))
        return output

    @torch.no_grad()
    def backward(self, x: Tensor, y: Tensor, g: Tensor) -> None:
        new = self.gradient(x, y, g)
        self.total = new if self.total is None else [a + b for a, b in zip(self.total, new)]
        self.calls -= 1
        if not self.calls:
            self.finish(self.total)
            self.total = None

    def gradient(self, x: Tensor, y: Tensor, g: Tensor) -> list[Tensor]:
        """What adds up over calls: the gradient of the weight (O, I, *K), |g|_F^2 and |x|_F^2.

        Numbers of tokens (an embedding's input) stand for vectors of norm 1.
        """
        inputs = square_norm(x) if x.is_floating_point() else torch.tensor(x.numel(), dtype=torch.float64)
        return [weight_gradient(self.op, x, g), square_norm(g), inputs]


class _ChannelProbe(_Probe):
    """For SSF: the gradients of scale and shift (O,) instead of the weight's, |g|_F^2, |y|_F^2 and |1|_F^2."""

    def gradient(self, x, y, g):
        channel = self.op.channel_dim % y.dim()
        others = [d for d in range(y.dim()) if d != channel]
        size = torch.tensor(y.numel(), dtype=torch.float64)
        return [(g.double() * y.double()).sum(others), g.double().sum(others), square_norm(g), square_norm(y), size]


def square_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float64).square()


def score_table(model: nn.Module, space: SearchSpace, batches: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The value of every unit by size, (U, V), from one forward and backward pass of each batch.

    Raises:
        ValueError: the model returns no loss, the gradients are not finite, or none reaches a target.
    """
    values: dict[str, Tensor] = {}

    def finish(key: str, parts: list[Tensor]) -> None:
        if not all(part.isfinite().all() for part in parts):
            raise ValueError(f"The gradients of {key} are not finite: use another batch, or the model in float32")
        new = _value(space, key, parts).cpu()
        values[key] = values[key] + new if key in values else new

    kind = _ChannelProbe if space.method == PeftType.SSF else _Probe
    handles = []
    try:
        for key, op in space.layout.ops.items():
            probe = kind(op, lambda parts, key=key: finish(key, parts))
            handles.append(op.layer.register_forward_hook(probe.forward, with_kwargs=True))
        for batch in batches:
            loss_of(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
    if not values:
        raise ValueError(
            "The loss depends on none of the adapter's targets: is the batch what the model is trained on?"
        )
    nothing = torch.zeros(space.costs.shape[1], dtype=torch.float64)
    table = [sum((values.get(key, nothing) for key in unit.keys), nothing) for unit in space.units]
    return torch.stack(table).numpy() / len(batches)


def _value(space: SearchSpace, key: str, parts: list[Tensor]) -> Tensor:
    if space.method == PeftType.SSF:
        scale, shift, g2, y2, size = parts
        return (ratio(scale.abs().sum(), g2, y2) + ratio(shift.abs().sum(), g2, size)).reshape(1)
    G, g2, x2 = parts
    if space.method == PeftType.LORA:
        value = lora_value(G, space.values[0])
    else:
        value = sft_value(G, [sft_weights(space.layout, key, space.config, share) for share in space.values[0]])
    return ratio(value, g2, x2)


def ratio(value: Tensor, *squares: Tensor) -> Tensor:
    """`value` over the product of two norms, which are given as squares; 0 where they are."""
    norm = torch.stack([square.to(value.device) for square in squares]).sqrt().prod()
    return value / norm if norm else torch.zeros_like(value)


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss.

    Raises:
        ValueError: it returns none.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for the batch with {sorted(batch)}: give a batch with labels, "
            "or score='deltatuner', which needs none"
        )
    return loss
