"""Configuration of LLaMA-Adapter."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import PeftConfig, documented
from ...utils.peft_types import PeftType


@documented
@dataclass
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: trained tokens that the attention of the last layers reads, behind a gate that begins shut
    (arXiv 2303.16199).

    Raises:
        ValueError: a value outside its range; it is named with the rule.
    """

    target_modules: str | None = None
    """Name of the attention modules; None: that of the architecture."""
    adapter_len: int | None = None
    """Number of trained tokens."""
    adapter_layers: int | None = None
    """Number of layers that get them, counted from the last one."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def is_adaption_prompt(self) -> bool:
        return True
