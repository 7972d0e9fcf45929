"""Configuration of VeRA."""

from __future__ import annotations

from typing import Literal

from ...config import check_least, documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig, check_probability


@documented_dataclass
class VeraConfig(TargetedConfig):
    """VeRA: all layers share two frozen random matrices, and train a vector for each side (arXiv 2310.11454, eq. 2)."""

    method = PeftType.VERA
    r: int = 256
    """Rank of the shared matrices; larger than LoRA's, since each of it costs one number per layer."""
    projection_prng_key: int = 0
    """Seed of the shared matrices."""
    save_projection: bool = True
    """Write the shared matrices into the adapter's file. False: they are drawn again when it is loaded, which another
    version of torch may do differently."""
    vera_dropout: float = 0.0
    """Probability of dropping an input of the delta, in training."""
    d_initial: float = 0.1
    """What the vector of the ranks starts at."""
    fan_in_fan_out: bool = False
    """Kept for files of other tools: whether a weight is stored transposed is read from the layer."""
    bias: Literal["none", "all", "vera_only"] = "none"
    """Which biases of the base model train: none, all, or those of adapted layers."""
    init_weights: bool = True
    """True: the vector of the outputs starts at zero, so that the model starts as it was. False: it starts at one, and
    that of the ranks at random (for tests)."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, r=1)
        check_probability(self, "vera_dropout")

    def to_dict(self):
        """Without exclude_modules where it is not used: upstream's VeRA does not know it."""
        content = super().to_dict()
        if self.exclude_modules is None:
            del content["exclude_modules"]
        return content
