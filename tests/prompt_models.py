"""Tiny models with prompts, and what they should compute, for the tests of the prompt methods.

Letters: B rows, T virtual tokens, L tokens, D width.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import gpt2, llama, opt, tokens
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
)

from peft import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

T = 4
METHODS = {
    "prompt": lambda **kw: PromptTuningConfig(**{"num_virtual_tokens": T, **kw}),
    "multitask": lambda **kw: MultitaskPromptTuningConfig(**{"num_virtual_tokens": T, "num_tasks": 3, **kw}),
    "p_mlp": lambda **kw: PromptEncoderConfig(**{"num_virtual_tokens": T, "encoder_hidden_size": 6, **kw}),
    "p_lstm": lambda **kw: PromptEncoderConfig(
        **{"num_virtual_tokens": T, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM", **kw}
    ),
    "prefix": lambda **kw: PrefixTuningConfig(**{"num_virtual_tokens": T, **kw}),
    "prefix_projection": lambda **kw: PrefixTuningConfig(
        **{"num_virtual_tokens": T, "prefix_projection": True, "encoder_hidden_size": 6, **kw}
    ),
    "cpt": lambda **kw: CPTConfig(
        **{"cpt_token_ids": [7, 8, 9, 10], "cpt_tokens_type_mask": [1, 2, 3, 4], "opt_projection_epsilon": 9.0,
           "opt_projection_format_epsilon": 9.0, **kw}
    ),
}  # fmt: skip
PREFIX = ("prefix", "prefix_projection")
COMPUTED = ("p_mlp", "p_lstm", "prefix_projection")
methods = pytest.mark.parametrize("method", METHODS)
causal = pytest.mark.parametrize("make", [llama, gpt2, opt], ids=["llama", "gpt2", "opt"])


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50)).eval()


def t5(**kw) -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, **kw)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    model.generation_config.decoder_start_token_id = 0
    return model


def bart() -> BartForConditionalGeneration:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return BartForConditionalGeneration(
        BartConfig(vocab_size=50, d_model=16, max_position_embeddings=64, **sizes)
    ).eval()


def spread(model):
    """Far apart, so that no choice and no comparison hangs on rounding."""
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def prompted(base, method: str, *names: str, task_type="CAUSAL_LM", **kw) -> PeftModel:
    """Trained adapters in float64; the first is active."""
    names = names or ("default",)
    model = get_peft_model(base, METHODS[method](task_type=task_type, **kw), names[0])
    for name in names[1:]:
        model.add_adapter(name, METHODS[method](task_type=task_type, **kw))
    for name in names:
        for _, parameter in model.prompt_encoder.adapter_tensors(name):
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model.double().eval()


def tasks(method: str, rows: int) -> dict:
    return {"task_ids": torch.arange(rows) % 3} if method == "multitask" else {}


def by_hand(model: PeftModel, method: str, name: str, ids: torch.Tensor, mask: torch.Tensor, task: int = 0):
    """The base model's logits of one causal row without padding: its prompt put in front by the model's own means."""
    base, encoder = model.get_base_model(), model.prompt_encoder[name]
    ids = ids[mask.bool()].unsqueeze(0)
    if method in PREFIX:
        config = model.peft_config[name]
        flat = encoder(torch.arange(T))
        cache = DynamicCache()
        pairs = flat.view(1, T, config.num_layers * 2, config.num_attention_heads, -1).permute(2, 0, 3, 1, 4)
        for layer in range(config.num_layers):
            cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
        return base(input_ids=ids, past_key_values=cache).logits[0]
    prompt = encoder(torch.arange(T))
    if method == "multitask":
        prompt = prompt * (encoder.prefix_task_cols[task] @ encoder.prefix_task_rows[task])
    embeds = torch.cat([prompt.unsqueeze(0), base.get_input_embeddings()(ids)], dim=1)
    return base(inputs_embeds=embeds).logits[0]


def padded_batch(side: str, rows: int = 3, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        blank = slice(0, row) if side == "left" else slice(length - row, length)
        mask[row, blank] = 0
    return ids * mask, mask
