"""Tuning of normalisation layers (arXiv 2312.11420)."""

from .config import LNTuningConfig
from .layer import LNTuningLayer
from .model import LNTuningModel

__all__ = ["LNTuningConfig", "LNTuningLayer", "LNTuningModel"]
