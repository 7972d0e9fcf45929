"""Configuration of LN tuning, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import documented
from ...utils.peft_types import PeftType
from ..common_config import ModulesConfig


@documented
@dataclass
class LNTuningConfig(ModulesConfig):
    """LN tuning: every adapter has a copy of the norms' weights and biases, and trains it (arXiv 2312.11420).

    Raises:
        TypeError, ValueError: a value of another type, or an invalid regular expression.
    """

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING
