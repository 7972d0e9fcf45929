"""LoHa layers: `W + scaling * (A1 B1) * (A2 B2)`, the product of the two taken number by number.

The product of two matrices of rank r may have rank r^2, from as many numbers as LoRA needs for rank 2 r (arXiv
2108.06098, section 2.2; for convolutions proposition 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..lycoris_utils import LycorisLayer, kernel_factors
from ..ops import no_global_hooks


def product(x: torch.Tensor, scaling: float, *factors: torch.Tensor) -> torch.Tensor:
    """`scaling * x ((a1 b1) * (a2 b2))^T` for x (..., I), factors (O, r), (r, I)."""
    return F.linear(x, (hadamard(*factors) * scaling).to(x.dtype))


def hadamard(a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    return (a1 @ b1) * (a2 @ b2)


class LoHaLayer(LycorisLayer):
    """LoHa on a layer of any kind that has a matrix or a kernel as its weight."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def shapes(self, r, config):
        if (t := self.kernel_shape(r, config)) is None:
            outputs, inputs = self.op.matrix_shape
            a, b = (outputs, r), (r, inputs)
            return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        a, b = ((r, size) for size in self.op.weight_shape[:2])
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b, "hada_t1": t, "hada_t2": t}

    def zero_factors(self, config):
        return ("hada_w2_b",)

    def factors(self, name: str) -> tuple[torch.Tensor, ...]:
        return tuple(factor[name] for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b))

    def product(self, name):
        a1, b1, a2, b2 = self.factors(name)
        if name in self.hada_t1:
            D = kernel_factors(self.hada_t1[name], b1, a1) * kernel_factors(self.hada_t2[name], b2, a2)
        else:
            D = hadamard(a1, b1, a2, b2)
        return D.view(self.op.weight_shape)


class Linear(LoHaLayer):
    def delta(self, name, x):
        """Autograd would keep three matrices as large as the weight, in every layer: they are formed again instead."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not no_global_hooks():
            return super().delta(name, x)
        given = x, self.scaling[name], *self.factors(name)  # as they are now: the layer may change before backward
        return checkpoint(product, *given, use_reentrant=False, preserve_rng_state=False)


class Conv1d(LoHaLayer):
    pass


class Conv2d(LoHaLayer):
    pass


class Embedding(LoHaLayer):
    def delta(self, name, x):
        """The rows of the tokens alone, not all of the table's."""
        first = F.linear(F.embedding(x, self.hada_w1_b[name].T), self.hada_w1_a[name])
        second = F.linear(F.embedding(x, self.hada_w2_b[name].T), self.hada_w2_a[name])
        return self.op.scaled(first * second * self.scaling[name])
