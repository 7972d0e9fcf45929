"""Configuration of P-tuning."""

from __future__ import annotations

import enum

from ...config import PromptLearningConfig, check_least, documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import check_probability


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What computes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@documented_dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: a small network makes the prompt out of trained vectors (arXiv 2103.10385)."""

    method = PeftType.P_TUNING
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
        kinds = PromptEncoderReparameterizationType
        self.encoder_reparameterization_type = self.member(kinds, "encoder_reparameterization_type")
        check_least(self, encoder_hidden_size=1, encoder_num_layers=1)
        check_probability(self, "encoder_dropout")
