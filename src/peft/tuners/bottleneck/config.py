"""Configuration of bottleneck adapters. (The method is not upstream's; the file is like that of the others.)"""

from __future__ import annotations

import math
from typing import Literal

from ...config import check_least, documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig, check_probability


@documented_dataclass
class BottleneckConfig(TargetedConfig):
    """Two small layers and a non-linearity between them, beside or behind every target (arXiv 1902.00751, figure 2)."""

    method = PeftType.BOTTLENECK
    bottleneck_size: int | None = None
    """Width of the bottleneck; None: the adapter's input width / reduction_factor."""
    reduction_factor: float = 16.0
    """Input width / width of the bottleneck, where bottleneck_size is None."""
    placement: Literal["sequential", "parallel"] = "sequential"
    """"sequential": the adapter works on the target's output (arXiv 1902.00751, 2005.00247). "parallel": on its input,
    and is added to its output (arXiv 2110.04366)."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"] = "relu"
    """The function in the bottleneck, of torch.nn.functional."""
    scaling: float | Literal["learned"] = 1.0
    """What the adapter's output is multiplied by; "learned": a number that is trained and starts at 1."""
    residual: bool = True
    """Whether the target's output is added to the adapter's. False (sequential only): the adapter's replaces it, so
    that the model does not start as it was."""
    dropout: float = 0.0
    """Probability of dropping an input of the adapter, in training."""
    init_weights: bool = True
    """True: the second layer starts at zero, so that the model starts as it was (but see residual). False: both are
    random."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, bottleneck_size=1)
        if not 0 < self.reduction_factor < math.inf:
            raise ValueError(f"reduction_factor must be positive and finite, got {self.reduction_factor}")
        is_number = isinstance(self.scaling, (int, float)) and math.isfinite(self.scaling) and self.scaling != 0
        if self.scaling != "learned" and not is_number:
            raise ValueError(f"scaling must be 'learned' or a finite number other than 0, got {self.scaling!r}")
        if self.placement == "parallel" and not self.residual:
            raise ValueError("placement='parallel' adds to the target's output, so residual must be True, got False")
        if not self.residual and self.init_weights:
            raise ValueError(
                "residual=False replaces the target's output by the adapter's, which init_weights=True makes 0: set "
                "init_weights=False"
            )
        check_probability(self, "dropout")
