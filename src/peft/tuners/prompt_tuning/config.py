"""Configuration of prompt tuning."""

from __future__ import annotations

import enum

from ...config import PromptLearningConfig, documented_dataclass
from ...utils.peft_types import PeftType


class PromptTuningInit(str, enum.Enum):
    """How a prompt begins."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@documented_dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: trained vectors in front of the embeddings of the text (arXiv 2104.08691)."""

    method = PeftType.PROMPT_TUNING
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    """"RANDOM": normally distributed. "SAMPLE_VOCAB": embeddings of random tokens. "TEXT": those of a text."""
    prompt_tuning_init_text: str | None = None
    """The text for "TEXT"; it is repeated or cut to the number of virtual tokens."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of that text."""
    tokenizer_kwargs: dict | None = None
    """Further arguments of `AutoTokenizer.from_pretrained`."""

    def __post_init__(self):
        super().__post_init__()
        self.prompt_tuning_init = self.member(PromptTuningInit, "prompt_tuning_init")
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    raise ValueError(f"prompt_tuning_init='TEXT' needs {name}, got {getattr(self, name)!r}")
        elif self.tokenizer_kwargs is not None:
            raise ValueError(
                f"tokenizer_kwargs are for prompt_tuning_init='TEXT', got {self.prompt_tuning_init.value!r}"
            )
