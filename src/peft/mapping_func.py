"""`get_peft_model`: from a base model and a configuration to a `PeftModel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import PeftConfig
from .peft_model import TASK_CLASSES, PeftModel
from .tuners.tuners_utils import BaseTunerLayer
from .utils.warning import warn

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {task.value: cls for task, cls in TASK_CLASSES.items()}


def task_class(peft_config: PeftConfig) -> type[PeftModel]:
    """The `PeftModel` class for a configuration's task."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    tokenizer: Any = None,
    batch: Any = None,
) -> PeftModel:
    """Put a new adapter on a base model.

    Args:
        model: the base model; its target layers are replaced in place.
        peft_config: what adapter; completed in place (targets, base model's name).
        adapter_name: its name.
        mixed: let the model have adapters of several methods (LoRA, LoHa, LoKr, OFT; AdaLoRA when it is trained).
        autocast_adapter_dtype: widen adapter parameters of half precision to float32.
        revision: of the base model, to be written into the configuration.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.
        tokenizer, batch: what a `CompactLoraConfig` searches on; see `search_structure`.

    Returns:
        A `PeftModel` of the class for `peft_config.task_type`, or (mixed) a `PeftMixedModel`.

    Raises:
        ValueError: as in `BaseTuner.inject_adapter`.
        TypeError: `peft_config` is of no method; `tokenizer` or `batch` for a configuration that has no use for it.
    """
    if getattr(peft_config, "peft_type", None) is None:
        raise TypeError(f"peft_config must be the configuration of a method, such as LoraConfig, got {peft_config!r}")
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model is a PeftModel already. For one more adapter use model.add_adapter(name, config); to start over "
            "take the base model back with model.unload() first"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        warn(
            "The model has adapter layers already; the new adapter is added to them. To start over, call .unload() on "
            "the first PeftModel before",
        )
    if tokenizer is not None or batch is not None:
        if not hasattr(peft_config, "use_examples"):
            raise TypeError(
                f"tokenizer and batch are for configurations that search (CompactLoraConfig), not for "
                f"{type(peft_config).__name__}"
            )
        peft_config.use_examples(tokenizer, batch)
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warn(
                f"revision={revision!r} overrides revision={peft_config.revision!r} of the configuration",
            )
        peft_config.revision = revision
    from .mixed_model import PeftMixedModel

    return (PeftMixedModel if mixed else task_class(peft_config))(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
