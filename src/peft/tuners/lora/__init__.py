"""Low-rank adaptation (LoRA, arXiv 2106.09685)."""

from ..._lazy import explain_missing
from .bnb import Linear4bit, Linear8bitLt
from .config import LoftQConfig, LoraConfig, LoraRuntimeConfig
from .conversion import convert_to_lora, save_as_lora
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from .model import LoraModel

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LoftQConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "convert_to_lora",
    "save_as_lora",
]

explain_missing(__name__)
