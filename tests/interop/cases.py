"""The cases of the interoperability check: tiny random base models, and adapter configurations for each.

Read by the workers of both libraries, so it uses nothing but names that both have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

VOCABULARY, WIDTH, INNER, HEADS = 96, 32, 48, 4
BATCH, LENGTH = 3, 7


class ConvNet(nn.Module):
    """One convolution of each dimension and a linear layer: `x` (batch, 64) -> (batch, 5)."""

    def __init__(self):
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU())
        oblong, square = nn.Conv2d(6, 8, (3, 1), stride=(2, 1), padding=(1, 0)), nn.Conv2d(8, 8, 2)
        self.plane = nn.Sequential(oblong, nn.ReLU(), nn.ZeroPad2d((1, 0, 1, 0)), square, nn.Conv2d(8, 8, 1))
        self.space = nn.Sequential(nn.Conv3d(8, 4, 2, bias=False), nn.ReLU())
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.line(x.view(-1, 4, 16))
        x = self.plane(x.view(-1, 6, 4, 4))
        x = self.space(x.view(-1, 8, 2, 2, 2).repeat(1, 1, 1, 1, 2))
        return self.head(x.reshape(x.shape[0], -1))


class AttentionNet(nn.Module):
    """An attention of torch and its cross attention: `x` (batch, LENGTH, WIDTH) -> the same."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        context, padding = x.flip(-1).transpose(0, 1), torch.arange(LENGTH).expand(len(x), -1) > 4
        y, _ = self.cross(x.transpose(0, 1), context, 2 * context, key_padding_mask=padding)
        return self.head(x + y.transpose(0, 1))


PLAIN = {"conv": ConvNet, "attention": AttentionNet}  # bases that are no models of transformers


def _transformers_model(model_class: str, config_class: str, **config) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model_class)(getattr(transformers, config_class)(**config))

    return make


def _llama(**config) -> Callable[[], nn.Module]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 3}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    return _transformers_model("LlamaForCausalLM", "LlamaConfig", **sizes, **heads, **config)


def _bert(model_class: str, labels: int = 3) -> Callable[[], nn.Module]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2}
    return _transformers_model(model_class, "BertConfig", **sizes, num_attention_heads=HEADS, num_labels=labels)


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True),
    "gpt2": _transformers_model(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=HEADS
    ),
    "opt": _transformers_model(
        "OPTForCausalLM", "OPTConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH,
        ffn_dim=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
    ),
    "bert-sequences": _bert("BertForSequenceClassification"),
    "bert-tokens": _bert("BertForTokenClassification"),
    "bert-questions": _bert("BertForQuestionAnswering", labels=2),
    "bert": _bert("BertModel"),
    "t5": _transformers_model(
        "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=INNER,
        num_layers=2, num_heads=HEADS,
    ),
    "mixtral": _transformers_model(
        "MixtralForCausalLM", "MixtralConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=2, num_local_experts=3,
    ),
    **PLAIN,
}  # fmt: skip


def make_inputs(base: str) -> dict[str, torch.Tensor]:
    """Random inputs of a base model, by the names of its forward's arguments."""
    if base == "conv":
        return {"x": torch.randn(BATCH, 64)}
    if base == "attention":
        return {"x": torch.randn(BATCH, LENGTH, WIDTH)}
    inputs = {"input_ids": torch.randint(2, VOCABULARY, (BATCH, LENGTH))}
    if base == "t5":
        inputs["decoder_input_ids"] = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    return inputs


def outputs(result) -> torch.Tensor:
    """The numbers that count in what a model returns, as one tensor."""
    if torch.is_tensor(result):
        return result
    for names in (("logits",), ("start_logits", "end_logits"), ("last_hidden_state",)):
        if all(name in result for name in names):
            return torch.cat([result[name].flatten(1) for name in names], dim=1)
    raise TypeError(f"No output that we know in {list(result)}")


@dataclass
class Case:
    """Adapters on a base model.

    Attributes:
        name: what the table shows.
        base: key of `BASES`.
        adapters: `{adapter name: arguments of its configuration}`, the first one active.
        config: the class of the configurations.
        dtype: of the base model.
        tolerance: largest difference of an output.
        upstream_merges: whether upstream's merged model gives what it gave before merging.
        is_prompt: whether the adapters are prompts, which cannot be merged, and of which upstream has no status and
            none to train on.
        extra: further inputs for the adapters, one entry per row.
        upstream_mixes: whether upstream's model heeds the names of a mixed batch.
        upstream_freezes: whether upstream's adapters train only while they are active.
    """

    name: str
    base: str
    adapters: dict[str, dict]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5
    upstream_merges: bool = True
    config: str = "LoraConfig"
    is_prompt: bool = False
    extra: dict[str, list] = field(default_factory=dict)
    upstream_mixes: bool = True
    upstream_freezes: bool = True


@dataclass
class _Family:
    """Cases on one base model, of one method."""

    base: str
    common: dict = field(default_factory=dict)
    config: str = "LoraConfig"

    def __call__(self, name: str, **config) -> Case:
        return Case(name, self.base, {"default": self.common | config}, config=self.config)


_llama_case = _Family("llama", {"task_type": "CAUSAL_LM"})
_gpt2_case = _Family("gpt2", {"task_type": "CAUSAL_LM", "fan_in_fan_out": True})
_experts_case = _Family(
    "mixtral", {"task_type": "CAUSAL_LM", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
)
_opt_case = _Family("opt", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "fc1"]})

_causal = {"task_type": "CAUSAL_LM"}
_ranks = {**_causal, "total_step": 100}


def _lycoris_cases(config: str) -> list[Case]:
    name, images = config.removesuffix("Config"), ["line.0", "plane.0", "head"]  # upstream has no Conv3d
    return [
        _Family("llama", _causal, config)(f"{name}, defaults"),
        _Family("llama", _causal, config)(f"{name}, patterns, all-linear", r=2, target_modules="all-linear",
                                          rank_pattern={"up_proj": 3}, alpha_pattern={"q_proj": 3.0}),
        _Family("bert-sequences", {"task_type": "SEQ_CLS"}, config)(f"{name}, BERT", r=4, alpha=16),
        _Family("conv", {}, config)(f"{name}, convolutions", r=1, alpha=32, target_modules=images),
        _Family("conv", {}, config)(f"{name}, convolutions, full", r=8, alpha=64, target_modules=images),
    ]  # fmt: skip


_prompts = {
    "PromptTuningConfig": {},
    "MultitaskPromptTuningConfig": {"num_tasks": 3, "num_ranks": 2},
    "PromptEncoderConfig": {"encoder_hidden_size": 12},
    "PrefixTuningConfig": {},
}
_tasks = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert-sequences": "SEQ_CLS", "bert-tokens": "TOKEN_CLS",
          "bert-questions": "QUESTION_ANS", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}  # fmt: skip
# With decoder_input_ids, for question answering and for features upstream's multitask prompt tuning fails.
_multitask = ("llama", "gpt2", "bert-sequences", "bert-tokens")


def _prompt_case(base: str, config: str, name: str, two: bool = False, **fields) -> Case:
    own = {"num_virtual_tokens": 5, "task_type": _tasks[base], **_prompts.get(config, {}), **fields}
    extra = {"task_ids": [0, 2, 1]} if config.startswith("Multitask") else {}
    adapters = {"default": own, "second": own | {"num_virtual_tokens": 3}} if two else {"default": own}
    return Case(
        name, base, adapters, config=config, is_prompt=True, extra=extra, upstream_mixes=False, upstream_freezes=False
    )


_classes = {"task_type": "SEQ_CLS"}
_tokens = {"token_indices": [*range(60, 1, -1)]}  # most of the vocabulary: some are in the inputs


def _scaling_cases() -> list[Case]:
    def llama(config: str, base: str = "llama"):
        return _Family(base, _causal, config)

    def images(config: str):
        return _Family("conv", {}, config)

    gpt2 = _causal | {"fan_in_fan_out": True}
    return [
        llama("IA3Config")("IA3, defaults"),
        _Family("gpt2", gpt2, "IA3Config")("IA3, GPT-2"),
        _Family("bert-sequences", _classes, "IA3Config")("IA3, BERT"),
        _Family("t5", {"task_type": "SEQ_2_SEQ_LM"}, "IA3Config")("IA3, T5"),
        images("IA3Config")("IA3, convolutions", target_modules=["plane.0", "space.0", "head"],
                            feedforward_modules=["space.0"]),
        llama("LNTuningConfig")("LN tuning, defaults"),
        _Family("gpt2", _causal, "LNTuningConfig")("LN tuning, GPT-2"),
        llama("TrainableTokensConfig")("Trainable tokens", **_tokens),
        llama("TrainableTokensConfig", "llama-tied")("Trainable tokens, tied", **_tokens),
        llama("LoraConfig")("LoRA, trainable tokens", trainable_token_indices=[*range(2, 60)]),
        llama("LoraConfig", "llama-tied")("LoRA, trainable tokens, tied",
                                          trainable_token_indices={"embed_tokens": [*range(50)]}),
        llama("OFTConfig")("OFT, defaults", oft_block_size=8),
        llama("OFTConfig")("OFT, Cayley, shared, all-linear", r=4, oft_block_size=0, block_share=True,
                           use_cayley_neumann=False, target_modules="all-linear"),
        llama("OFTConfig")("OFT, 3 terms, embeddings", num_cayley_neumann_terms=3, oft_block_size=5,
                           target_modules=["embed_tokens", "o_proj"]),
        llama("OFTConfig")("OFT, constrained", coft=True, eps=0.3, oft_block_size=8),
        _Family("opt", _causal, "OFTConfig")("OFT, OPT, biases", bias="oft_only", oft_block_size=4),
        llama("BOFTConfig")("BOFT, defaults"),
        llama("BOFTConfig")("BOFT, 2 blocks, all-linear", boft_block_size=0, boft_block_num=2,
                            target_modules="all-linear"),
        _Family("opt", _causal, "BOFTConfig")("BOFT, OPT, biases", bias="boft_only", target_modules=["fc1", "q_proj"]),
        # Upstream's BOFT fails on kernels that are not square, its OFT is itself when merged for those of size 1 alone.
        images("OFTConfig")("OFT, convolutions", oft_block_size=2, target_modules=["plane.4", "head"]),
        images("BOFTConfig")("BOFT, convolutions", boft_block_size=2, target_modules=["plane.3", "head"]),
        images("LNTuningConfig")("LN tuning, linear", target_modules=["head"]),
    ]  # fmt: skip


_two = {
    "AdaLoraConfig": {"total_step": 100, "inference_mode": True, "lora_alpha": 100}, "BOFTConfig": {}, "IA3Config": {},
    "LNTuningConfig": {}, "LoHaConfig": {}, "LoKrConfig": {}, "OFTConfig": {"oft_block_size": 8},
    "TrainableTokensConfig": _tokens, "VeraConfig": {"r": 8},
}  # fmt: skip


def _name(config: str) -> str:
    return f"{config.removesuffix('Config')}, two adapters"


CASES = [
    _llama_case("Llama, defaults"),
    _llama_case("Llama, all-linear, rsLoRA, dropout", target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
    _llama_case("Llama, regular expression, excluded modules",
                target_modules=r".*\.(q_proj|down_proj)", exclude_modules=["layers.1.mlp.down_proj"]),
    _llama_case("Llama, rank and alpha patterns", target_modules=["q_proj", "up_proj", "down_proj"], r=4,
                rank_pattern={"layers.0.self_attn.q_proj": 2, "up_proj": 6}, alpha_pattern={"down_proj": 32}),
    _llama_case("Llama, a structure that DE-NAS found", r=4,
                target_modules=["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"],
                rank_pattern={r"^model\.layers\.2\.self_attn\.q_proj": 6},
                alpha_pattern={r"^model\.layers\.0\.mlp\.up_proj": 12, r"^model\.layers\.2\.self_attn\.q_proj": 6}),
    _llama_case("Llama, layers_to_transform", target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2],
                layers_pattern="layers"),
    _llama_case("Llama, embeddings", target_modules=["embed_tokens", "q_proj"]),
    _llama_case("Llama, embeddings and head", target_modules=["embed_tokens", "lm_head", "k_proj"]),
    _llama_case("Llama, modules_to_save", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    _llama_case("Llama, init orthogonal", target_modules=["o_proj"], init_lora_weights="orthogonal"),
    _llama_case("Llama, init PiSSA", target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"),
    _llama_case("Llama, init EVA, to come", init_lora_weights="eva", eva_config={"rho": 3.0}),
    # Upstream merges into weights that several layers share.
    Case("Llama, layer replication", "llama",
         {"default": {**_causal, "target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 3)]}},
         upstream_merges=False),
    _experts_case("Mixtral, experts", target_modules=["q_proj"]),
    _experts_case("Mixtral, experts only", target_modules=[], use_rslora=True,
                  rank_pattern={"experts.down_proj": 3}),
    _llama_case("Llama, init OLoRA", target_modules=["q_proj", "up_proj"], init_lora_weights="olora", use_rslora=True),
    _llama_case("Llama, DoRA", target_modules="all-linear", use_dora=True),
    _llama_case("Llama, DoRA, embeddings", target_modules=["embed_tokens", "q_proj"], use_dora=True),
    _llama_case("Llama, no task type", target_modules=["o_proj"], task_type=None),
    # Upstream merges the embedding's delta into the weight that the head shares.
    Case("Llama, tied embeddings", "llama-tied",
         {"default": {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj"]}}, upstream_merges=False),
    Case("Llama, another adapter name", "llama", {"pirate": {"task_type": "CAUSAL_LM", "r": 3}}),
    Case("Llama, two adapters", "llama", {
        "default": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]},
        "second": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj", "up_proj"], "r": 2},
    }),
    Case("Llama, bfloat16", "llama", {"default": {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}},
         dtype=torch.bfloat16, tolerance=2e-2),
    _gpt2_case("GPT-2 (Conv1D), defaults"),
    _gpt2_case("GPT-2 (Conv1D), all projections", target_modules=["c_attn", "c_proj", "c_fc"]),
    _opt_case("OPT, bias none"),
    _opt_case("OPT, bias lora_only", bias="lora_only"),
    _opt_case("OPT, bias all", bias="all"),
    _opt_case("OPT, lora_bias", lora_bias=True),
    _Family("bert-sequences")("BERT, sequence classification", task_type="SEQ_CLS"),
    _Family("bert-tokens")("BERT, token classification", task_type="TOKEN_CLS", target_modules=["query", "dense"]),
    _Family("bert-questions")("BERT, question answering", task_type="QUESTION_ANS"),
    _Family("bert")("BERT, feature extraction", task_type="FEATURE_EXTRACTION", target_modules="all-linear"),
    _Family("t5")("T5, defaults", task_type="SEQ_2_SEQ_LM"),
    _Family("t5")("T5, all-linear", task_type="SEQ_2_SEQ_LM", target_modules="all-linear"),
    _Family("conv")("Convolutions", target_modules=["line.0", "plane.0", "space.0", "head"], r=2),
    _Family("conv")("Convolutions, DoRA", target_modules=["line.0", "plane.0", "space.0", "head"], r=2, use_dora=True),
    _gpt2_case("GPT-2 (Conv1D), DoRA", use_dora=True),
    _Family("conv")("Convolutions, modules_to_save", target_modules=["plane.0"], modules_to_save=["head"]),
    _Family("attention")("Attention of torch", target_modules=["attn", "cross"], r=4, lora_alpha=16),
    _Family("attention")("Attention of torch, patterns", target_modules=r".*(attn|head|cross)", r=4, use_rslora=True,
                         rank_pattern={"attn": 2}, alpha_pattern={"cross": 4}, lora_dropout=0.1),
    Case("Attention of torch, two adapters", "attention", {
        "default": {"target_modules": ["attn"], "r": 4},
        "second": {"target_modules": ["attn", "cross", "head"], "r": 2},
    }, upstream_mixes=False),
    *_lycoris_cases("LoHaConfig"),
    *_lycoris_cases("LoKrConfig"),
    # (Upstream's LoKr fails on such kernels as these here.)
    _Family("conv", {}, "LoHaConfig")("LoHa, convolutions, kernels apart", r=2, alpha=32, use_effective_conv2d=True,
                                      target_modules=["line.0", "plane.0", "head"]),
    _Family("llama", _ranks, "AdaLoraConfig")("AdaLoRA, defaults"),
    _Family("llama", _ranks, "AdaLoraConfig")("AdaLoRA, all-linear, dropout", init_r=5, target_r=3, lora_alpha=16,
                                              lora_dropout=0.1, target_modules="all-linear"),
    _Family("gpt2", {**_ranks, "fan_in_fan_out": True}, "AdaLoraConfig")("AdaLoRA, GPT-2 (Conv1D)"),
    _Family("opt", _ranks, "AdaLoraConfig")("AdaLoRA, OPT, bias lora_only", bias="lora_only"),
    _Family("conv", {"total_step": 100}, "AdaLoraConfig")("AdaLoRA, convolutions", lora_alpha=100,
                                                          target_modules=["plane.0", "head"]),
    *(_prompt_case(base, config, f"{config.removesuffix('Config')}, {base}") for config in _prompts
      for base in (_multitask if config.startswith("Multitask") else _tasks)),
    _prompt_case("llama", "PromptEncoderConfig", "PromptEncoder, LSTM", encoder_reparameterization_type="LSTM"),
    _prompt_case("llama", "PrefixTuningConfig", "PrefixTuning, projection", prefix_projection=True),
    Case("CPT", "llama", {"default": {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4],
                                      "task_type": "CAUSAL_LM"}}, config="CPTConfig", is_prompt=True),
    *(Case(f"LLaMA-Adapter, {base}", base, {"default": {**_causal, "adapter_len": 4, "adapter_layers": 2}},
           config="AdaptionPromptConfig", is_prompt=True) for base in ("llama", "gpt2")),
    _Family("llama", _causal, "VeraConfig")("VeRA, defaults"),
    _Family("llama", _causal, "VeraConfig")("VeRA, layers of several sizes, dropout", r=16, d_initial=0.5,
                                            projection_prng_key=3, target_modules="all-linear", vera_dropout=0.1),
    _Family("llama", _causal, "VeraConfig")("VeRA, without projections", r=8, save_projection=False),
    _Family("gpt2", {**_causal, "fan_in_fan_out": True}, "VeraConfig")("VeRA, GPT-2 (Conv1D)", r=8),
    _Family("opt", _causal, "VeraConfig")("VeRA, OPT, bias vera_only", r=8, bias="vera_only",
                                          target_modules=["q_proj", "v_proj"]),
    _Family("llama", _causal, "LoKrConfig")("LoKr, both decomposed, lycoris's start", r=2, decompose_both=True,
                                            decompose_factor=8, target_modules="all-linear", init_weights="lycoris"),
    *_scaling_cases(),
    *(Case(_name(config), "llama", {"default": _causal | own, "second": _causal | own}, config=config,
           upstream_mixes=False) for config, own in _two.items()),
    *(_prompt_case("llama", config, _name(config), two=True) for config in _prompts),
]  # fmt: skip
