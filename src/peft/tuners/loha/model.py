"""`LoHaModel`: LoHa layers in a model."""

from ...utils.constants import TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
from ..lycoris_utils import LycorisTuner
from .layer import Conv1d, Conv2d, Embedding, Linear, LoHaLayer


class LoHaModel(LycorisTuner):
    """A model with LoHa adapters (arXiv 2108.06098); see `BaseTuner`."""

    prefix = "hada_"
    tuner_layer_cls = LoHaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
    layer_classes = {"Linear": Linear, "Conv1d": Conv1d, "Conv2d": Conv2d, "Conv3d": LoHaLayer, "Embedding": Embedding}
