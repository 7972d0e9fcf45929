"""Tiny random language models and adapters for them, for the tests that need a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from peft import LoraConfig, PeftModel, SftConfig, SsfConfig, get_peft_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
CONFIGS = {
    "lora": lambda **kw: LoraConfig(**{"r": 2, "init_lora_weights": False, **kw}),
    "sft": lambda **kw: SftConfig(**{"num_tunable_weights": 60, **kw}),
    "ssf": lambda **kw: SsfConfig(**{"init_ssf_weights": "normal", **kw}),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
methods = pytest.mark.parametrize("method", list(CONFIGS))


def llama(**kw) -> LlamaForCausalLM:
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, **kw}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)).eval()


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=24, num_labels=3)).eval()


def tokens(rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(3, 50, (rows, length))


def logits(model: nn.Module, ids: torch.Tensor, **kw) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kw).logits


def adapted(base: nn.Module, *names: str, method: str = "lora", **kw) -> PeftModel:
    """A model whose adapters all change it; the first is active."""
    names = names or ("default",)
    config = {"target_modules": ["q_proj", "v_proj"], **kw}
    model = get_peft_model(base, CONFIGS[method](**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[method](**config))
    for layer in model.base_model.layers():
        for name in names:
            for _, parameter in layer.adapter_tensors(name):
                if parameter.is_floating_point():
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def losses_of_training(model: nn.Module, ids: torch.Tensor, steps: int, lr: float) -> list[float]:
    """Of a language model that learns one batch by heart, with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module) -> set[str]:
    """Which adapters train; "base" stands for the base model."""
    found = set()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = set(key.split("."))
            own = {name for name in model.peft_config if name in parts}
            found |= own or {"base"}
    return found


def make_tokenizer(merges: list[tuple[str, str]] = (), add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template, and with the merges that a test wants."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<s>" if add_bos else None
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Write a random two-layer Llama with this tokenizer into a folder, and return its name."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
