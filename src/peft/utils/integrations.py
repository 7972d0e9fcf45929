"""Helpers around packed, off-loaded and sharded weights, under the names by which other libraries import them."""

from __future__ import annotations

from torch import nn

from .._lazy import explain_missing
from .placement import gathered as gather_params_ctx, onloaded  # noqa: F401
from .quantization_utils import dequantize


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a layer as a floating-point parameter (frozen), in the shape in which torch's own layer stores it.

    Itself where it is not packed.
    """
    with onloaded(module):
        weight = dequantize(module)
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


explain_missing(__name__, {"init_empty_weights": "accelerate"})
