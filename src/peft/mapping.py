"""The one registry: `PeftType -> configuration, tuner, prefix`.

Entries are import paths and are resolved when somebody asks, so that a method costs nothing until it is used. The
`PEFT_TYPE_TO_*_MAPPING`s are views of the registry; `register_peft_method` adds a method of one's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .utils.peft_types import PeftType

if TYPE_CHECKING:
    import torch

    from .config import PeftConfig


@dataclass
class Method:
    """Where a method's classes are: `module:Class` strings or the classes themselves."""

    config: str | type
    tuner: str | type
    prefix: str


# Every method is a package of its own, `peft.tuners.lora`, but for two that are made of LoRA.
METHODS: dict[str, Method] = {
    PeftType[name]: Method(f"peft.tuners.{name.lower()}:{config}", f"peft.tuners.{name.lower()}:{tuner}", prefix)
    for name, config, tuner, prefix in map(
        str.split,
        (
            "LORA LoraConfig LoraModel lora_",
            "ADALORA AdaLoraConfig AdaLoraModel lora_",
            "LOHA LoHaConfig LoHaModel hada_",
            "LOKR LoKrConfig LoKrModel lokr_",
            "VERA VeraConfig VeraModel vera_lambda_",
            "SFT SftConfig SftModel sft_",
            "SSF SsfConfig SsfModel ssf_",
            "PROMPT_TUNING PromptTuningConfig PromptEmbedding prompt_tuning_",
            "MULTITASK_PROMPT_TUNING MultitaskPromptTuningConfig MultitaskPromptEmbedding multitask_prompt_tuning_",
            "P_TUNING PromptEncoderConfig PromptEncoder p_tuning_",
            "PREFIX_TUNING PrefixTuningConfig PrefixEncoder prefix_tuning_",
            "CPT CPTConfig CPTEmbedding cpt_",
            "ADAPTION_PROMPT AdaptionPromptConfig AdaptionPromptModel adaption_",
            "BOFT BOFTConfig BOFTModel boft_",
            "BOTTLENECK BottleneckConfig BottleneckModel bottleneck_",
            "IA3 IA3Config IA3Model ia3_",
            "LN_TUNING LNTuningConfig LNTuningModel ln_tuning_",
            "OFT OFTConfig OFTModel oft_",
            "TRAINABLE_TOKENS TrainableTokensConfig TrainableTokensModel trainable_tokens_",
        ),
    )
} | {
    PeftType.COMPACT_LORA: Method("peft.tuners.denas.config:CompactLoraConfig", "peft.tuners.lora:LoraModel", "lora_"),
    PeftType.FINETUNA: Method("peft.finetuna:FinetunaConfig", "peft.finetuna:FinetunaModel", "lora_"),
}


class _View(MutableMapping):
    """One column of `METHODS` as a dict; values are imported on access."""

    def __init__(self, column: str, only: list[str] | None = None):
        self._column, self.only = column, only  # None: all methods

    def __getitem__(self, peft_type: str) -> Any:
        if self.only is not None and peft_type not in self.only:
            raise KeyError(peft_type)
        value = getattr(METHODS[peft_type], self._column)
        if isinstance(value, str) and ":" in value:
            module, name = value.split(":")
            value = getattr(importlib.import_module(module), name)
        return value

    def __setitem__(self, peft_type: str, value: Any) -> None:
        method = METHODS.setdefault(peft_type, Method("", "", f"{str(peft_type).lower()}_"))
        setattr(method, self._column, value)

    def __delitem__(self, peft_type: str) -> None:
        del METHODS[peft_type]

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS if self.only is None else self.only)

    def __len__(self) -> int:
        return len(METHODS if self.only is None else self.only)


PEFT_TYPE_TO_CONFIG_MAPPING = _View("config")
PEFT_TYPE_TO_TUNER_MAPPING = _View("tuner")
PEFT_TYPE_TO_PREFIX_MAPPING = _View("prefix")
# Methods that a model of several methods can hold (`tuners/mixed`).
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = _View("tuner", ["LORA", "LOHA", "LOKR", "ADALORA", "OFT"])


def is_adapter_key(key: str) -> bool:
    """Whether the name of a tensor says that it belongs to an adapter layer's part of some method."""
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    return any(part.startswith(prefixes) for part in key.split("."))


def config_class(peft_type: str) -> type[PeftConfig]:
    """The configuration class of a method.

    Raises:
        KeyError: the method does not exist, or not in this version.
    """
    if peft_type not in METHODS:
        known = peft_type in list(PeftType)
        raise KeyError(
            f"peft_type={str(peft_type)!r} "
            + ("is a method that this version of peft does not have" if known else "is no method of peft")
            + f"; it has {sorted(getattr(t, 'value', t) for t in METHODS)}"
        )
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration object for a dict with a `peft_type`.

    Raises:
        KeyError: no `peft_type`, or a method that does not exist here.
    """
    if "peft_type" not in config_dict:
        raise KeyError(f"A configuration must say its 'peft_type', got only {sorted(config_dict)}")
    return config_class(config_dict["peft_type"])(**config_dict)


def register_peft_method(
    *, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Add a method of one's own.

    Args:
        name: its `peft_type`, in lower case.
        config_cls, model_cls: its configuration and its tuner.
        prefix: what the names of its parameters start with; None: the tuner's `prefix`.
        is_mixed_compatible: models of several methods can have it: its layers call their base layer, and do not read
            its weight.

    Raises:
        ValueError: a name that is taken or not in lower case.
    """
    if name != name.lower():
        raise ValueError(f"A method's name must be in lower case, got {name!r}")
    if name.upper() in METHODS:
        raise ValueError(f"The method {name!r} exists already")
    METHODS[name.upper()] = Method(config_cls, model_cls, prefix or model_cls.prefix)
    if is_mixed_compatible:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING.only.append(name.upper())


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: torch.nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """Put an adapter's layers into a model, in place, without wrapping the model.

    Args:
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.
        state_dict: an adapter's tensors; if given, exactly the layers that have tensors in it are adapted.

    Returns:
        `model`.

    Raises:
        ValueError: a prompt-learning method (it has no layers), or as in `BaseTuner.inject_adapter`.
    """
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError("inject_adapter_in_model is for methods with adapter layers; use get_peft_model for prompts")
    config_class(peft_config.peft_type)  # a method that is not here is named
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
    return tuner(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    ).model
