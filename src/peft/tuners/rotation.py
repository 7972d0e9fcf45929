"""What OFT and BOFT share: layers that rotate the features which a weight takes in."""

from __future__ import annotations

import torch
from torch import nn

from .tuners_utils import BaseTunerLayer


class RotationLayer(BaseTunerLayer, nn.Module):
    """Rotates the input of linear layers (`pre`), and the weight of convolutions, whose features are the patches that
    they see: give `turned_weight`."""

    def refuse_groups(self) -> None:
        """Refuse a layer whose input features are not seen together.

        Raises:
            ValueError: a grouped convolution.
        """
        if getattr(self.op, "groups", 1) > 1:
            raise ValueError(
                f"All input features are rotated together, which a grouped convolution (groups={self.op.groups}) does "
                "not see together: leave it out of target_modules"
            )

    def turned_weight(self, name: str, W: torch.Tensor, training: bool = False) -> torch.Tensor:
        """`W` (O, I, *K) with the adapter in it; what drops rotations does so in training."""
        raise NotImplementedError

    @property
    def base_is_apart(self):
        return not self.op.kind.startswith("Conv")

    def _apply_adapters(self, names, x, *args, **kwargs):
        if self.base_is_apart:
            return super()._apply_adapters(names, x, *args, **kwargs)
        W, b = self.op.load()
        for name in names:
            W = self.turned_weight(name, W, self.training)
        return self.op.op(x, W.to(x.dtype), b)

    def fold(self, name, W, b):
        return self.turned_weight(name, W), b
