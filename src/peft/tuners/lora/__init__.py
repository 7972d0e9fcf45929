"""Low-rank adaptation (LoRA, arXiv 2106.09685)."""

from ..._lazy import explain_missing
from .bnb import Linear4bit, Linear8bitLt
from .config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig
from .conversion import convert_to_lora, save_as_lora
from .corda import preprocess_corda
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from .loraga import preprocess_loraga
from .model import LoraModel
from .parameters import ParamWrapper

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "ParamWrapper",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "save_as_lora",
]

explain_missing(__name__)
