"""Quantised storage: one registry of how to read and write the packed weight of a layer.

A backend is a `match` on the layer, a `dequantize(layer) -> weight as stored` and, where the packed form can be
rewritten, a `requantize(layer, weight)`. Methods never see a backend: they go through `tuners.ops`. Backends register
themselves with `register_backend`; this module holds the registry and the plain case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .._lazy import explain_missing


@dataclass(frozen=True)
class QuantizationBackend:
    """How one library stores weights."""

    name: str
    match: Callable[[nn.Module], bool]
    dequantize: Callable[[nn.Module], torch.Tensor]
    requantize: Callable[[nn.Module, torch.Tensor], None] | None = None


_BACKENDS: list[QuantizationBackend] = []


def register_backend(backend: QuantizationBackend) -> None:
    """Add a backend; the latest registered is asked first."""
    _BACKENDS.insert(0, backend)


def find_backend(layer: nn.Module) -> QuantizationBackend | None:
    """The backend of a layer; None for a layer that holds its weight in the clear."""
    return next((backend for backend in _BACKENDS if backend.match(layer)), None)


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is packed (known backend or not)."""
    if find_backend(layer) is not None:
        return True
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point()


def dequantize(layer: nn.Module) -> torch.Tensor:
    """The weight of `layer` as stored, floating point; the parameter itself where it is not packed.

    Raises:
        TypeError: a packed weight that no registered backend can read.
    """
    backend = find_backend(layer)
    if backend is not None:
        return backend.dequantize(layer)
    if not layer.weight.is_floating_point():
        raise TypeError(
            f"The weight of {type(layer).__name__} is packed ({layer.weight.dtype}) and no registered backend can read "
            "it: this operation needs the dequantised weight. Training and saving the adapter work without it."
        )
    return layer.weight


def requantize(layer: nn.Module, weight: torch.Tensor) -> None:
    """Pack `weight` into `layer`.

    Raises:
        TypeError: the backend cannot rewrite a packed weight.
    """
    backend = find_backend(layer)
    if backend is None or backend.requantize is None:
        name = type(layer).__name__ if backend is None else backend.name
        raise TypeError(f"{name} weights cannot be rewritten here: merge into a dequantised copy of the model instead")
    backend.requantize(layer, weight)


def logical_numel(parameter: nn.Parameter) -> int:
    """Number of weights a parameter stands for; a packed one (bitsandbytes 4-bit) counts those it encodes."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


def keep_trainable(model: nn.Module) -> None:
    """See to it that gradients pass through packed weights after a forward pass in eval mode, too.

    On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight in the first forward pass in eval mode, for a kernel
    that has no backward pass, and leaves it so: training after an evaluation fails, or gradients go missing silently.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # by which bitsandbytes undoes the repacking
            module.support_avx512bf16_for_cpu = False


explain_missing(__name__)
