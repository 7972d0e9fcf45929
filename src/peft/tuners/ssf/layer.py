"""The SSF layer: `y' = y * scale + shift`, one number each per output channel (arXiv 2210.08823, eq. 4).

Merging is exact algebra (eq. 5): `W <- scale W`, `b <- scale b + shift`. Unmerging puts the overwritten tensors back,
since a scale of 0 cannot be divided out.
"""

from __future__ import annotations

import torch
from torch import nn

from ..tuners_utils import BaseTunerLayer


class SsfLayer(BaseTunerLayer, nn.Module):
    """SSF on any layer with output channels: linear, convolution, embedding, norm."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")

    def __init__(self, base_layer: nn.Module):
        nn.Module.__init__(self)
        BaseTunerLayer.__init__(self, base_layer)
        self.ssf_scale = nn.ParameterDict()
        self.ssf_shift = nn.ParameterDict()

    def update_layer(self, name, config):
        self.ssf_scale[name] = nn.Parameter(torch.ones(self.out_features))
        self.ssf_shift[name] = nn.Parameter(torch.zeros(self.out_features))
        if config.init_ssf_weights == "normal" and not self.ssf_scale[name].is_meta:
            nn.init.normal_(self.ssf_scale[name], mean=1.0, std=0.02)
            nn.init.normal_(self.ssf_shift[name], mean=0.0, std=0.02)

    def post(self, name, x, y, before=()):
        # In the parameters' precision: bfloat16 would round a scale of 1.003 to 1.
        scale, shift = (self.op.channels(v[name], y) for v in (self.ssf_scale, self.ssf_shift))
        return torch.addcmul(shift, y.to(torch.promote_types(y.dtype, scale.dtype)), scale).to(y.dtype)

    def fold(self, name, W, b):
        scale, shift = self.ssf_scale[name].to(W), self.ssf_shift[name].to(W)
        return self.op.add_shift(self.op.scale_channels(W, scale), None if b is None else b * scale.to(b), shift)
