"""Orthogonal fine-tuning (OFT, arXiv 2306.07280, in the input-centric form of arXiv 2506.19847)."""

from .config import OFTConfig
from .layer import Conv2d, Embedding, Linear, OFTLayer, OFTRotationModule
from .model import OFTModel

__all__ = ["Conv2d", "Embedding", "Linear", "OFTConfig", "OFTLayer", "OFTModel", "OFTRotationModule"]
