"""LoHa layers: `W + scaling * (A1 B1) * (A2 B2)`, the product of the two taken number by number.

The product of two matrices of rank r may have rank r^2, from as many numbers as LoRA needs for rank 2 r (arXiv
2108.06098, section 2.2; for convolutions proposition 3).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..lycoris_utils import LycorisLayer, kernel_factors
from ..ops import no_global_hooks


class FormedTwice(torch.autograd.Function):
    """`apply(x, scaling, a1, b1, a2, b2)`: `scaling * x ((a1 b1) * (a2 b2))^T` for x (..., I), factors (O, r), (r, I).

    Torch's operations would keep three matrices as large as the weight for the backward pass, in every layer; here the
    backward pass forms them again.
    """

    @staticmethod
    def forward(ctx, x, scaling, *factors):
        ctx.scaling = scaling
        ctx.save_for_backward(x, *factors)
        return F.linear(x, (hadamard(*factors) * scaling).to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        x, *factors = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # create_graph
        need_x, _, *needed = ctx.needs_input_grad
        with torch.enable_grad():
            D = hadamard(*factors) * ctx.scaling
        gx = g @ (D if twice else D.detach()).to(g.dtype) if need_x else None
        wanted = [factor for factor, need in zip(factors, needed) if need]
        gradients = iter(())
        if wanted:
            gD = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(g.dtype)  # (O, I)
            gradients = iter(torch.autograd.grad(D, wanted, gD.to(D.dtype), create_graph=twice))
        return gx, None, *(next(gradients) if need else None for need in needed)


def hadamard(a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    return (a1 @ b1) * (a2 @ b2)


class LoHaLayer(LycorisLayer):
    """LoHa on a layer of any kind that has a matrix or a kernel as its weight."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def update_layer(self, name, config, **kwargs):
        super().update_layer(name, config, rank_dropout_scale=True, **kwargs)

    def shapes(self, r, config):
        outputs, inputs, *kernel = self.op.weight_shape
        if not self.has_own_kernel(config):
            a, b = (outputs, r), (r, inputs * math.prod(kernel))
            return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        a, b = (r, outputs), (r, inputs)
        t = (r, r, *kernel, *[1] * (len(kernel) == 1))  # one-dimensional kernels are stored as (K, 1)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b, "hada_t1": t, "hada_t2": t}

    def zero_factor(self, name, config):
        return "hada_w2_b"

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
        if torch.compiler.is_compiling() or not no_global_hooks():
            return super().delta(name, x)
        return FormedTwice.apply(x, self.scaling[name], *self.factors(name))


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
