"""Helpers, constants and state-dict functions."""

from .._lazy import attach

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
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
]  # fmt: skip

# Upstream's default targets of methods that are not here, and the like: name -> what it belongs to.
_MISSING = {
    f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING": method
    for method in (
        "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HRA IA3 LILY LNTUNING LOHA LOKR MISS "
        "OFT OSF PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT"
    ).split()
} | {
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": "IA3",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "Prefix tuning",
    "TrainableTokensWrapper": "Trainable tokens",
    "bloom_model_postprocess_past_key_value": "Prefix tuning",
    "map_cache_to_layer_device_map": "Prefix tuning",
    "replace_lora_weights_loftq": "LoftQ initialisation of LoRA",
}

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
        "register_peft_method": "peft.mapping",
    },
    _MISSING,
    (
        "constants", "error", "hub", "model_card", "other", "peft_types", "quantization_utils", "save_and_load",
        "transformers_weight_conversion", "warning",
    ),
)  # fmt: skip
