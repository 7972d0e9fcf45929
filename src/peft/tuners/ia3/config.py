"""Configuration of IA3, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

from ...config import documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import ModulesConfig, check_modules


@documented_dataclass
class IA3Config(ModulesConfig):
    """IA3: a factor per feature, on the output of attention and the input of feed-forward layers (arXiv 2205.05638)."""

    method = PeftType.IA3
    feedforward_modules: list[str] | str | None = None
    """Those of the targets whose input is scaled instead of their output, named like target_modules; [] for none.
    None: the architecture's usual ones."""
    fan_in_fan_out: bool = False
    """Kept for files of other tools: whether a weight is stored transposed is read from the layer."""
    init_ia3_weights: bool = True
    """True: all factors are 1, so that the model starts as it was. False: random ones (for tests)."""

    def __post_init__(self):
        super().__post_init__()
        check_modules(self, "feedforward_modules")
        if isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set):
            others = sorted(self.feedforward_modules - self.target_modules)
            if others:
                raise ValueError(f"feedforward_modules must be among target_modules, which lacks {others}")
