"""Configuration of LN tuning, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

from ...config import documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import ModulesConfig


@documented_dataclass
class LNTuningConfig(ModulesConfig):
    """LN tuning: every adapter has a copy of the norms' weights and biases, and trains it (arXiv 2312.11420)."""

    method = PeftType.LN_TUNING
