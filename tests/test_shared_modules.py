"""Modules that a model holds in several places (T5's embedding) are adapted, and given back, in all of them."""

from __future__ import annotations

import torch
from tiny_models import CONFIGS, methods
from transformers import T5Config, T5ForConditionalGeneration

from peft import get_peft_model


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


@methods
def test_shared_embedding(method):
    base = t5()
    held = base.shared
    ids = torch.randint(1, 50, (2, 5))
    with torch.no_grad():
        before = base(input_ids=ids, labels=ids).logits
    model = get_peft_model(base, CONFIGS[method](target_modules=["shared"])).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    assert base.encoder.embed_tokens is base.decoder.embed_tokens is base.shared is not held
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids, labels=ids).logits, before, atol=1e-4)
        unloaded = model.unload()
        assert unloaded.encoder.embed_tokens is unloaded.decoder.embed_tokens is unloaded.shared is held
        torch.testing.assert_close(unloaded(input_ids=ids, labels=ids).logits, before)
