"""The BOFT layer: `y = s * W (R^T x) + bias`, with R a product of sparse rotations and s one scale per output channel.

arXiv 2311.06243, section 4: each factor rotates blocks of b features, and in factor i the blocks are made of half
blocks that lie 2^i half blocks apart, as in a fast Fourier transform; the first is block-diagonal. (The paper's
compiled kernel for block-diagonal matrices is not needed: a batched product does it.)

Shape letters: m factors, r blocks of b features, O output channels, I input channels, K kernel.
"""

from __future__ import annotations

import torch
from torch import nn

from ...utils.placement import onloaded, whole_tensor
from ..rotation import RotationLayer


class BOFTLayer(RotationLayer):
    """BOFT on linear layers and convolutions."""

    adapter_layer_names = ("boft_R", "boft_s")
    other_param_names = ("boft_block_size", "boft_block_num", "boft_dropout")

    def update_layer(self, name, config):
        self.refuse_groups()
        features = self.op.matrix_shape[1]
        for what in ("boft_block_size", "boft_block_num"):
            if getattr(config, what) and features % getattr(config, what):
                raise ValueError(f"{what}={getattr(config, what)} must divide the layer's {features} input features")
        b = config.boft_block_size or features // config.boft_block_num
        r, m = features // b, config.boft_n_butterfly_factor
        if m > 1 and (b % 2 or r % 2 ** (m - 1)):
            raise ValueError(
                f"boft_n_butterfly_factor={m} needs blocks of an even size and a number of them that 2^{m - 1} "
                f"divides; {features} features make {r} blocks of {b}"
            )
        self.boft_block_size[name], self.boft_block_num[name] = b, r
        self.boft_dropout[name] = config.boft_dropout
        self.boft_R[name] = nn.Parameter(torch.zeros(m, r, b, b))
        self.boft_s[name] = nn.Parameter(
            torch.ones((self.out_features, 1) if self.op.channel_dim == -1 else (1, self.out_features))
        )
        if not config.init_weights:
            nn.init.normal_(self.boft_R[name], std=0.1)
            nn.init.normal_(self.boft_s[name], mean=1.0, std=0.1)

    def before_load(self, name, path, tensors):
        """Take the number of factors from the file: upstream 0.21.2 makes one, whatever its configuration says."""
        value = tensors.get(f"{path}.boft_R.{name}")
        own = self.boft_R[name]
        if value is not None and value.shape[1:] == own.shape[1:] and len(value) != len(own):
            self.boft_R[name] = nn.Parameter(own.new_zeros(value.shape), own.requires_grad)

    def rotations(self, name: str, training: bool = False) -> torch.Tensor:
        """The blocks of all factors, (m, r, b, b): Cayley's transform of the parameters' skew-symmetric part."""
        A = self.boft_R[name]
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        S, eye = (A - A.mT) / 2, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        R = torch.linalg.solve(eye + S, eye - S)
        if training and self.boft_dropout[name]:
            dropped = torch.rand(*R.shape[:2], 1, 1, device=R.device) < self.boft_dropout[name]
            R = torch.where(dropped, eye, R)
        return R

    def _turned(self, t: torch.Tensor, R: torch.Tensor, inverse: bool) -> torch.Tensor:
        """Rows of features (..., r b) times the product of the factors `R`, or times its transpose."""
        factors = list(enumerate(R.to(t.dtype)))
        for i, blocks in reversed(factors) if inverse else factors:
            rows = butterfly(t, R.shape[-1], i).unflatten(-1, R.shape[1:3])
            product = torch.einsum("...rb,rcb->...rc" if inverse else "...rb,rbc->...rc", rows, blocks)
            t = butterfly(product.flatten(-2), R.shape[-1], i, back=True).to(t.dtype)
        return t

    def pre(self, name, x):
        return self._turned(x, self.rotations(name, self.training), inverse=False)

    def post(self, name, x, y, before=()):
        s = self.boft_s[name].flatten()
        scaled = y * s
        if self.op.bias is not None:  # it is not scaled
            with onloaded(self.op.layer):
                scaled = scaled + (1 - s) * whole_tensor(self.op.bias)
        return scaled.to(y.dtype)

    def turned_weight(self, name, W, training=False):
        turned = self._turned(W.flatten(1), self.rotations(name, training), inverse=True).reshape(W.shape)
        return self.op.scale_channels(turned, self.boft_s[name].flatten().to(W))


def butterfly(t: torch.Tensor, block_size: int, factor: int, back: bool = False) -> torch.Tensor:
    """Features (..., r b) in the order in which factor `factor` takes them for its blocks, or back from it.

    A block is made of half blocks number u and u + 2^factor, where u has no such bit; factor 0 takes them in order.
    """
    if factor == 0:
        return t
    halves = (2**factor, 2) if back else (2, 2**factor)
    return t.unflatten(-1, (-1, *halves, block_size // 2)).transpose(-3, -2).flatten(-4)


class Linear(BOFTLayer):
    """BOFT on linear layers, packed ones too, and transformers' Conv1D."""


class Conv2d(BOFTLayer):
    """BOFT on 2-d convolutions."""
