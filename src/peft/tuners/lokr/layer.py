"""LoKr layers: `W + scaling * kron(w1, w2)` (arXiv 2309.14859).

With `O = O1 O2` outputs and `I = I1 I2` inputs, w1 is (O1, I1) and w2 (O2, I2, *K); each may be a product of rank r.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..lycoris_utils import LycorisLayer, kernel_factors


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`(m, n)` with `m n = dimension`: m is `factor` if that divides, else the largest divisor up to it with m <= n."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    m = next(m for m in range(max(most, 1), 0, -1) if dimension % m == 0)
    return m, dimension // m


class LoKrLayer(LycorisLayer):
    """LoKr on a layer of any kind that has a matrix or a kernel as its weight."""

    adapter_layer_names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def shapes(self, r, config):
        (O1, O2), (I1, I2) = (factorization(size, config.decompose_factor) for size in self.op.weight_shape[:2])
        if config.decompose_both and r < max(O1, I1) / 2:
            first = {"lokr_w1_a": (O1, r), "lokr_w1_b": (r, I1)}
        else:
            first = {"lokr_w1": (O1, I1)}
        if r >= max(O2, I2) / 2:
            return first | {"lokr_w2": (O2, I2, *self.op.kernel)}
        if (t := self.kernel_shape(r, config)) is not None:
            return first | {"lokr_t2": t, "lokr_w2_a": (r, O2), "lokr_w2_b": (r, I2)}
        return first | {"lokr_w2_a": (O2, r), "lokr_w2_b": (r, I2 * math.prod(self.op.kernel))}

    def zero_factors(self, config):
        return ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")

    def first(self, name: str) -> torch.Tensor:
        """w1, (O1, I1)."""
        return self.lokr_w1[name] if name in self.lokr_w1 else self.lokr_w1_a[name] @ self.lokr_w1_b[name]

    def second(self, name: str) -> torch.Tensor:
        """w2: (O2, I2, *K), or as a product of two (O2, I2 K)."""
        if name in self.lokr_w2:
            return self.lokr_w2[name]
        if name in self.lokr_t2:
            return kernel_factors(self.lokr_t2[name], self.lokr_w2_b[name], self.lokr_w2_a[name])
        return self.lokr_w2_a[name] @ self.lokr_w2_b[name]

    def product(self, name):
        w1, w2 = self.first(name), self.second(name)
        if w2.dim() > 3:  # (O2, I2, K) is left to torch, which pairs w1 with its last dimensions: so upstream's files
            w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - 2))  # of one-dimensional convolutions mean it
        return torch.kron(w1, w2.contiguous()).view(self.op.weight_shape)


class Linear(LoKrLayer):
    def delta(self, name, x):
        """`kron(w1, w2) x = w1 X w2^T` for the input as a matrix X (I1, I2): nothing as large as the weight is made."""
        w1 = self.first(name).to(x.dtype)
        X = x.unflatten(-1, (w1.shape[1], -1))
        w2 = (self.lokr_w2[name],) if name in self.lokr_w2 else (self.lokr_w2_b[name], self.lokr_w2_a[name])
        for factor in w2:
            X = F.linear(X, factor.to(x.dtype))
        return (w1 @ X).flatten(-2) * self.scaling[name]  # (..., O1, O2)


class Conv1d(LoKrLayer):
    pass


class Conv2d(LoKrLayer):
    pass


class Embedding(LoKrLayer):
    def delta(self, name, x):
        """The rows of the tokens alone: a column of a Kronecker product is that of two columns."""
        w1, w2 = self.first(name).T, self.second(name).T
        first, second = F.embedding(x // len(w2), w1), F.embedding(x % len(w2), w2)
        return self.op.scaled((first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2) * self.scaling[name])
