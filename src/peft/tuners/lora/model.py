"""`LoraModel`: LoRA layers in a model."""

from __future__ import annotations

from ..._lazy import explain_missing
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.quantization_utils import find_backend
from ..base import BaseTuner
from ..targeting import for_module
from .bnb import Linear4bit, Linear8bitLt
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer


class LoraModel(BaseTuner):
    """A model with LoRA adapters (arXiv 2106.09685); see `BaseTuner`."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layer_classes = {"Linear": Linear, "Conv1d": Conv1d, "Conv2d": Conv2d, "Conv3d": Conv3d, "Embedding": Embedding}
    packed_linear_classes = {"bitsandbytes 4-bit": Linear4bit, "bitsandbytes 8-bit": Linear8bitLt}  # others: Linear

    def check_new_config(self, config):
        """Refuse saved adapters that are for other base weights than the model's.

        Raises:
            NotImplementedError: the adapter's initialisation took its delta out of the base weights, too.
        """
        super().check_new_config(config)
        if config.init_changes_base:
            init = config.init_lora_weights
            raise NotImplementedError(
                f"The adapter was saved with init_lora_weights={init!r}: {init} changed the base weights as well, and "
                "the adapter fits only those. This version of peft cannot make them. Either convert the adapter to a "
                "plain one with the package that made it (save_pretrained with path_initial_model_for_weight_conversion"
                "), or, if the model at hand has the changed weights already, set init_lora_weights to true in "
                "adapter_config.json (or give config=PeftConfig.from_pretrained(folder, init_lora_weights=True))"
            )

    def add_parts(self, config, adapter_name):
        if getattr(config, "trainable_token_indices", None):
            from ..trainable_tokens.wrapper import wrap_trainable_tokens

            wrap_trainable_tokens(self, config.trainable_token_indices, adapter_name)

    def layer_kwargs(self, config, key):
        """Rank and alpha of this layer, from the patterns or the configuration."""
        return {
            "r": for_module(key, config.rank_pattern, config.r),
            "lora_alpha": for_module(key, config.alpha_pattern, config.lora_alpha),
        }

    def layer_class(self, target, key):
        own = super().layer_class(target, key)
        backend = find_backend(target) if own is Linear else None
        return self.packed_linear_classes.get(backend.name, own) if backend else own


explain_missing(__name__)
