"""`BOFTModel`: BOFT layers in a model."""

from __future__ import annotations

from ...utils.constants import TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
from ..base import BaseTuner
from .layer import BOFTLayer


class BOFTModel(BaseTuner):
    """A model with BOFT adapters (arXiv 2311.06243); see `BaseTuner`."""

    prefix = "boft_"
    tuner_layer_cls = BOFTLayer
    layer_classes = dict.fromkeys(("Linear", "Conv1d", "Conv2d", "Conv3d"), BOFTLayer)
    target_module_mapping = TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
