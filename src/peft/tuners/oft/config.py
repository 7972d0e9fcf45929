"""Configuration of OFT, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

from typing import Literal

from ...config import check_least, documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig, check_probability


@documented_dataclass
class OFTConfig(TargetedConfig):
    """OFT: the features of every target's input are rotated in blocks (arXiv 2306.07280; 2506.19847, eq. 4)."""

    method = PeftType.OFT
    r: int = 0
    """Number of blocks of each layer; 0: as many as oft_block_size makes. A number that does not divide the features is
    replaced by the nearest that does."""
    oft_block_size: int = 32
    """Features in a block, rotated together; 0: as r makes it. Replaced like r."""
    module_dropout: float = 0.0
    """Probability of leaving a block as it is, in training."""
    fan_in_fan_out: bool = False
    """Kept for files of other tools: whether a weight is stored transposed is read from the layer."""
    bias: Literal["none", "all", "oft_only"] = "none"
    """Which biases of the base model train: none, all, or those of adapted layers."""
    init_weights: bool = True
    """True: no rotation, so that the model starts as it was. False: random ones (for tests)."""
    coft: bool = False
    """Constrained OFT: keep the rotations near the identity (arXiv 2306.07280, section 3.2)."""
    eps: float = 6e-5
    """With coft: the largest Frobenius norm of all the blocks' skew-symmetric matrices together."""
    block_share: bool = False
    """One rotation for all blocks of a layer."""
    use_cayley_neumann: bool = True
    """Approximate the inverse in Cayley's formula by a sum of powers (arXiv 2506.19847, section 3.3)."""
    num_cayley_neumann_terms: int = 5
    """How many terms of that sum."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, r=0, oft_block_size=0)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                "r and oft_block_size multiply to the number of features: give one of them and set the other to 0, "
                f"got r={self.r} and oft_block_size={self.oft_block_size}"
            )
        check_probability(self, "module_dropout")
        if self.coft and not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps!r}")
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:
            raise ValueError(
                "num_cayley_neumann_terms must be at least 2 (the first term is the identity), got "
                f"{self.num_cayley_neumann_terms}"
            )
