"""The IA3 layer: one factor per output channel, `y' = l * y`, or per input channel, `y' = f(l * x)`.

arXiv 2205.05638, section 3.3: factors on keys and values, and on what the second feed-forward layer takes. Merging is
`W <- diag(l) W`, `b <- l * b`, or `W <- W diag(l)`; unmerging puts the overwritten tensors back, since a factor of 0
cannot be divided out.

Shape letters: O output channels, I input channels, K kernel.
"""

from __future__ import annotations

import torch
from torch import nn

from ..tuners_utils import BaseTunerLayer


class IA3Layer(BaseTunerLayer, nn.Module):
    """IA3 on linear layers and convolutions, and, scaling their output, on embeddings and norms."""

    adapter_layer_names = ("ia3_l",)
    other_param_names = ("feedforward",)  # whether an adapter scales the input

    @property
    def is_feedforward(self) -> bool:
        return any(self.feedforward.values())

    def update_layer(self, name, config, *, is_feedforward: bool):
        if is_feedforward and self.op.kind in ("Embedding", "Norm"):
            raise ValueError(
                "not supported in feedforward_modules, since its input has no channels with weights of their own: "
                "leave it out there, and its output is scaled"
            )
        self.feedforward[name] = is_feedforward
        count = self.in_features if is_feedforward else self.out_features
        if self.op.channel_dim == 1:
            shape = (1, count, *[1] * len(self.op.kernel))  # as convolutions' outputs
        else:
            shape = (1, count) if is_feedforward else (count, 1)
        self.ia3_l[name] = nn.Parameter(torch.ones(shape))
        if not config.init_ia3_weights:
            nn.init.normal_(self.ia3_l[name])

    def _scaled(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """An input or output times the factors, in the wider of the two types."""
        return (t * self.op.channels(self.ia3_l[name].flatten(), t)).to(t.dtype)

    def pre(self, name, x):
        return self._scaled(name, x) if self.feedforward[name] else x

    def post(self, name, x, y, before=()):
        return y if self.feedforward[name] else self._scaled(name, y)

    def fold(self, name, W, b):
        factors = self.ia3_l[name].flatten().to(W)
        if self.feedforward[name]:
            return self.op.scale_inputs(W, factors), b
        return self.op.scale_channels(W, factors), None if b is None else b * factors.to(b)


class Linear(IA3Layer):
    """IA3 on linear layers, packed ones too, and transformers' Conv1D."""


class Conv2d(IA3Layer):
    """IA3 on 2-d convolutions."""


class Conv3d(IA3Layer):
    """IA3 on 3-d convolutions."""
