"""`LoraModel`: LoRA layers in a model."""

from __future__ import annotations

from ..._lazy import explain_missing
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.quantization_utils import find_backend
from ..base import BaseTuner
from ..ops import make_op
from ..targeting import get_pattern_key
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

    def layer_kwargs(self, config, key):
        """Rank and alpha of this layer, from the patterns or the configuration."""
        return {
            "r": config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r),
            "lora_alpha": config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, key), config.lora_alpha),
        }

    def layer_class(self, target, key):
        op = make_op(target)
        if op is None or op.kind not in self.layer_classes:
            raise ValueError(
                f"Target module {key} ({type(target).__name__}) is not supported by LoRA. Supported are linear and "
                "convolution layers, transformers' Conv1D and embeddings: narrow target_modules or use exclude_modules"
            )
        backend = find_backend(target) if op.kind == "Linear" else None
        own = backend and self.packed_linear_classes.get(backend.name)
        return own or self.layer_classes[op.kind]


explain_missing(__name__)
