"""LLaMA-Adapter (arXiv 2303.16199)."""

from .config import AdaptionPromptConfig
from .layer import AdaptedAttention
from .model import AdaptionPromptModel

__all__ = ["AdaptedAttention", "AdaptionPromptConfig", "AdaptionPromptModel"]
