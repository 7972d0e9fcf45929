"""`IA3Model`: IA3 layers in a model."""

from ...utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from ..base import BaseTuner
from ..ops import OP_KINDS
from ..targeting import name_matches, usual_modules
from .layer import Conv2d, Conv3d, IA3Layer, Linear


class IA3Model(BaseTuner):
    """A model with IA3 adapters (arXiv 2205.05638); see `BaseTuner`."""

    prefix = "ia3_"
    tuner_layer_cls = IA3Layer
    layer_classes = dict.fromkeys(OP_KINDS, IA3Layer) | {"Linear": Linear, "Conv2d": Conv2d, "Conv3d": Conv3d}
    target_module_mapping = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    def shared_state(self, config, targets, adapter_name):
        """Fill in the usual feedforward_modules."""
        if config.feedforward_modules is None and targets:
            usual = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
            what = "those of the targets whose input is to be scaled; [] for none"
            config.feedforward_modules = set(usual_modules(self.model, "feedforward_modules", usual, what))

    def layer_kwargs(self, config, key):
        return {"is_feedforward": name_matches(config.feedforward_modules, key)}
