"""The one table of the package's public names: where each is defined. (What upstream has besides is in `_missing.py`.)

A method that arrives adds its names here and to the `TYPE_CHECKING` block of the package (a test holds the two
together).
"""

from __future__ import annotations

EXPORTS = {
    ".auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
    "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
    "AutoPeftModelForTokenClassification",
    ".config": "PeftConfig PromptLearningConfig",
    ".mapping": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
    "get_peft_config inject_adapter_in_model",
    ".mapping_func": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING get_peft_model",
    ".memory": "MemoryEstimate estimate_memory",
    ".mixed_model": "PeftMixedModel",
    ".peft_model": "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
    "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification get_layer_status "
    "get_model_status",
    ".tuners.adaption_prompt": "AdaptionPromptConfig AdaptionPromptModel",
    ".tuners.cpt": "CPTConfig CPTEmbedding",
    ".tuners.adalora": "AdaLoraConfig AdaLoraModel",
    ".tuners.boft": "BOFTConfig BOFTModel",
    ".tuners.bottleneck": "BottleneckConfig BottleneckModel",
    ".tuners.denas": "CompactLoraConfig DenasConfig search_structure",
    ".tuners.ia3": "IA3Config IA3Model",
    ".tuners.ln_tuning": "LNTuningConfig LNTuningModel",
    ".tuners.loha": "LoHaConfig LoHaModel",
    ".tuners.lokr": "LoKrConfig LoKrModel",
    ".tuners.lora": "EvaConfig LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig convert_to_lora "
    "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora",
    ".tuners.oft": "OFTConfig OFTModel",
    ".tuners.multitask_prompt_tuning": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    ".tuners.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    ".tuners.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    ".tuners.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    ".tuners.sft.config": "SftArguments SftConfig",
    ".tuners.sft.model": "SftModel",
    ".tuners.sft.optimizer": "SftAdamW SftSM3",
    ".tuners.sft.selector": "SftSelector",
    ".tuners.sft.static": "select_static",
    ".tuners.sft.trainer": "SftTrainer",
    ".tuners.ssf": "SSFConfig SsfConfig SsfModel",
    ".tuners.trainable_tokens": "TrainableTokensConfig TrainableTokensModel",
    ".tuners.vera": "VeraConfig VeraModel",
    ".utils.error": "NoMatchingPeftModuleError PeftError",
    ".utils.loftq_utils": "replace_lora_weights_loftq",
    ".utils.other": "cast_mixed_precision_params prepare_model_for_kbit_training shift_tokens_right",
    ".utils.peft_types": "PeftType TaskType",
    ".utils.save_and_load": "get_base_model_state_dict get_peft_model_state_dict load_peft_weights "
    "set_base_model_state_dict set_peft_model_state_dict",
    ".utils.warning": "PeftWarning",
}
"""Module, relative to the package -> the public names it defines."""

SUBMODULES = (
    "auto", "config", "deltatuner", "finetuna", "functional", "helpers", "import_utils", "mapping", "mapping_func",
    "mixed_model", "peft_model", "tuners", "utils",
)  # fmt: skip
"""Submodules that work as attributes right after `import peft`, as upstream's do."""

TABLE = {name: module for module, names in EXPORTS.items() for name in names.split()}
