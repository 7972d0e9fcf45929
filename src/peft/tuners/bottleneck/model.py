"""`BottleneckModel`: bottleneck adapters in a model."""

from ...utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from ..base import BaseTuner
from .layer import BottleneckLayer, is_block


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters (arXiv 1902.00751); see `BaseTuner`.

    By default they stand behind the last layer of every feed-forward block, as in arXiv 2005.00247.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    def layer_class(self, target, key):
        return BottleneckLayer if is_block(target) else super().layer_class(target, key)
