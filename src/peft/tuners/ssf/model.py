"""`SsfModel`: SSF layers in a model."""

from ...utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..base import BaseTuner
from .layer import SsfLayer


class SsfModel(BaseTuner):
    """A model with SSF adapters (arXiv 2210.08823); see `BaseTuner`."""

    prefix = "ssf_"
    tuner_layer_cls = SsfLayer
    default_targets = INCLUDE_LINEAR_LAYERS_SHORTHAND
