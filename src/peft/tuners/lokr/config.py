"""Configuration of LoKr."""

from __future__ import annotations

from typing import Literal

from ...config import documented_dataclass
from ...utils.peft_types import PeftType
from ..lycoris_utils import LycorisConfig


@documented_dataclass
class LoKrConfig(LycorisConfig):
    """LoKr: the delta is the Kronecker product of a small matrix and a larger one of rank `r` (arXiv 2309.14859)."""

    method = PeftType.LOKR
    decompose_both: bool = False
    """Make the small matrix a product of rank `r`, too, where that needs fewer numbers."""
    decompose_factor: int = -1
    """Rows and columns of the small matrix: the largest divisor of the layer's size up to this, or this itself if it
    divides the size. -1: as near as can be to the square root of the size."""
    rank_dropout_scale: bool = False
    """Make what rank_dropout leaves larger, so that the delta keeps its mean."""
    init_weights: bool | Literal["lycoris"] = True
    """True: the small matrix starts at zero, so that the model starts as it was. "lycoris": the larger one does, as in
    the LyCORIS library. False: both are random (for tests)."""

    def __post_init__(self):
        super().__post_init__()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(f"decompose_factor must be -1 or at least 1, got {self.decompose_factor!r}")
