"""Bottleneck adapters (arXiv 1902.00751, 2005.00247, 2110.04366)."""

from .config import BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
