"""`OFTModel`: OFT layers in a model."""

from ...utils.constants import TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
from ..base import BaseTuner
from .layer import Conv2d, Embedding, Linear, OFTLayer


class OFTModel(BaseTuner):
    """A model with OFT adapters (arXiv 2306.07280); see `BaseTuner`."""

    prefix = "oft_"
    tuner_layer_cls = OFTLayer
    layer_classes = {
        "Linear": Linear, "Conv1d": OFTLayer, "Conv2d": Conv2d, "Conv3d": OFTLayer, "Embedding": Embedding,
    }  # fmt: skip
    target_module_mapping = TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
