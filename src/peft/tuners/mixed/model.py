"""`MixedModel`: layers of several methods, one around the other, in the order in which the methods came.

Each adapter is put in by its own method's tuner. A target with adapters of two methods has one layer for each, the
later one around the earlier one, which is that one's base layer. Forward goes from the outside in and back, so merging
goes from the inside out.
"""

from __future__ import annotations

from torch import nn

from ..._lazy import explain_missing
from ...mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from ...utils.peft_types import PeftType
from ..base import BaseTuner

COMPATIBLE_TUNER_TYPES = tuple(map(PeftType, PEFT_TYPE_TO_MIXED_MODEL_MAPPING))
# What reads the base weight in the forward pass, or changes the model around the layers.
_ALONE = ("use_dora", "target_parameters", "layer_replication", "init_changes_base")


class MixedModel(BaseTuner):
    """A model with adapters of several methods; see `BaseTuner`."""

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As `BaseTuner.inject_adapter`.

        Raises:
            ValueError: a method, or a setting of it, that cannot be mixed.
        """
        config = self.peft_config[adapter_name]
        if config.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            known = ", ".join(PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
            raise ValueError(f"Models of several methods can have {known}, got {config.peft_type}")
        for field in _ALONE:
            if getattr(config, field, None):
                raise ValueError(f"{type(config).__name__} with {field} cannot be one of several methods of a model")
        if config.peft_type == PeftType.ADALORA and not config.inference_mode:
            raise ValueError(
                "AdaLoRA trains with a loss and a schedule of its own, which a model of several methods does not have: "
                "train it alone (get_peft_model without mixed=True), and load it here"
            )
        self._refuse_merged("an adapter cannot be put around or inside of them")
        tuner = self._tuner_of(config)
        tuner.inject_adapter(model, adapter_name, *args, **kwargs)
        self.targeted_module_names = tuner.targeted_module_names

    def _tuner_of(self, config) -> BaseTuner:
        """A tuner of the adapter's method for the same model and configurations."""
        cls = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[config.peft_type]
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model, tuner.peft_config, tuner.mixes = self.model, self.peft_config, True
        tuner.targeted_module_names = self.targeted_module_names
        tuner._active_without_parts = self._active_without_parts
        return tuner

    def _refuse_merged(self, why: str) -> None:
        merged = sorted({name for layer in self.layers() for name in layer.merged_adapters})
        if merged:
            raise ValueError(f"{merged} are merged, and {why}: call unmerge_adapter() first")

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        """As `BaseTuner.merge_adapter`.

        Raises:
            ValueError: some are merged already: what is merged later would be inside of what it is around.
        """
        self._refuse_merged("adapters of several methods can only be merged together")
        super().merge_adapter(adapter_names, safe_merge)


explain_missing(__name__)
