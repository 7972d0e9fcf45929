"""`SsfModel`: SSF layers in a model."""

from __future__ import annotations

from ...utils.constants import TRANSFORMERS_MODELS_TO_SSF_TARGET_MODULES_MAPPING
from ..base import BaseTuner
from .layer import SsfLayer


class SsfModel(BaseTuner):
    """A model with SSF adapters (arXiv 2210.08823); see `BaseTuner`."""

    prefix = "ssf_"
    tuner_layer_cls = SsfLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_SSF_TARGET_MODULES_MAPPING
