"""`LNTuningModel`: LN-tuning layers in a model."""

from ...utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
from ..base import BaseTuner
from .layer import LNTuningLayer


class LNTuningModel(BaseTuner):
    """A model whose norms are tuned (arXiv 2312.11420); see `BaseTuner`."""

    prefix = "ln_tuning_"
    tuner_layer_cls = LNTuningLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
