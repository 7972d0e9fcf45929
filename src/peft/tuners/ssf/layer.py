"""The SSF layer: `y' = y * scale + shift`, one number each per output channel (arXiv 2210.08823, eq. 4).

Merging is exact algebra (eq. 5): `W <- scale W`, `b <- scale b + shift`. Unmerging puts the overwritten tensors back,
since a scale of 0 cannot be divided out.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops import is_plain, no_global_hooks
from ..recompute import hooks_are_active
from ..tuners_utils import BaseTunerLayer
from .fused import ScaledLinear, ScaleShift, scale_shift


class SsfLayer(BaseTunerLayer, nn.Module):
    """SSF on any layer with output channels: linear, convolution, embedding, norm."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")

    def update_layer(self, name, config):
        _ = self.op.channel_dim  # some norms are run to find it: now, not while torch.compile traces
        self.ssf_scale[name] = nn.Parameter(torch.ones(self.out_features))
        self.ssf_shift[name] = nn.Parameter(torch.zeros(self.out_features))
        if config.init_ssf_weights == "normal":
            nn.init.normal_(self.ssf_scale[name], mean=1.0, std=0.02)
            nn.init.normal_(self.ssf_shift[name], mean=0.0, std=0.02)

    def post(self, name, x, y, before=()):
        scale, shift = (self.op.channels(v[name], y) for v in (self.ssf_scale, self.ssf_shift))
        if torch.compiler.is_compiling() or not no_global_hooks():
            return scale_shift(y, scale, shift)
        return ScaleShift.apply(y, scale, shift)

    base_is_apart = True

    def _apply_adapters(self, names, x, *args, **kwargs):
        if args or kwargs or not self._keeps_output(names[0], x):
            return super()._apply_adapters(names, x, *args, **kwargs)
        base, first = self.base_layer, names[0]
        y = ScaledLinear.apply(x, self.op.to_view(base.weight), base.bias, self.ssf_scale[first], self.ssf_shift[first])
        for i, name in enumerate(names[1:], start=1):
            y = self.post(name, x, y, names[:i])
        return y

    def _keeps_output(self, name: str, x: torch.Tensor) -> bool:
        """Whether `ScaledLinear` computes this layer with this input.

        The layer is plain, all is in full precision, and nobody wants to see the saved tensors.
        """
        base = self.base_layer
        if not (is_plain(base) and no_global_hooks()) or base.weight.requires_grad:
            return False
        dtypes = {x.dtype, base.weight.dtype, self.ssf_scale[name].dtype, self.ssf_shift[name].dtype}
        if dtypes not in ({torch.float32}, {torch.float64}) or torch.is_autocast_enabled(x.device.type):
            return False
        return not (torch.compiler.is_compiling() or hooks_are_active())

    def fold(self, name, W, b):
        scale, shift = self.ssf_scale[name].to(W), self.ssf_shift[name].to(W)
        return self.op.add_shift(self.op.scale_channels(W, scale), None if b is None else b * scale.to(b), shift)
