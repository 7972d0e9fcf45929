"""Configuration of P-tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ...config import PromptLearningConfig, documented
from ...utils.peft_types import PeftType


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What computes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@documented
@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: a small network makes the prompt out of trained vectors (arXiv 2103.10385).

    Raises:
        ValueError: a value outside its range; it is named with the rule.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    """"MLP", or "LSTM": a bidirectional one, with an MLP behind it."""
    encoder_hidden_size: int | None = None
    """Width inside of the encoder; None: the prompt's."""
    encoder_num_layers: int = 2
    """Layers of the LSTM; the MLP has always the two inner ones of the paper."""
    encoder_dropout: float = 0.0
    """Dropout between the layers of the LSTM."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        kinds = PromptEncoderReparameterizationType
        self.encoder_reparameterization_type = self.member(kinds, "encoder_reparameterization_type")
        self.check_positive("encoder_hidden_size", "encoder_num_layers")
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout must be in [0, 1), got {self.encoder_dropout}")
