"""`optimize`: from a model to one with a compact delta, as deltatuner's users call it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from ..mapping_func import get_peft_model
from ..peft_model import PeftModel
from ..tuners.common_config import TargetedConfig
from ..tuners.denas.model import search_structure
from ..tuners.denas.structure import apply_structure
from ..tuners.lora import LoraConfig
from ..tuners.sft.config import SftConfig
from ..tuners.ssf import SsfConfig
from ..utils.peft_types import PeftType
from ..utils.warning import warn
from .deltatuner_args import DeltaTunerArguments

__all__ = ["optimize"]


def optimize(
    model: nn.Module,
    tokenizer: Any = None,
    adapter_name: str = "default",
    deltatuning_args: DeltaTunerArguments | None = None,
    *,
    batch: Any = None,
    progress: bool = True,
    **kwargs: Any,
) -> PeftModel:
    """Give a model a compact delta: on the layers and with the sizes that a search, or a structure, says.

    Args:
        model: a base model, or a PeftModel with one new adapter. Its LoRA, with algo "lora", is what is made compact:
            its targets are those to choose from, and its parameters the budget. The base model is changed in place.
        tokenizer: of the model, for the batch that candidates are scored on; not needed with `batch`, with a structure,
            or with denas=False.
        adapter_name: name of the adapter.
        deltatuning_args: what to do; None: deltatuner's defaults.
        batch: what candidates are scored on, in place of a text of ours; see `search_structure`.
        progress: show a bar.
        kwargs: fields of `DeltaTunerArguments` that override it, such as algo="ssf".

    Returns:
        An ordinary PeftModel. `save_pretrained` writes `best_model_structure.txt` beside the adapter.

    Raises:
        TypeError: an argument that `DeltaTunerArguments` does not have.
        ValueError: as in `search_structure` and `apply_structure`.
    """
    args = _arguments(deltatuning_args, kwargs)
    algo = args.algo
    if algo == "auto":
        algo = "lora" if _lora_of(model, adapter_name) is not None else "ssf"
    if not args.denas and args.best_model_structure is None and algo == "lora" and _lora_of(model, adapter_name):
        return model
    config = _adapter_config(model, adapter_name, algo, args)
    given = args.best_model_structure is not None or not args.denas
    if not given and tokenizer is None and batch is None:
        raise ValueError("A search needs the `tokenizer` (or a `batch`); or give best_model_structure, or denas=False")
    search = None if given else args.to_search(algo)
    base = _base_of(model)
    if args.best_model_structure is not None:
        config = apply_structure(config, base, args.best_model_structure, args.layer_name)
    elif search is not None:
        found = search_structure(base, config, search, tokenizer, batch, layer_name=args.layer_name, progress=progress)
        config = found.config()
    peft_model = get_peft_model(base, config, adapter_name)
    if args.model_id is not None:
        peft_model.peft_config[adapter_name].base_model_name_or_path = args.model_id
    return peft_model


def _arguments(args: DeltaTunerArguments | None, overrides: dict[str, Any]) -> DeltaTunerArguments:
    known = {field.name for field in dataclasses.fields(DeltaTunerArguments)}
    if unknown := sorted(set(overrides) - known):
        raise TypeError(f"optimize got unknown arguments {unknown}; DeltaTunerArguments has {sorted(known)}")
    return dataclasses.replace(args or DeltaTunerArguments(), **overrides)


def _lora_of(model: nn.Module, adapter_name: str) -> LoraConfig | None:
    """The configuration of the model's LoRA, if it has one: that of this name, or the only adapter."""
    configs = getattr(model, "peft_config", {})
    config = next(iter(configs.values())) if len(configs) == 1 else configs.get(adapter_name)
    return config if config is not None and config.peft_type == PeftType.LORA else None


def _adapter_config(model: nn.Module, adapter_name: str, algo: str, args: DeltaTunerArguments) -> TargetedConfig:
    """The adapter to make compact."""
    own = _lora_of(model, adapter_name)
    task = own.task_type if own is not None and own.task_type is not None else args.task_type
    if algo == "lora":
        if args.ssf_target_module is not None:
            raise ValueError("ssf_target_module has no meaning with algo='lora': name the LoRA's target_modules")
        config = LoraConfig(task_type=task) if own is None else copy.copy(own)
        config.task_type, config.rank_pattern, config.alpha_pattern = task, {}, {}
        return config
    kind = SsfConfig if algo == "ssf" else SftConfig
    return kind(task_type=task, target_modules=args.ssf_target_module)


def _base_of(model: nn.Module) -> nn.Module:
    """The model without its adapter, which is replaced."""
    if not isinstance(model, PeftModel):
        return model
    if len(model.peft_config) > 1:
        raise ValueError(f"optimize replaces a model's one adapter, but it has {sorted(model.peft_config)}")
    if any(layer.merged for layer in model.base_model.layers()):
        raise ValueError("The model's adapter is merged: call unmerge_adapter() first")
    if _is_trained(model):
        warn(
            "The model's adapter has been trained; the compact one replaces it and starts anew",
        )
    return model.unload()


def _is_trained(model: PeftModel) -> bool:
    """Whether a LoRA's delta is no longer zero."""
    return any(
        name in getattr(layer, "lora_B", ()) and bool(layer.factors(name)[1].detach().any())
        for layer in model.base_model.layers()
        for name in layer.active_adapters
    )
