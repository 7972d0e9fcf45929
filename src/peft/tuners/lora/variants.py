"""Variants of LoRA: what they make of the weight and of the output instead of adding `scaling * B A`.

A layer asks its adapter's variant, if it has one, in three places: `create`, `post` and `fold` (with `start`, which
sets the variant's own parameters when the base weight is final). All else, merging included, is the layer's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .init import at_work


class Variant:
    """One adapter's variant; it keeps its parameters in the layer."""

    def create(self, layer, name: str) -> None:
        """Create the parameters of adapter `name` besides A and B."""

    def start(self, layer, name: str, config) -> None:
        """Set them to their start; called when A, B and the base weight have got theirs."""

    def post(self, layer, name: str, x: torch.Tensor, y: torch.Tensor, before: Sequence[str]) -> torch.Tensor:
        """As `BaseTunerLayer.post`."""
        raise NotImplementedError

    def fold(self, layer, name: str, W: torch.Tensor, b: torch.Tensor | None):
        """As `BaseTunerLayer.fold`."""
        raise NotImplementedError


class Magnitude(nn.Module):
    """DoRA's m, one number per output channel, in `weight`: (O,), of convolutions (1, O, 1, ...).

    It is called, not read, so that what shards modules around their calls (FSDP) has gathered it.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, norm: torch.Tensor) -> torch.Tensor:
        """`m / norm`, (O,); a channel of zeros stays one."""
        return self.weight.flatten() / norm.masked_fill(norm == 0, 1).to(self.weight.dtype)


class Dora(Variant):
    """Weight-decomposed LoRA (arXiv 2402.09353): `W' = m V / ||V||`, `V = W + scaling B A`, rows normalised (eq. 5).

    The norm is a constant to the gradient (section 4.3). With `c = m / ||V||`, the output `y = W x + b` becomes
    `y + (c - 1)(y - b) + c scaling B A x`, so that the base layer's product is used as it is.
    """

    def create(self, layer, name):
        if layer.merged:
            raise ValueError(
                f"DoRA starts from the norms of the base weight, and {layer.merged_adapters} are merged into it: call "
                "unmerge_adapter() first"
            )
        shape = (layer.out_features,)
        if layer.op.channel_dim == 1:
            shape = (1, *shape, *[1] * len(layer.op.kernel))
        layer.lora_magnitude_vector[name] = Magnitude(shape)

    @torch.no_grad()
    def start(self, layer, name, config):
        weight = layer.lora_magnitude_vector[name].weight
        if weight.is_meta:
            return
        W, _ = layer.op.load()
        # At least float32, whatever the model has: a rounded magnitude would make a new adapter differ from the base.
        weight.data = self.norm(layer, name, at_work(W, config)).view(weight.shape).to(weight.device)

    @torch.no_grad()
    def norm(self, layer, name: str, W: torch.Tensor) -> torch.Tensor:
        """`||V||` of every output channel, (O,), in float32 or wider."""
        wide = torch.promote_types(W.dtype, torch.float32)
        V = W + layer.delta_weight(name).to(W.device, wide)
        return torch.linalg.vector_norm(V.flatten(1), dim=1)

    def post(self, layer, name, x, y, before):
        W, b = layer.folded(before)
        c = layer.lora_magnitude_vector[name](self.norm(layer, name, W))
        c = layer.op.channels(c, y).to(y.dtype)
        own = y if b is None else y - layer.op.channels(b, y).to(y.dtype)
        return y + (c - 1) * own + c * layer.delta(name, x).to(y.dtype)

    def fold(self, layer, name, W, b):
        c = layer.lora_magnitude_vector[name](self.norm(layer, name, W)).to(W)
        V = W + layer.delta_weight(name).to(W)
        return V * c.view(-1, *[1] * (W.dim() - 1)), b


def variant_of(config) -> Variant | None:
    """The variant that a configuration asks for."""
    return Dora() if config.use_dora else None
