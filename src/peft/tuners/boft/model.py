"""`BOFTModel`: BOFT layers in a model."""

from ...utils.constants import TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
from ..base import BaseTuner
from .layer import BOFTLayer, Conv2d, Linear


class BOFTModel(BaseTuner):
    """A model with BOFT adapters (arXiv 2311.06243); see `BaseTuner`."""

    prefix = "boft_"
    tuner_layer_cls = BOFTLayer
    layer_classes = {"Linear": Linear, "Conv1d": BOFTLayer, "Conv2d": Conv2d, "Conv3d": BOFTLayer}
    target_module_mapping = TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
