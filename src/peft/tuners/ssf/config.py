"""Configuration of SSF."""

from __future__ import annotations

from typing import Literal

from ...config import documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig


@documented_dataclass
class SsfConfig(TargetedConfig):
    """SSF: one scale and one shift per output channel, `y' = y * scale + shift` (arXiv 2210.08823, eq. 4)."""

    method = PeftType.SSF
    bias: Literal["none", "all"] | None = "none"
    """Whether the base model's biases train as well. (None, in files of deltatuner, means "none".)"""
    init_ssf_weights: Literal[True, "normal"] = True
    """True: scale 1 and shift 0, so that the model starts as it was. "normal": the paper's draw, scale ~ N(1, 0.02),
    shift ~ N(0, 0.02)."""

    def __post_init__(self):
        super().__post_init__()
        self.bias = "none" if self.bias is None else self.bias
