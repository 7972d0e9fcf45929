"""Configuration of SSF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...config import documented
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig


@documented
@dataclass
class SsfConfig(TargetedConfig):
    """SSF: one scale and one shift per output channel, `y' = y * scale + shift` (arXiv 2210.08823, eq. 4).

    Raises:
        ValueError: a value outside its range; it is named with the rule.
    """

    bias: Literal["none", "all"] | None = "none"
    """Whether the base model's biases train as well. (None, in files of deltatuner, means "none".)"""
    init_ssf_weights: bool | Literal["normal"] = True
    """True: scale 1 and shift 0, so that the model starts as it was. "normal": the paper's draw, scale ~ N(1, 0.02),
    shift ~ N(0, 0.02)."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SSF
        self.bias = "none" if self.bias is None else self.bias
        if self.bias not in ("none", "all"):
            raise ValueError(f"bias must be 'none' or 'all', got {self.bias!r}")
        if self.init_ssf_weights not in (True, "normal"):
            raise ValueError(f"init_ssf_weights must be True or 'normal', got {self.init_ssf_weights!r}")
