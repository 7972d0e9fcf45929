"""The functions that other libraries integrate peft through: they work on models with injected adapters."""

from __future__ import annotations

import torch
from torch import nn

from .mapping import inject_adapter_in_model
from .tuners.base import remove_adapter
from .tuners.tuners_utils import BaseTunerLayer, as_list
from .utils.other import AuxiliaryTrainingWrapper
from .utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model", "set_adapter",
    "set_peft_model_state_dict", "set_requires_grad",
]  # fmt: skip


def _parts(model: nn.Module):
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make adapters active in all layers; see `BaseTunerLayer.set_adapter`."""
    for part in _parts(model):
        part.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | list[str], requires_grad: bool = True) -> None:
    """Let adapters train or not, in all layers."""
    for part in _parts(model):
        part.set_requires_grad(adapter_names, requires_grad)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None) -> list[str]:
    """Remove an adapter from all layers; those that have no other one become plain layers again.

    Args:
        prefix: of the method, as in upstream's signature; layers are found by their type.

    Returns:
        The adapters that are active then; if there would be none, the first that is left.
    """
    configs = getattr(model, "peft_config", {})
    active = next((part.active_adapters for part in _parts(model)), [])
    remove_adapter(model, adapter_name)
    left = [name for name in as_list(active) if name != adapter_name]
    others = [name for name in configs if name != adapter_name]
    if not left and others:
        left = others[:1]
        set_adapter(model, left, inference_mode=configs[left[0]].inference_mode)
    return left


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widen an adapter's half-precision parameters to float32."""
    if not autocast_adapter_dtype:
        return
    for part in _parts(model):
        if isinstance(part, BaseTunerLayer) and part.widens_parameters:
            for _, parameter in part.adapter_tensors(adapter_name):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
