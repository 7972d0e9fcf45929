"""`OFTModel`: OFT layers in a model."""

from __future__ import annotations

from ...utils.constants import TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
from ..base import BaseTuner
from .layer import OFTLayer


class OFTModel(BaseTuner):
    """A model with OFT adapters (arXiv 2306.07280); see `BaseTuner`."""

    prefix = "oft_"
    tuner_layer_cls = OFTLayer
    layer_classes = dict.fromkeys(("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"), OFTLayer)
    target_module_mapping = TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
