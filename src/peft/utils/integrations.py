"""Helpers around packed, off-loaded and sharded weights, under the names by which other libraries import them."""

from __future__ import annotations

import torch
from torch import nn

from .._lazy import explain_missing
from .placement import gathered as gather_params_ctx, onloaded
from .quantization_utils import dequantize

__all__ = ["dequantize_module_weight", "gather_params_ctx"]


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a layer as a floating-point parameter (frozen), in the shape in which torch's own layer stores it.

    Itself where it is not packed.
    """
    with onloaded(module):
        weight = dequantize(module)
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


explain_missing(__name__)
