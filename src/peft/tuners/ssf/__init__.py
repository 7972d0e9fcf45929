"""Scaling and shifting of features (SSF, arXiv 2210.08823)."""

from .config import SsfConfig
from .layer import SsfLayer
from .model import SsfModel

SSFConfig = SsfConfig  # deltatuner's spelling

__all__ = ["SSFConfig", "SsfConfig", "SsfLayer", "SsfModel"]
