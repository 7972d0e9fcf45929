"""Configuration of LoKr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...config import documented
from ...utils.peft_types import PeftType
from ..lycoris_utils import LycorisConfig


@documented
@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr: the delta is a Kronecker product of a small and a larger matrix, the larger one of rank `r` (arXiv
    2309.14859).

    Raises:
        TypeError, ValueError: a value of another type or outside its range; it is named with the rule.
    """

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
        self.peft_type = PeftType.LOKR
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(f"decompose_factor must be -1 or at least 1, got {self.decompose_factor!r}")
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"init_weights must be True, False or 'lycoris', got {self.init_weights!r}")
