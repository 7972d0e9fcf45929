"""What upstream 0.21.2 has and this package does not have yet, and what it belongs to, in words.

Generated once from an installed upstream, by name. Read only when somebody asks for a name that is not there, so that
it costs nothing. What arrives leaves these tables; a test says so.
"""

from __future__ import annotations

METHODS = {
    "AdaMSS": "AdamssConfig AdamssModel",
    "BEFT": "BeftConfig BeftModel",
    "C3A": "C3AConfig C3AModel",
    "DEFT": "DeftConfig DeftModel",
    "DeLoRA": "DeloraConfig DeloraModel",
    "FRoD": "FrodConfig FrodModel",
    "FourierFT": "FourierFTConfig FourierFTModel",
    "GLoRA": "GloraConfig GloraModel",
    "GraLoRA": "GraloraConfig GraloraModel",
    "HRA": "HRAConfig HRAModel",
    "HiRA": "HiraConfig HiraModel",
    "Lily": "LilyConfig LilyModel",
    "MiSS": "MissConfig MissModel",
    "OSF": "OSFConfig OSFModel",
    "PEANuT": "PeanutConfig PeanutModel",
    "PSOFT": "PsoftConfig PsoftModel",
    "PVeRA": "PveraConfig PveraModel",
    "Poly": "PolyConfig PolyModel",
    "RandLoRA": "RandLoraConfig RandLoraModel",
    "RoAd": "RoadConfig RoadModel",
    "SHiRA": "ShiraConfig ShiraModel",
    "Shadow": "ShadowConfig ShadowModel",
    "Supertuning": "SupertuningConfig SupertuningModel",
    "TinyLoRA": "TinyLoraConfig TinyLoraModel",
    "Uni-LoRA": "UniLoraConfig UniLoraModel",
    "VB-LoRA": "VBLoRAConfig VBLoRAModel",
    "WaveFT": "WaveFTConfig WaveFTModel",
    "X-LoRA": "XLoraConfig XLoraModel",
}
"""Method with a package of its own (`peft.tuners.adamss`) -> its public names."""

FEATURES = {
    "A helper for attention masks": "create_attention_mask",
    "Activated LoRA": "get_alora_offsets_for_forward get_alora_offsets_for_generate",
    "Arrow routing of LoRA adapters": "ArrowConfig create_arrow_model",
    "BD-LoRA": "BdLoraConfig",
    "Cache layouts of old versions of transformers": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
    "bloom_model_postprocess_past_key_value starcoder_model_postprocess_past_key_value",
    "Cartridges": "CartridgeConfig CartridgeEncoder compose_cartridge_adapters "
    "initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values",
    "Conversion of adapters of fused experts": "FlattenDims PeftConcatenate PermuteDims "
    "convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers",
    "The cache of DoRA's norms": "DoraCaching",
    "GPTQ and AWQ helpers": "get_gptqmodel_quant_linear is_gptqmodel_awq_layer is_gptqmodel_quant_linear",
    "Helpers for files and embeddings": "check_file_exists_on_hf_hub get_embedding_layer_name "
    "has_valid_embedding_base_layer torch_load",
    "Helpers for quantised and off-loaded layers": "get_bnb_param_type init_empty_weights "
    "map_cache_to_layer_device_map skip_init_on_device",
    "Initialisations of LoRA that change the base model": "subtract_mutated_init",
    "Inspection of what targets match": "check_adapters_to_merge check_target_module_exists "
    "find_parameter_name_by_module inspect_matched_modules match_target_against_key",
    "KaSA": "KasaConfig",
    "KappaTune target selection": "KappaTuneSelector find_kappa_target_modules",
    "A LoRA class of its own for EETQ layers (lora.Linear adapts them)": "EetqLoraLinear",
    "A LoRA class of its own for GPTQ layers (lora.Linear adapts them)": "GPTQLoraLinear",
    "LoRA on tensor-parallel layers": "LoraEmbeddingATPHolder TpInfo add_lora_tp_hooks_dtensor "
    "dtensor_from_local_like get_tp_plan_and_mesh",
    "Monte Carlo LoRA": "MontecloraConfig MontecloraTrainerMixin",
    "Off-loaded adapters": "get_device_map",
    "Quantisation backends as classes": "Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend HqqBackend "
    "QuantizationBackend TorchaoBackend dequantize_bnb_weight get_quantization_config get_quantization_kwargs "
    "quantization_extra_repr resolve_quantization_backend",
    "Riemannian preconditioning of LoRA": "create_riemannian_optimizer",
    "The dispatch of LoRA's layer classes": "dispatch_aqlm dispatch_awq dispatch_bnb_4bit dispatch_bnb_8bit "
    "dispatch_default dispatch_eetq dispatch_gptq dispatch_hqq dispatch_inc dispatch_megatron dispatch_torchao "
    "dispatch_transformer_engine",
    "The list of libraries that configurations may import (here they never import any)": "check_import_allowlist "
    "get_default_import_allowlist",
    "Trainable tokens": "set_additional_trainable_modules",
    "VeLoRA": "VeloraConfig",
    "Variants of LoRA (DoRA and others)": "LoraVariant",
}
"""Anything else -> the names that belong to it."""

MODULES = {
    **{f"peft.tuners.{method.lower().replace('-', '')}": method for method in METHODS},
    "peft.tuners.cartridge": "Cartridges",
    "peft.tuners.lora.arrow": "Arrow routing of LoRA adapters",
    "peft.tuners.lora.dora": "A module of DoRA's layers (DoRA itself is here: LoraConfig(use_dora=True))",
    "peft.tuners.lora.inc": "LoRA on Intel Neural Compressor layers",
    "peft.tuners.lora.intruders": "Intruder dimensions of LoRA",
    "peft.tuners.lora.monteclora": "Monte Carlo LoRA",
    "peft.tuners.lora.te": "LoRA on Transformer Engine layers",
    "peft.tuners.lora.tp_layer": "LoRA on Megatron parallel layers",
    "peft.tuners.lora.velora": "VeLoRA",
    "peft.utils.incremental_pca": "EVA initialisation of LoRA",
    **{
        f"peft.tuners.lora.{library.lower()}": f"A LoRA class of its own for {library} layers (lora.Linear adapts them)"
        for library in ("AQLM", "AWQ", "EETQ", "GPTQ", "HQQ", "torchao")
    },
}
"""Module -> what it is for; its own sub-modules are missing along with it."""

_PUBLIC = " ".join((
    *METHODS.values(), *(FEATURES[what] for what in ("Arrow routing of LoRA adapters", "Cartridges")),
    "BdLoraConfig KasaConfig MontecloraConfig VeloraConfig find_kappa_target_modules",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value",
))  # fmt: skip
_TARGETS = {f"TRANSFORMERS_MODELS_TO_{method.upper().replace('-', '')}_TARGET_MODULES_MAPPING": method
            for method in METHODS if method not in ("Shadow", "X-LoRA")}  # fmt: skip
_CONSTANTS = " ".join((FEATURES["Cache layouts of old versions of transformers"], *_TARGETS))

NAMES = {
    "peft": _PUBLIC,
    "peft.PeftModel": "subtract_mutated_init",
    "peft.auto": "check_file_exists_on_hf_hub check_import_allowlist get_default_import_allowlist",
    "peft.helpers": "DoraCaching KappaTuneSelector MontecloraTrainerMixin find_kappa_target_modules",
    "peft.optimizers": "create_riemannian_optimizer",
    "peft.peft_model": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING create_attention_mask "
    "get_alora_offsets_for_forward get_alora_offsets_for_generate init_empty_weights map_cache_to_layer_device_map "
    "set_additional_trainable_modules",
    "peft.tuners": _PUBLIC,
    "peft.tuners.lora": "ArrowConfig BdLoraConfig EetqLoraLinear GPTQLoraLinear KasaConfig MontecloraConfig "
    "VeloraConfig create_arrow_model",
    "peft.tuners.lora.bnb": "dispatch_bnb_4bit dispatch_bnb_8bit",
    "peft.tuners.lora.config": "ArrowConfig BdLoraConfig KasaConfig MontecloraConfig VeloraConfig",
    "peft.tuners.lora.layer": "LoraEmbeddingATPHolder LoraVariant check_adapters_to_merge "
    "dispatch_default get_bnb_param_type skip_init_on_device",
    "peft.tuners.lora.model": "TpInfo add_lora_tp_hooks_dtensor dispatch_aqlm dispatch_awq dispatch_default "
    "dispatch_eetq dispatch_gptq dispatch_hqq dispatch_inc dispatch_megatron dispatch_torchao "
    "dispatch_transformer_engine find_parameter_name_by_module get_device_map get_quantization_config "
    "get_tp_plan_and_mesh",
    "peft.tuners.tuners_utils": "QuantizationBackend check_adapters_to_merge check_target_module_exists "
    "find_parameter_name_by_module get_device_map inspect_matched_modules is_gptqmodel_quant_linear "
    "match_target_against_key set_additional_trainable_modules",
    "peft.utils": f"{' '.join(_TARGETS)} TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
    "bloom_model_postprocess_past_key_value get_gptqmodel_quant_linear get_quantization_config "
    "get_quantization_kwargs map_cache_to_layer_device_map quantization_extra_repr resolve_quantization_backend "
    "set_additional_trainable_modules",
    "peft.utils.constants": _CONSTANTS,
    "peft.utils.integrations": "get_bnb_param_type map_cache_to_layer_device_map skip_init_on_device",
    "peft.utils.other": f"{_CONSTANTS} check_file_exists_on_hf_hub create_attention_mask get_gptqmodel_quant_linear "
    "get_quantization_config is_gptqmodel_awq_layer is_gptqmodel_quant_linear match_target_against_key "
    "set_additional_trainable_modules",
    "peft.utils.quantization_utils": "Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend HqqBackend "
    "TorchaoBackend dequantize_bnb_weight get_quantization_kwargs is_gptqmodel_awq_layer quantization_extra_repr "
    "resolve_quantization_backend",
    "peft.utils.save_and_load": "TpInfo check_file_exists_on_hf_hub dtensor_from_local_like get_embedding_layer_name "
    "has_valid_embedding_base_layer match_target_against_key torch_load",
    "peft.utils.transformers_weight_conversion": "FlattenDims PeftConcatenate PermuteDims check_target_module_exists "
    "convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers",
}
"""Module that is here (or the class `peft.PeftModel`) -> the names that it lacks."""

_WHAT = _TARGETS | {name: what for what, names in (METHODS | FEATURES).items() for name in names.split()}


def method_of(fullname: str) -> str | None:
    """What the module or the name `fullname` ("peft.tuners.lora.ParamWrapper") belongs to; None: nothing known."""
    module, _, name = fullname.rpartition(".")
    return MODULES.get(fullname) or (_WHAT[name] if name in NAMES.get(module, "").split() else None)
