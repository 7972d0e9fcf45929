"""Configuration of trainable tokens, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

from dataclasses import field

from ...config import PeftConfig, documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import check_modules, check_tokens


@documented_dataclass
class TrainableTokensConfig(PeftConfig):
    """Trainable tokens: some rows of the embedding table are trained, the others stay.

    Raises:
        TypeError, ValueError: a value of another type, tokens that are negative or named twice.
    """

    method = PeftType.TRAINABLE_TOKENS
    token_indices: list[int] = field(default_factory=list)
    """Ids of the tokens."""
    target_modules: list[str] | str | None = None
    """The embeddings, given as for other methods; None: the model's input embeddings. What is tied to them is trained
    along."""
    init_weights: bool = True
    """True: the tokens start from their embeddings in the base model. False: random ones."""

    def __post_init__(self):
        super().__post_init__()
        check_modules(self, "target_modules")
        check_tokens("token_indices", self.token_indices)
