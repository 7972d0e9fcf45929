"""Configuration of BOFT, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

from typing import Literal

from ...config import check_least, documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig, check_probability


@documented_dataclass
class BOFTConfig(TargetedConfig):
    """BOFT: every target's input features are rotated by a product of sparse rotations (arXiv 2311.06243, eq. 3)."""

    method = PeftType.BOFT
    boft_block_size: int = 4
    """Features in a block, rotated together; it must divide the features. 0: as boft_block_num makes it."""
    boft_block_num: int = 0
    """Number of blocks of each layer; 0: as many as boft_block_size makes."""
    boft_n_butterfly_factor: int = 1
    """Number of rotations that are multiplied, each with other features in a block. 1: block-diagonal, as OFT's."""
    boft_dropout: float = 0.0
    """Probability of leaving a block as it is, in training."""
    fan_in_fan_out: bool = False
    """Kept for files of other tools: whether a weight is stored transposed is read from the layer."""
    bias: Literal["none", "all", "boft_only"] = "none"
    """Which biases of the base model train: none, all, or those of adapted layers."""
    init_weights: bool = True
    """True: no rotation and scales of 1, so that the model starts as it was. False: random ones (for tests)."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, boft_block_size=0, boft_block_num=0, boft_n_butterfly_factor=1)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(
                "boft_block_size and boft_block_num multiply to the number of features: give one of them and set the "
                f"other to 0, got boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}"
            )
        check_probability(self, "boft_dropout")
