"""Configuration of context-aware prompt tuning."""

from __future__ import annotations

from typing import Literal

from ...config import PromptLearningConfig, check_least, documented_dataclass
from ...utils.peft_types import PeftType, TaskType


@documented_dataclass
class CPTConfig(PromptLearningConfig):
    """CPT: the tokens of in-context examples, whose embeddings are changed a little (arXiv 2410.17222).

    The kind of a token is `type % 4`: 1 is the template around an input, 2 the input, 3 the template around a label, 0
    the label; `type` 0 is none of them. So 1 to 4 are the first example's kinds, 5 to 8 those of the second.
    """

    method = PeftType.CPT
    cpt_token_ids: list[int] | None = None
    """The tokens of the examples: they are the prompt. None: one token, 0."""
    cpt_mask: list[int] | None = None
    """Which of them are attended to, 1 or 0. None: all."""
    cpt_tokens_type_mask: list[int] | None = None
    """Their types (see above). None: 1 for all."""
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    """"decay": the labels of the examples count less, the further they are from the text."""
    opt_loss_decay_factor: float = 1.0
    """By how much less, from one example to the one before it."""
    opt_projection_epsilon: float = 0.1
    """How far (2-norm) the embedding of an input's token may move where it is 2048 wide, and by the square root of the
    width in others."""
    opt_projection_format_epsilon: float = 0.1
    """The same for the tokens of templates."""
    tokenizer_name_or_path: str | None = None
    """For information: the tokenizer that the tokens are of."""

    def __post_init__(self):
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = len(self.cpt_token_ids)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
        super().__post_init__()
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ValueError(f"CPT is for causal language models (task_type='CAUSAL_LM'), got {self.task_type!r}")
        self.task_type = TaskType.CAUSAL_LM
        self.num_transformer_submodules = 1
        lengths = [len(each) for each in (self.cpt_token_ids, self.cpt_mask, self.cpt_tokens_type_mask)]
        if len(set(lengths)) > 1:
            raise ValueError(f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must be of one length, got {lengths}")
        check_least(self, opt_loss_decay_factor=0, opt_projection_epsilon=0, opt_projection_format_epsilon=0)
