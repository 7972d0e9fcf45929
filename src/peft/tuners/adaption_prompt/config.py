"""Configuration of LLaMA-Adapter."""

from __future__ import annotations

from ...config import PeftConfig, check_least, documented_dataclass
from ...utils.peft_types import PeftType


@documented_dataclass
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: trained tokens that the attention of the last layers reads, behind a gate that begins shut
    (arXiv 2303.16199).
    """

    method = PeftType.ADAPTION_PROMPT
    target_modules: str | None = None
    """Name of the attention modules; None: that of the architecture."""
    adapter_len: int | None = None
    """Number of trained tokens."""
    adapter_layers: int | None = None
    """Number of layers that get them, counted from the last one."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, adapter_len=1, adapter_layers=1)

    @property
    def is_adaption_prompt(self) -> bool:
        return True
