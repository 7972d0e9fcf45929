"""Keys of adapter files, as transformers' `model.load_adapter` needs them.

transformers (5 and later) loads an adapter like a checkpoint: every key of the file is passed through a list of
transforms and lands on the parameter of the resulting name. `build_peft_weight_mapping` makes this list: the file's
prefix goes, the adapter's name comes in, and the model's own renamings (of modules that had other names in earlier
versions) follow. It imports transformers, so within peft only code that has a model of transformers at hand imports it.

Left out: the arithmetic by which transformers rebuilds base weights (several experts into one parameter, one fused
projection into three). It does not apply to an adapter's tensors as it stands; an adapter of single experts is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from .._lazy import explain_missing
from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from .peft_types import PeftType
from .warning import warn

FILE_PREFIX = "base_model.model."


class _AdapterKey(WeightRenaming):
    """`base_model.model.<path>.lora_A.weight` -> `<path>.lora_A.<adapter>.weight`."""

    __slots__ = ("adapter_name", "prefixes")

    def __init__(self, adapter_name: str, prefixes: Sequence[str]):
        super().__init__(f"^{re.escape(FILE_PREFIX)}", "")
        self.adapter_name = adapter_name
        self.prefixes = tuple(prefixes)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        parts = source_key.removeprefix(FILE_PREFIX).split(".")
        # Modules of the base model may be called so too; the adapter's own part comes last.
        for i in reversed(range(len(parts))):
            if parts[i].startswith(self.prefixes):
                if parts[i + 1 : i + 2] != [self.adapter_name]:  # a state dict of a model has the name already
                    parts.insert(i + 1, self.adapter_name)
                break
        return ".".join(parts), None

    def was_used(self) -> bool:
        # transformers reverts used transforms when it saves the base model; this one has no part in its names.
        return False


class _SortPositions(ConversionOps):
    """Sort the positions of sparse deltas, and their values along with them.

    A layer relies on sorted positions; files of the reference release of SFT do not have them. Both tensors come one
    by one, the positions first (keys are loaded in alphabetical order), so the permutation is kept in between.
    """

    def __init__(self):
        self.orders: dict[str, torch.Tensor] = {}  # delta -> (k,) permutation

    def __deepcopy__(self, memo) -> _SortPositions:
        return self  # transformers copies a converter, with its operations, for every parameter

    def convert(self, input_dict, full_layer_name: str, **kwargs) -> dict[str, torch.Tensor]:
        ((tensor,),) = input_dict.values()
        delta, _, attribute = full_layer_name.rpartition(".")
        if attribute == "indices":
            tensor, self.orders[delta] = tensor.sort()
        elif delta in self.orders:
            tensor = tensor[self.orders.pop(delta)]
        return {full_layer_name: tensor}


class _SparseDelta(WeightConverter):
    """Applies `_SortPositions` to one of the two tensors of every delta of an adapter."""

    __slots__ = ("ending",)

    def __init__(self, adapter_name: str, attribute: str, operation: _SortPositions):
        self.ending = f".sft_delta.{adapter_name}.{attribute}"
        super().__init__(f"sft_delta.{attribute}", f"sft_delta.{attribute}", [operation])

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, self.source_patterns[0] if source_key.endswith(self.ending) else None

    def was_used(self) -> bool:
        return False  # as in `_AdapterKey`


class _SingleExperts(WeightRenaming):
    """Refuses tensors for single experts of a model that holds all experts in one parameter."""

    __slots__ = ()

    def __init__(self, converter: WeightConverter, prefixes: Sequence[str]):
        tensors = f"\\.(?:{'|'.join(map(re.escape, prefixes))})"
        patterns = [_module_pattern(pattern) + tensors for pattern in converter.source_patterns]
        super().__init__(patterns, list(converter.target_patterns))
        self.scope_prefix, self.base_model_prefix = converter.scope_prefix, converter.base_model_prefix

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if self._scoped_match(source_key) is not None:
            parameters = ", ".join(pattern.lstrip(".") for pattern in self.target_patterns)
            raise NotImplementedError(
                f"The adapter changes a single expert ({source_key}), but this version of transformers holds all "
                f"experts of a layer in one parameter ({parameters}), for which there is target_parameters; adapters "
                "of single experts are not converted to it"
            )
        return source_key, None


def _module_pattern(pattern: str) -> str:
    """The pattern of the module whose weight `pattern` is for."""
    return re.sub(r"\\?\.weight\$?$", "", pattern)


def _merges_experts(transform: WeightTransform) -> bool:
    """Whether the model holds in one parameter what were modules of single experts (`experts.0.w1`, ...)."""
    return isinstance(transform, WeightConverter) and any("experts.*." in p for p in transform.source_patterns)


def build_peft_weight_mapping(
    weight_conversions: Sequence[WeightTransform] | None, adapter_name: str, peft_config=None
) -> list[WeightTransform]:
    """The transforms that take the keys of an adapter's file to those of the model that has the adapter.

    Args:
        weight_conversions: the model's own transforms (`transformers.conversion_mapping`), in order; of these, the
            renamings are kept.
        adapter_name: the adapter's name in the model.
        peft_config: the adapter's configuration; None: the adapter is of any method that there is.

    Returns:
        A new list. The transforms that are added are never used for saving, so that the adapter leaves no trace in the
        base model's files.

    Raises:
        NotImplementedError: not here, but when a key is met that belongs to a single expert of a model that holds all
            experts of a layer in one parameter.
    """
    methods = list(PEFT_TYPE_TO_PREFIX_MAPPING) if peft_config is None else [peft_config.peft_type]
    prefixes = [PEFT_TYPE_TO_PREFIX_MAPPING[method] for method in methods]
    mapping: list[WeightTransform] = [_AdapterKey(adapter_name, prefixes)]
    if PeftType.SFT in methods:
        sorting = _SortPositions()
        mapping += [_SparseDelta(adapter_name, attribute, sorting) for attribute in ("indices", "values")]
    for transform in weight_conversions or ():
        if isinstance(transform, WeightRenaming):
            mapping.append(transform)
        elif _merges_experts(transform):
            mapping.append(_SingleExperts(transform, prefixes))
    return mapping


def warn_of_single_experts(model: nn.Module, target_modules) -> list[str]:
    """Warn if targets name projections of single experts, and the model holds those of all experts in one parameter.

    Args:
        target_modules: names of modules. Whole paths are of modules that are there, and a pattern that only experts
            match finds nothing, which is an error anyway: neither is looked at.

    Returns:
        The targets that were named in the warning.
    """
    if not isinstance(model, PreTrainedModel) or isinstance(target_modules, str):
        return []
    merged: dict[str, str] = {}  # name of the projection -> the parameter that holds it
    for converter in filter(_merges_experts, get_model_conversion_mapping(model)):
        for pattern in converter.source_patterns:
            merged[_module_pattern(pattern).rpartition(".")[2]] = converter.target_patterns[0].lstrip(".")
    names = sorted(name for name in target_modules if name in merged)
    if names:
        warn(
            f"The experts' {', '.join(names)} are not adapted: this version of transformers holds those of all experts "
            f"of a layer in one parameter. To adapt those, give target_parameters "
            f"({', '.join(sorted({merged[name] for name in names}))}). Modules of these names outside the experts are "
            "adapted",
        )
    return names


explain_missing(__name__)
