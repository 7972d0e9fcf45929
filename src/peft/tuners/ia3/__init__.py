"""IA3: scaling of keys, values and feed-forward activations (arXiv 2205.05638)."""

from .config import IA3Config
from .layer import Conv2d, Conv3d, IA3Layer, Linear
from .model import IA3Model

__all__ = ["Conv2d", "Conv3d", "IA3Config", "IA3Layer", "IA3Model", "Linear"]
