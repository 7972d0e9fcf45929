"""File names, shorthands and default targets per architecture: facts of the format, no code."""

from __future__ import annotations

from .._lazy import explain_missing

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
PROMPT_NETWORK_NAME = "prompt_network.safetensors"  # beside an adapter whose prompt is computed, for training to go on
STRUCTURE_NAME = "best_model_structure.txt"  # beside an adapter that DE-NAS found, as deltatuner has it
SAFETENSORS_INDEX_NAME = "adapter_model.safetensors.index.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]


def _by_model(models_of: dict[str, str]) -> dict[str, list[str]]:
    """`{names of modules: model types}`, words in both -> `{model type: [name of a module, ...]}`."""
    return {model: names.split() for names, models in models_of.items() for model in models.split()}


TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = _by_model({
    "q v": "t5 mt5",
    "q_proj v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    "q v q_proj v_proj": "blip-2",
    "query value": "bert electra layoutlm roberta xlm-roberta",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}) | {"gemma4": ".*language_model\\..*\\.(q_proj|v_proj)"}  # fmt: skip

TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "phi": ["q_proj", "v_proj"],
}
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = {
    **{
        model: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model]
        for model in (
            "gpt2", "bloom", "gptj", "gpt_neox", "gpt_neo", "bert", "deberta", "llama", "llama4", "gpt_bigcode",
            "gemma", "gemma2", "gemma3_text", "gemma4", "qwen2", "qwen3", "nemotron_h",
        )
    },
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}  # fmt: skip

TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = _by_model({
    "k v wo": "t5",
    "k v wi_1": "mt5",
    "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
    "query_key_value mlp.dense_4h_to_h": "bloom",
    "query_key_value dense_4h_to_h": "falcon gpt_neox RefinedWeb RefinedWebModel",
    "key value output.dense": "bert roberta",
    "key_proj value_proj output.dense": "deberta-v2",
    "in_proj output.dense": "deberta",
    "q_proj k_proj fc2": "opt",
    "q_proj v_proj fc2": "bart phi",
    "q_proj v_proj fc_out": "gptj",
    "q_proj v_proj c_proj": "gpt_neo",
    "q_proj v_proj down_proj": "gemma gemma2 gemma3_text llama4 qwen2 qwen3",
    "k_proj v_proj down_proj": "llama mistral",
    "k_proj v_proj w2": "mixtral",
})  # fmt: skip
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {
    **{model: names[-1:] for model, names in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items()},
    "mt5": [],
}

TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING = _by_model({
    "input_layernorm post_attention_layernorm norm": "gemma llama mistral",
    "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm":
        "gemma2 gemma3_text",
    "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
    "layer_norm final_layer_norm": "t5 mt5",
    "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
    "ln_1 ln_2 ln_f": "gpt2",
    "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
    "ln_1 ln_f": "gptj",
    "input_layernorm final_layernorm": "phi",
    "post_attention_layernorm": "qwen2 qwen3",
})  # fmt: skip

TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()
TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

explain_missing(__name__)
