"""Helpers, constants and state-dict functions."""

from .._lazy import attach
from . import constants

_OTHER = [
    "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "_get_submodules", "cast_mixed_precision_params",
    "id_tensor_storage", "infer_device", "prepare_model_for_kbit_training", "shift_tokens_right", "transpose",
]  # fmt: skip
_SAVE_AND_LOAD = [
    "get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights", "set_base_model_state_dict",
    "set_peft_model_state_dict",
]  # fmt: skip
_CONSTANTS = [
    "CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME",
    *(name for name in vars(constants) if name.startswith("TRANSFORMERS_")),
]  # fmt: skip

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        **dict.fromkeys(_OTHER, "peft.utils.other"),
        **dict.fromkeys(_SAVE_AND_LOAD, "peft.utils.save_and_load"),
        **dict.fromkeys(_CONSTANTS, "peft.utils.constants"),
        "NoMatchingPeftModuleError": "peft.utils.error",
        "PeftError": "peft.utils.error",
        "PeftType": "peft.utils.peft_types",
        "PeftWarning": "peft.utils.warning",
        "TaskType": "peft.utils.peft_types",
        "TrainableTokensWrapper": "peft.tuners.trainable_tokens.wrapper",
        "register_peft_method": "peft.mapping",
        "replace_lora_weights_loftq": "peft.utils.loftq_utils",
    },
    (
        "constants", "error", "hub", "integrations", "loftq_utils", "model_card", "other", "peft_types",
        "quantization_utils", "save_and_load", "transformers_weight_conversion", "warning",
    ),
)  # fmt: skip
