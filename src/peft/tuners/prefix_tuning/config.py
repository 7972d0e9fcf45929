"""Configuration of prefix tuning."""

from __future__ import annotations

from typing import Literal

from ...config import PromptLearningConfig, check_least, documented_dataclass, first_of
from ...utils.peft_types import PeftType


@documented_dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: trained keys and values in front of those of every layer (arXiv 2101.00190)."""

    method = PeftType.PREFIX_TUNING
    init_weights: Literal["zero"] | None = None
    """"zero": the prefix starts at zero, which a layer still attends to. None: at random."""
    encoder_hidden_size: int | None = None
    """Width inside of the encoder, with prefix_projection; None: that of the keys."""
    prefix_projection: bool = False
    """Compute the prefix from an embedding by an encoder of two layers."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, encoder_hidden_size=1)

    def _sizes(self, config) -> dict[str, int | None]:
        """Of the keys and values, which are in the decoder of an encoder-decoder."""
        sizes = super()._sizes(config)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        if (layers := first_of(config, "num_decoder_layers", "decoder_layers")) is not None:
            sizes["num_layers"] = layers
        heads = first_of(config, "decoder_attention_heads") or sizes["num_attention_heads"]
        if heads and sizes["token_dim"]:
            size = first_of(config, "head_dim", "d_kv") or sizes["token_dim"] // heads
            heads = first_of(config, "num_key_value_heads") or (1 if getattr(config, "multi_query", False) else heads)
            sizes["num_attention_heads"], sizes["token_dim"] = heads, heads * size
        return sizes
