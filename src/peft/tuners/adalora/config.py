"""Configuration of AdaLoRA, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

from ...config import check_least, documented_dataclass
from ...utils.peft_types import PeftType
from ...utils.warning import warn
from ..common_config import check_probability
from ..lora.config import LoraConfig

WITHOUT_EFFECT = ("use_rslora", "lora_bias", "alpha_pattern")  # fields of LoraConfig that AdaLoRA has no use for


@documented_dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: a delta `B diag(E) A` per target, whose ranks training takes from where they matter least (arXiv
    2303.10512).

    Raises:
        NotImplementedError: a switch of LoRA's whose method is not in this version.
    """

    method = PeftType.ADALORA
    target_r: int = 8
    """Mean rank of the layers when the budget is spent."""
    init_r: int = 12
    """Rank that every layer starts with. (r has no effect.)"""
    tinit: int = 0
    """Steps at the beginning in which all ranks stay."""
    tfinal: int = 0
    """Steps at the end in which the ranks that are left stay."""
    deltaT: int = 1
    """Steps from one allocation to the next."""
    beta1: float = 0.85
    """Share of the old value in the running mean of the sensitivity (section 3.2)."""
    beta2: float = 0.85
    """Share of the old value in the running mean of its uncertainty."""
    orth_reg_weight: float = 0.5
    """Weight, in the loss, of what A and B lack to be orthogonal (section 3.1); 0: none."""
    total_step: int | None = None
    """Steps of the whole training; it must be given."""
    rank_pattern: dict[str, list[bool]] | None = None
    """Filled in by training: {"<name of the module>.lora_E": which ranks are left}."""

    def __post_init__(self):
        super().__post_init__()
        if self.r != 8:
            warn(f"r={self.r} is not used: AdaLoRA goes from init_r={self.init_r} to target_r={self.target_r}")

    def _check_numbers(self):
        pattern, self.rank_pattern = self.rank_pattern, None  # of another kind than LoRA's
        super()._check_numbers()
        self.rank_pattern = pattern
        for name in WITHOUT_EFFECT:
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect in AdaLoRA: leave it out")
        if not 1 <= self.target_r <= self.init_r:
            raise ValueError(f"target_r must be in 1..init_r, got target_r={self.target_r} and init_r={self.init_r}")
        check_least(self, tinit=0, tfinal=0, deltaT=1, orth_reg_weight=0)
        check_probability(self, "beta1", "beta2")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(f"total_step must be the number of training steps, got {self.total_step!r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step={self.total_step} steps for the "
                "allocation between them: decrease them, or train longer"
            )

    def _check_init(self):
        # A file brings its tensors. Upstream's may have other names here, which had no effect there either.
        if not isinstance(self.init_lora_weights, bool) and not self.inference_mode:
            raise ValueError(f"init_lora_weights must be True or False in AdaLoRA, got {self.init_lora_weights!r}")
