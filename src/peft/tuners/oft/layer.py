"""The OFT layer: the base layer on rotated features, `y = W (R^T x)` with R block-diagonal and orthogonal.

arXiv 2306.07280, section 3, in the input-centric form of arXiv 2506.19847: the activations are rotated, not the weight,
so that packed weights need not be unpacked. A convolution's features are the patches that it sees; there the weight is
rotated. An embedding has no features to take, and its output is rotated.

Shape letters: r blocks of b features, O output channels, I input channels, K kernel.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ...utils.warning import warn
from ..rotation import RotationLayer


class OFTRotationModule(nn.Module):
    """The rotations of one adapter in one layer: `forward()` gives them, (r, b, b).

    Each is Cayley's transform of a skew-symmetric matrix S, of which the entries above the diagonal are the parameters.
    """

    def __init__(self, r: int, block_size: int, config):
        super().__init__()
        self.r, self.block_size = r, block_size
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.eps = config.eps if config.coft else None
        self.dropout = config.module_dropout
        count = 1 if config.block_share else r
        self.weight = nn.Parameter(torch.zeros(count, block_size * (block_size - 1) // 2))  # (r or 1, b (b - 1) / 2)
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def forward(self, training: bool = False) -> torch.Tensor:
        b, eye = self.block_size, torch.eye(self.block_size, device=self.weight.device)
        i, j = torch.triu_indices(b, b, 1, device=self.weight.device)
        values = self._constrained(training)
        eye = eye.to(values)
        S = values.new_zeros(len(values), b, b)
        S[:, i, j] = values
        S = S - S.mT
        R = torch.linalg.solve(eye + S, eye - S) if self.terms is None else self._neumann(eye, S)
        if training and self.dropout:
            dropped = torch.rand(self.r, 1, 1, device=R.device) < self.dropout
            R = torch.where(dropped, eye, R)
        return R.expand(self.r, b, b)

    def _neumann(self, eye: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
        """`(I + S)(I - S)^-1` by the first terms of the inverse's series, (I + S)(I + S + S^2 + ...).

        As upstream sums them, so that its files mean the same: 1, 2, ..., 2, 1 times the powers of S, and with two
        terms I + 2 S. (It is the inverse of the exact rotation for the same S.)
        """
        if self.terms == 2:
            return eye + 2 * S
        R, power = eye + 2 * S, S
        for _ in range(2, max(self.terms, 4) - 1):
            power = power @ S
            R = R + 2 * power
        return R + power @ S

    def _constrained(self, training: bool) -> torch.Tensor:
        """The parameters in full precision; with coft, within their ball around 0.

        In training they are put there themselves: projected gradient descent.
        """
        factor = None
        if self.eps is not None:
            radius = self.eps / math.sqrt(2 * len(self.weight))  # S has each of them twice
            factor = (radius / self.weight.detach().norm(dim=1, keepdim=True)).clamp(max=1)
            if training and torch.is_grad_enabled():
                self.weight.data.mul_(factor)
                factor = None
        values = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return values if factor is None else values * factor


class OFTLayer(RotationLayer):
    """OFT on linear layers, convolutions and embeddings."""

    adapter_layer_names = module_dicts = ("oft_R", "oft_embedding_R")
    other_param_names = ("r", "oft_block_size")

    @property
    def _rotations(self) -> nn.ModuleDict:
        return self.oft_embedding_R if self.op.kind == "Embedding" else self.oft_R

    def update_layer(self, name, config):
        self.refuse_groups()
        features = self.op.matrix_shape[0 if self.op.kind == "Embedding" else 1]
        given = config.oft_block_size or config.r
        found = nearest_divisor(features, given)
        block_size = found if config.oft_block_size else features // found
        if block_size == 1:
            raise ValueError(
                f"OFT has nothing to rotate in blocks of one of {features} features (r={config.r}, oft_block_size="
                f"{config.oft_block_size}): choose others, or leave the layer out of target_modules"
            )
        if found != given and not config.from_file:
            what = "oft_block_size" if config.oft_block_size else "r"
            warn(f"{what}={given} does not divide {features} features; layers with so many take {found}")
        self.r[name], self.oft_block_size[name] = features // block_size, block_size
        self._rotations[name] = OFTRotationModule(self.r[name], block_size, config)

    def pre(self, name, x):
        return x if self.op.kind == "Embedding" else self._turned(name, x)

    def post(self, name, x, y, before=()):
        return self._turned(name, y) if self.op.kind == "Embedding" else y

    def _turned(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """Rows of activations (..., r b) times R."""
        R = self._rotations[name](self.training).to(t.dtype)
        blocks = t.unflatten(-1, R.shape[:2])
        return torch.einsum("...rb,rbc->...rc", blocks, R).flatten(-2).to(t.dtype)

    def turned_weight(self, name, W, training=False):
        """`W R^T`, and for embeddings `R^T W`."""
        R = self._rotations[name](training).to(W)
        if self.op.kind == "Embedding":
            return torch.einsum("rbi,rbc->rci", W.unflatten(0, R.shape[:2]), R).flatten(0, 1)
        blocks = W.flatten(1).unflatten(1, R.shape[:2])
        return torch.einsum("orb,rcb->orc", blocks, R).reshape(W.shape)


def nearest_divisor(features: int, wanted: int) -> int:
    """The divisor of `features` that is nearest to `wanted`; of two equally near ones the smaller."""
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))


class Linear(OFTLayer):
    """OFT on linear layers, packed ones too, and transformers' Conv1D."""


class Conv2d(OFTLayer):
    """OFT on 2-d convolutions."""


class Embedding(OFTLayer):
    """OFT on embeddings."""
