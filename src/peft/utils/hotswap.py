"""Exchanging the numbers of a LoRA that is in place, without compiling the model again.

`prepare_model_for_compiled_hotswap` makes the adapter's tensors large enough for those to come and its scaling a
tensor; `hotswap_adapter` then writes other adapters into them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from .._lazy import explain_missing
from ..config import PeftConfig, split_hub_kwargs
from ..tuners.lora.config import LoraConfig
from ..tuners.lora.layer import LoraLayer, scaling_of
from ..tuners.lora.model import rank_and_alpha
from .peft_types import PeftType
from .save_and_load import adapter_keys, load_peft_weights
from .warning import warn

_PREFIX = "base_model.model."
# What is built into the layers (or, of patterns, into a compiled model) and does not come with the tensors.
_MUST_AGREE = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora", "lora_bias")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse configurations of which one cannot take the other's place.

    Raises:
        ValueError: another method than LoRA, or a field differs that is built into the layers.
    """
    for config in (config0, config1):
        if config.peft_type != PeftType.LORA:
            raise ValueError(f"Only LoRA adapters can be hot-swapped, got {config.peft_type}")
        if config.target_parameters:
            raise ValueError(f"LoRAs of bare parameters cannot be hot-swapped: {config.target_parameters}")
    for field in _MUST_AGREE:
        one, other = getattr(config0, field), getattr(config1, field)
        if one != other:
            raise ValueError(f"The adapters cannot be hot-swapped: {field} is {one!r} in one, {other!r} in the other")


def _lora_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter_name is None or adapter_name in module._available_adapters):
            yield path, module


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for adapters of other ranks and scalings; after loading the first adapter, before compiling.

    Args:
        target_rank: the largest rank to come: factors are padded with zeros to it. None: all have the ranks at hand.
        config: configurations (of the adapters by name) that are to say so too; their scaling stays.
        check_compiled: what to do about a model that is compiled already, for which this comes too late.

    Raises:
        ValueError: the model is compiled, has no LoRA, or a rank is larger than `target_rank`.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled must be 'error', 'warn' or 'ignore', got {check_compiled!r}")
    if _is_compiled(model) and check_compiled != "ignore":
        text = "prepare_model_for_compiled_hotswap must be called before the model is compiled"
        if check_compiled == "error":
            raise ValueError(text)
        warn(text)
    layers = list(_lora_layers(model))
    if not layers:
        raise ValueError("The model has no LoRA layers: load the first adapter before preparing it for others")
    if target_rank is not None and any(layer.op.kind == "Parameter" for _, layer in layers):
        raise ValueError("LoRAs of bare parameters (target_parameters) cannot be given another rank")
    largest = max(len(layer.factors(name)[0]) for _, layer in layers for name in layer._available_adapters)
    if target_rank is not None and largest > target_rank:
        raise ValueError(f"target_rank={target_rank} is smaller than a rank that the model has, {largest}")
    for _, layer in layers:
        for name in layer._available_adapters:
            if not torch.is_tensor(layer.scaling[name]):
                layer.scaling[name] = torch.tensor(layer.scaling[name], device=layer.factors(name)[0].device)
            if target_rank is not None:
                A, B = layer.factors(name)
                _resize(layer, name, target_rank, A.detach(), B.detach())
    for one in config.values() if isinstance(config, dict) else [config] if config is not None else []:
        if target_rank is not None:
            one.lora_alpha *= (target_rank / one.r) ** (0.5 if one.use_rslora else 1)
            one.r = target_rank


@torch.no_grad()
def _resize(layer: LoraLayer, name: str, rank: int, A: torch.Tensor, B: torch.Tensor) -> None:
    """Give the layer factors of this rank: `A` and `B`, and zeros."""
    for factor, value, axis in zip(layer.factors(name), (A, B), (0, 1)):
        shape = list(value.shape)
        shape[axis] = rank
        factor.data = torch.zeros(shape, dtype=factor.dtype, device=factor.device)
        factor.data.narrow(axis, 0, value.shape[axis]).copy_(value)
    if name in layer.lora_A:
        for module, size in ((layer.lora_A[name], "out"), (layer.lora_B[name], "in")):
            setattr(module, f"{size}_features" if isinstance(module, nn.Linear) else f"{size}_channels", rank)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Write another adapter's tensors into an adapter that is in place. Layers that it lacks do nothing then.

    Args:
        state_dict: by their keys in a file or in the model (diffusers has put the adapter's name into them), with or
            without `base_model.model.`.
        config: the other adapter's; its scaling is taken over.
        parameter_prefix: of the tensors' names; others are refused.

    Raises:
        ValueError: the adapter is merged, does not exist, or has no room for the rank (in a compiled model).
        RuntimeError: tensors that have no place in the adapter. Nothing was changed.
    """
    layers = dict(_lora_layers(model, adapter_name))
    if not layers:
        raise ValueError(f"There is no LoRA adapter {adapter_name!r} in the model to be replaced")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged: call unmerge_adapter() before replacing it")
    keys = adapter_keys(model, adapter_name)
    places = {key.removeprefix(_PREFIX): name for name, file in keys.items() for key in (name, file)}
    found = {key.removeprefix(_PREFIX): tensor for key, tensor in state_dict.items()}
    unexpected = [key for key in found if key not in places or f".{parameter_prefix}" not in f".{key}"]
    if unexpected:
        raise RuntimeError(
            f"{len(unexpected)} tensors have no place in adapter {adapter_name!r}, such as {unexpected[:3]}: the first "
            "adapter must have all layers that later ones have"
        )
    new = {places[key]: tensor for key, tensor in found.items()}
    current = dict(model.named_parameters(remove_duplicate=False))
    _check_room(current, new, _is_compiled(model))
    for path, layer in layers.items():
        own = {key: current[key] for key in keys if key.startswith(f"{path}.lora_")}
        _fill(path, layer, adapter_name, config, own, new)
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and adapter_name in configs:
        config.inference_mode = configs[adapter_name].inference_mode
        configs[adapter_name] = config


def _rank_axis(name: str) -> int | None:
    """Where a tensor of this name has its rank; None: it has none."""
    if ".lora_A." in name or ".lora_embedding_A." in name:
        return 0
    return None if name.endswith(".bias") or ".lora_magnitude_vector." in name else 1


def _check_room(current: Mapping[str, nn.Parameter], new: Mapping[str, torch.Tensor], is_compiled: bool) -> None:
    for name, tensor in new.items():
        axis, have = _rank_axis(name), list(current[name].shape)
        want = list(tensor.shape)
        if axis is not None:
            if is_compiled and want[axis] > have[axis]:
                raise ValueError(
                    f"{name} has room for the rank {have[axis]}, and the new adapter has {want[axis]}: call "
                    "prepare_model_for_compiled_hotswap(model, target_rank=...) before compiling"
                )
            want[axis] = have[axis]
        if want != have:
            raise ValueError(f"{name} has the shape {have} in the model and {list(tensor.shape)} in the new adapter")


@torch.no_grad()
def _fill(path: str, layer: LoraLayer, name: str, config: LoraConfig, own, new) -> None:
    """Write what is `new` into the adapter's parameters `own` of one layer; those that it lacks become zero."""
    given = {key: new[key] for key in own if key in new}
    grown = [tensor.shape[axis] for key, tensor in given.items() if (axis := _rank_axis(key)) is not None]
    A, B = layer.factors(name)
    if grown and grown[0] > len(A):
        _resize(layer, name, grown[0], A.detach(), B.detach())
    for key, parameter in own.items():
        if key not in given and ".lora_magnitude_vector." in key:
            raise RuntimeError(f"The new adapter lacks {key}, without which a DoRA is not defined")
        axis = _rank_axis(key)
        parameter.data.zero_()
        if key in given:
            (parameter if axis is None else parameter.narrow(axis, 0, given[key].shape[axis])).copy_(given[key])
    r, alpha = rank_and_alpha(config, path.removeprefix(_PREFIX))
    layer.r[name], layer.lora_alpha[name] = r, alpha
    scaling = layer.op.lora_gain * scaling_of(r, alpha, config.use_rslora)
    if torch.is_tensor(layer.scaling[name]):
        layer.scaling[name].fill_(scaling)
    else:
        layer.scaling[name] = scaling


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs,
) -> None:
    """Replace an adapter in place by one from a folder or the hub.

    Args:
        torch_device: where to read the tensors to; None: an accelerator if there is one.
        kwargs: arguments of `hf_hub_download`.

    Raises:
        ValueError, RuntimeError: as `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict`.
    """
    hub, rest = split_hub_kwargs(kwargs)
    if rest:
        raise TypeError(f"hotswap_adapter has no use for {sorted(rest)}")
    config = PeftConfig.from_pretrained(model_name_or_path, **hub)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {sorted(configs)}")
    check_hotswap_configs_compatible(configs[adapter_name], config)
    tensors = load_peft_weights(model_name_or_path, device=torch_device, **hub)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


explain_missing(__name__)
