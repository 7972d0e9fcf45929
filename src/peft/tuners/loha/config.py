"""Configuration of LoHa."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import documented
from ...utils.peft_types import PeftType
from ..lycoris_utils import LycorisConfig


@documented
@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa: the delta is a product, number by number, of two deltas of rank `r` (arXiv 2108.06098, proposition 1).

    Raises:
        TypeError, ValueError: a value of another type or outside its range; it is named with the rule.
    """

    init_weights: bool = True
    """True: one factor starts at zero, so that the model starts as it was. False: all random (for tests)."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LOHA
