"""DE-NAS: which layers of a model get a delta, and of what size, found without training."""

from .config import CompactLoraConfig, DenasConfig
from .model import search_structure
from .report import SearchResult
from .structure import apply_structure, read_structure, write_structure

__all__ = [
    "CompactLoraConfig", "DenasConfig", "SearchResult", "apply_structure", "read_structure", "search_structure",
    "write_structure",
]  # fmt: skip
