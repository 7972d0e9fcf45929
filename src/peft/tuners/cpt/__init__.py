"""Context-aware prompt tuning (CPT, arXiv 2410.17222)."""

from .config import CPTConfig
from .model import CPTEmbedding

__all__ = ["CPTConfig", "CPTEmbedding"]
