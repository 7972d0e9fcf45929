"""Configuration of LoHa."""

from __future__ import annotations

from ...config import documented_dataclass
from ...utils.peft_types import PeftType
from ..lycoris_utils import LycorisConfig


@documented_dataclass
class LoHaConfig(LycorisConfig):
    """LoHa: the delta is a product, number by number, of two deltas of rank `r` (arXiv 2108.06098, proposition 1)."""

    method = PeftType.LOHA
    init_weights: bool = True
    """True: one factor starts at zero, so that the model starts as it was. False: all random (for tests)."""
