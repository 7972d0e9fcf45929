"""What the sub-modules of upstream 0.21.2 hold and this package does not have yet, and what it belongs to, in words.

Generated once from an installed upstream, by name. (The names of the package itself are in `_names.py`.) Read only when
somebody asks for a name that is not there, so that it costs nothing. What arrives leaves these tables; a test says so.
"""

from __future__ import annotations

MODULES: dict[str, str] = {
    "peft.tuners.adamss": "AdaMSS",
    "peft.tuners.beft": "BEFT",
    "peft.tuners.c3a": "C3A",
    "peft.tuners.cartridge": "Cartridges",
    "peft.tuners.deft": "DEFT",
    "peft.tuners.delora": "DeLoRA",
    "peft.tuners.fourierft": "FourierFT",
    "peft.tuners.frod": "FRoD",
    "peft.tuners.glora": "GLoRA",
    "peft.tuners.gralora": "GraLoRA",
    "peft.tuners.hira": "HiRA",
    "peft.tuners.hra": "HRA",
    "peft.tuners.lily": "Lily",
    "peft.tuners.lora.aqlm": "LoRA on AQLM layers",
    "peft.tuners.lora.arrow": "Arrow routing of LoRA adapters",
    "peft.tuners.lora.awq": "LoRA on AWQ layers",
    "peft.tuners.lora.dora": "DoRA",
    "peft.tuners.lora.eetq": "LoRA on EETQ layers",
    "peft.tuners.lora.gptq": "LoRA on GPTQ layers",
    "peft.tuners.lora.hqq": "LoRA on HQQ layers",
    "peft.tuners.lora.inc": "LoRA on Intel Neural Compressor layers",
    "peft.tuners.lora.intruders": "Intruder dimensions of LoRA",
    "peft.tuners.lora.monteclora": "Monte Carlo LoRA",
    "peft.tuners.lora.te": "LoRA on Transformer Engine layers",
    "peft.tuners.lora.torchao": "LoRA on torchao layers",
    "peft.tuners.lora.tp_layer": "LoRA on Megatron parallel layers",
    "peft.tuners.lora.velora": "VeLoRA",
    "peft.tuners.miss": "MiSS",
    "peft.tuners.osf": "OSF",
    "peft.tuners.peanut": "PEANuT",
    "peft.tuners.poly": "Poly",
    "peft.tuners.psoft": "PSOFT",
    "peft.tuners.pvera": "PVeRA",
    "peft.tuners.randlora": "RandLoRA",
    "peft.tuners.road": "RoAd",
    "peft.tuners.shadow": "Shadow",
    "peft.tuners.shira": "SHiRA",
    "peft.tuners.supertuning": "Supertuning",
    "peft.tuners.tinylora": "TinyLoRA",
    "peft.tuners.unilora": "Uni-LoRA",
    "peft.tuners.vblora": "VB-LoRA",
    "peft.tuners.waveft": "WaveFT",
    "peft.tuners.xlora": "X-LoRA",
    "peft.utils.incremental_pca": "EVA initialisation of LoRA",
}
"""Module -> what it is for; its own sub-modules are missing along with it."""

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "peft.optimizers": {"Riemannian preconditioning of LoRA": ("create_riemannian_optimizer",)},
    "peft.tuners.lora": {
        "Arrow routing of LoRA adapters": ("ArrowConfig", "create_arrow_model"),
        "BD-LoRA": ("BdLoraConfig",),
        "KaSA": ("KasaConfig",),
        "LoRA on EETQ layers": ("EetqLoraLinear",),
        "LoRA on GPTQ layers": ("GPTQLoraLinear",),
        "Monte Carlo LoRA": ("MontecloraConfig",),
        "VeLoRA": ("VeloraConfig",),
    },
    "peft.tuners.lora.bnb": {
        "The dispatch of LoRA's layer classes": ("dispatch_bnb_4bit", "dispatch_bnb_8bit"),
    },
    "peft.tuners.lora.config": {
        "Arrow routing of LoRA adapters": ("ArrowConfig",),
        "BD-LoRA": ("BdLoraConfig",),
        "KaSA": ("KasaConfig",),
        "Monte Carlo LoRA": ("MontecloraConfig",),
        "VeLoRA": ("VeloraConfig",),
    },
    "peft.tuners.lora.layer": {
        "Helpers for quantised and off-loaded layers": ("get_bnb_param_type", "skip_init_on_device"),
        "Inspection of what targets match": ("check_adapters_to_merge",),
        "LoRA on tensor-parallel layers": ("LoraEmbeddingATPHolder",),
        "The dispatch of LoRA's layer classes": ("dispatch_default",),
        "Variants of LoRA (DoRA and others)": ("LoraVariant",),
    },
    "peft.tuners.lora.model": {
        "Inspection of what targets match": ("find_parameter_name_by_module",),
        "LoRA on tensor-parallel layers": ("TpInfo", "add_lora_tp_hooks_dtensor", "get_tp_plan_and_mesh"),
        "Off-loaded adapters": ("get_device_map",),
        "Quantisation backends as classes": ("get_quantization_config",),
        "The dispatch of LoRA's layer classes": (
            "dispatch_aqlm",
            "dispatch_awq",
            "dispatch_default",
            "dispatch_eetq",
            "dispatch_gptq",
            "dispatch_hqq",
            "dispatch_inc",
            "dispatch_megatron",
            "dispatch_torchao",
            "dispatch_transformer_engine",
        ),
    },
    "peft.tuners.tuners_utils": {
        "GPTQ and AWQ helpers": ("is_gptqmodel_quant_linear",),
        "Inspection of what targets match": (
            "check_adapters_to_merge",
            "check_target_module_exists",
            "find_parameter_name_by_module",
            "inspect_matched_modules",
            "match_target_against_key",
        ),
        "Off-loaded adapters": ("get_device_map",),
        "Quantisation backends as classes": ("QuantizationBackend",),
        "Trainable tokens": ("set_additional_trainable_modules",),
    },
    "peft.utils": {
        "GPTQ and AWQ helpers": ("get_gptqmodel_quant_linear",),
        "Helpers for quantised and off-loaded layers": ("map_cache_to_layer_device_map",),
        "Cache layouts of old versions of transformers": (
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "bloom_model_postprocess_past_key_value",
        ),
        "Quantisation backends as classes": (
            "get_quantization_config",
            "get_quantization_kwargs",
            "quantization_extra_repr",
            "resolve_quantization_backend",
        ),
        "Trainable tokens": ("set_additional_trainable_modules",),
    },
    "peft.utils.other": {
        "GPTQ and AWQ helpers": (
            "get_gptqmodel_quant_linear",
            "is_gptqmodel_awq_layer",
            "is_gptqmodel_quant_linear",
        ),
        "Helpers for files and embeddings": ("check_file_exists_on_hf_hub",),
        "Inspection of what targets match": ("match_target_against_key",),
        "Cache layouts of old versions of transformers": (
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "bloom_model_postprocess_past_key_value",
            "starcoder_model_postprocess_past_key_value",
        ),
        "A helper for attention masks": ("create_attention_mask",),
        "Quantisation backends as classes": ("get_quantization_config",),
        "Trainable tokens": ("set_additional_trainable_modules",),
    },
    "peft.utils.constants": {
        "Cache layouts of old versions of transformers": (
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "bloom_model_postprocess_past_key_value",
            "starcoder_model_postprocess_past_key_value",
        ),
    },
    "peft.utils.save_and_load": {
        "Helpers for files and embeddings": (
            "check_file_exists_on_hf_hub",
            "get_embedding_layer_name",
            "has_valid_embedding_base_layer",
            "torch_load",
        ),
        "Inspection of what targets match": ("match_target_against_key",),
        "LoRA on tensor-parallel layers": ("TpInfo", "dtensor_from_local_like"),
    },
    "peft.utils.integrations": {
        "Helpers for quantised and off-loaded layers": (
            "get_bnb_param_type",
            "map_cache_to_layer_device_map",
            "skip_init_on_device",
        ),
    },
    "peft.utils.quantization_utils": {
        "GPTQ and AWQ helpers": ("is_gptqmodel_awq_layer",),
        "Quantisation backends as classes": (
            "Bnb4bitBackend",
            "Bnb8bitBackend",
            "ForwardOnlyQuantizationBackend",
            "HqqBackend",
            "TorchaoBackend",
            "dequantize_bnb_weight",
            "get_quantization_kwargs",
            "quantization_extra_repr",
            "resolve_quantization_backend",
        ),
    },
    "peft.utils.transformers_weight_conversion": {
        "Conversion of adapters of fused experts": (
            "FlattenDims",
            "PeftConcatenate",
            "PermuteDims",
            "convert_peft_adapter_state_dict_for_transformers",
            "convert_peft_config_for_transformers",
        ),
        "Inspection of what targets match": ("check_target_module_exists",),
    },
    "peft.helpers": {
        "DoRA": ("DoraCaching",),
        "KappaTune target selection": ("KappaTuneSelector", "find_kappa_target_modules"),
        "Monte Carlo LoRA": ("MontecloraTrainerMixin",),
    },
    "peft.peft_model": {
        "Activated LoRA": ("get_alora_offsets_for_forward", "get_alora_offsets_for_generate"),
        "Helpers for quantised and off-loaded layers": ("init_empty_weights", "map_cache_to_layer_device_map"),
        "Cache layouts of old versions of transformers": ("TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",),
        "A helper for attention masks": ("create_attention_mask",),
        "Trainable tokens": ("set_additional_trainable_modules",),
    },
    "peft.auto": {
        "Helpers for files and embeddings": ("check_file_exists_on_hf_hub",),
        "The list of libraries that configurations may import (here they never import any)": (
            "check_import_allowlist",
            "get_default_import_allowlist",
        ),
    },
}
"""Module that is here -> what its missing names belong to -> the names."""

MODEL_METHODS: dict[str, tuple[str, ...]] = {
    "Initialisations of LoRA that change the base model": ("subtract_mutated_init",),
}
"""What methods of a `PeftModel` and its tuner belong to -> their names."""

_TABLE = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING"
_METHODS = """
    ADAMSS BEFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA LILY MISS OSF PEANUT
    POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA WAVEFT
""".split()
# Default targets of methods, in each of the three places where they can be imported from.
for _module in ("peft.utils", "peft.utils.constants", "peft.utils.other"):
    NAMES[_module] |= {method: (_TABLE.format(method),) for method in _METHODS}


def method_of(fullname: str) -> str | None:
    """What the module or the name `fullname` ("peft.tuners.lora.ParamWrapper") belongs to; None: nothing known."""
    if fullname in MODULES:
        return MODULES[fullname]
    module, _, name = fullname.rpartition(".")
    table = MODEL_METHODS if module == "peft.PeftModel" else NAMES.get(module, {})
    return next((what for what, names in table.items() if name in names), None)
