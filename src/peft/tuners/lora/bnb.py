"""LoRA on bitsandbytes' linear layers, under the names by which other libraries ask for it (`isinstance`).

The classes add nothing to `Linear`: reading and writing packed weights is the registry's business
(`utils/quantization_utils.py`).
"""

from ..._lazy import explain_missing
from .layer import Linear


class Linear4bit(Linear):
    """LoRA on a linear layer in 4 bits (NF4, FP4)."""


class Linear8bitLt(Linear):
    """LoRA on a linear layer in 8 bits (LLM.int8())."""


explain_missing(__name__)
