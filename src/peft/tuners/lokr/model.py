"""`LoKrModel`: LoKr layers in a model."""

from ...utils.constants import TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING
from ..lycoris_utils import LycorisTuner
from .layer import Conv1d, Conv2d, Embedding, Linear, LoKrLayer


class LoKrModel(LycorisTuner):
    """A model with LoKr adapters (arXiv 2309.14859); see `BaseTuner`."""

    prefix = "lokr_"
    tuner_layer_cls = LoKrLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING
    layer_classes = {"Linear": Linear, "Conv1d": Conv1d, "Conv2d": Conv2d, "Conv3d": LoKrLayer, "Embedding": Embedding}
