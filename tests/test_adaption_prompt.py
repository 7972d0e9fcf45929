"""LLaMA-Adapter: what attention reads from the trained tokens, against the paper's formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import bert, gpt2, llama, logits, losses_of_training, tokens, trained
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import peft
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from peft.tuners.adaption_prompt import AdaptedAttention

makers = pytest.mark.parametrize("make", [llama, gpt2])


def config(**kw) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM", **kw})


def adapted(base, *names: str, **kw) -> PeftModel:
    """Trained adapters; the first is active."""
    names = names or ("default",)
    model = get_peft_model(base, config(**kw), names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**kw))
    for layer in model.base_model.layers():
        for name in names:
            layer.adaption_gate[name].data.uniform_(1, 3)
    return model.eval()


def read_by_hand(attention, hidden, tokens_, gate, position_embeddings) -> torch.Tensor:
    """Equations 3 to 7, head by head; what the text reads from the tokens (B, L, D)."""
    size = attention.head_dim
    if hasattr(attention, "c_attn"):
        width = hidden.shape[-1]
        query = attention.c_attn(hidden)[..., :width]
        keys, values = (attention.c_attn(tokens_)[0, :, i * width : (i + 1) * width] for i in (1, 2))
    else:
        query = attention.q_proj(hidden)
        split = query.view(*query.shape[:2], -1, size).transpose(1, 2)
        query = apply_rotary_pos_emb(split, split, *position_embeddings)[0].transpose(1, 2).reshape(query.shape)
        keys, values = attention.k_proj(tokens_)[0], attention.v_proj(tokens_)[0]
    heads, groups = query.shape[-1] // size, query.shape[-1] // keys.shape[-1]
    pieces = []
    for head in range(heads):
        own, shared = (slice(h * size, (h + 1) * size) for h in (head, head // groups))
        scores = query[..., own] @ keys[:, shared].T / math.sqrt(size)
        pieces.append(gate * scores.softmax(-1) @ values[:, shared])
    read = torch.cat(pieces, dim=-1)
    return read if hasattr(attention, "c_attn") else attention.o_proj(read)


@makers
def test_formula(make):
    model = adapted(make()).double()
    (layer,) = model.base_model.layers()
    seen = {}

    def keep(module, args, kwargs, output):
        seen[type(module)] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs, output[0])

    for module in (layer, layer.base_layer):
        module.register_forward_hook(keep, with_kwargs=True)
    model(input_ids=tokens())
    (hidden, kwargs, whole), (_, _, plain) = seen[AdaptedAttention], seen[type(layer.base_layer)]
    prompt, gate = layer.adaption_prompt["default"], layer.adaption_gate["default"]
    expected = read_by_hand(layer.base_layer, hidden, prompt, gate, kwargs.get("position_embeddings"))
    assert_close(whole - plain, expected)
    assert expected.abs().max() > 1e-4
    weights = torch.randn_like(whole)
    found = torch.autograd.grad((whole * weights).sum(), [prompt, gate], retain_graph=True)
    assert_close(found, torch.autograd.grad((expected * weights).sum(), [prompt, gate]))


@makers
def test_it_begins_as_the_base_model_and_leaves_as_it(make):
    base, ids = make(), tokens()
    expected = logits(base, ids)
    kinds = [type(module) for module in base.modules()]
    model = get_peft_model(base, config(adapter_layers=2))
    assert torch.equal(logits(model, ids), expected) and trained(model) == {"default"}
    for layer in model.base_model.layers():
        layer.adaption_gate["default"].data.fill_(1)
    assert not torch.allclose(logits(model, ids), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    with pytest.raises(TypeError, match="cannot be merged into weights"):
        model.merge_and_unload()
    assert model.unload() is base and torch.equal(logits(base, ids), expected)
    assert [type(module) for module in base.modules()] == kinds


@makers
def test_files_and_several_adapters(make, tmp_path):
    torch.manual_seed(seed := torch.randint(10**6, ()).item())
    model = adapted(make(), "default", "second", adapter_layers=2)
    ids = tokens()
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "adapter_model.safetensors")
    assert len(files) == 4 and all(key.rpartition(".")[2] in ("adaption_prompt", "adaption_gate") for key in files)
    torch.manual_seed(seed)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for name in ("second", "default"):
        loaded.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(logits(loaded, ids), logits(model, ids)) and trained(model) == {name}
    with pytest.raises(ValueError, match="One adaption prompt can be active at a time"):
        model.set_adapter(["default", "second"])
    model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert model.get_model_status().num_adapter_layers == 2


@makers
def test_mixed_batch(make):
    model = adapted(make(), "a", "b")
    ids, names = tokens(3), ["b", "__base__", "a"]
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, ids)
        else:
            model.set_adapter(name)
            alone = logits(model, ids)
        assert_close(mixed[row], alone[row])


@pytest.mark.parametrize("use_cache", [True, False])
@makers
def test_generation(make, use_cache):
    model, ids = adapted(make()).double(), tokens()
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(input_ids=ids, use_cache=use_cache, **options)
    assert torch.equal(found.sequences[:, :-5], ids)
    assert_close(torch.stack(found.logits, dim=1), logits(model, found.sequences[:, :-1])[:, -5:].float())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_bases(bits, tmp_path):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    packing = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=packing, dtype=torch.bfloat16
    )
    model, ids = adapted(base, adapter_layers=2).train(), tokens()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = losses_of_training(model, ids, steps=8, lr=0.05)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(adapter_len=0), "adapter_len must be at least 1, got 0"),
        (lambda: config(adapter_layers=-1), "adapter_layers must be at least 1, got -1"),
        (lambda: get_peft_model(llama(), config(adapter_len=None)), "AdaptionPromptConfig needs adapter_len"),
        (lambda: get_peft_model(llama(), config(adapter_layers=3)), "adapter_layers=3 .* do not fit .*: it has 2"),
        (lambda: get_peft_model(llama(), config(target_modules="q_proj")), "its attention is called 'self_attn'"),
        (lambda: get_peft_model(bert(), config()), r"model types \['gpt2', 'llama', 'mistral'\], got 'bert'"),
        (lambda: peft.inject_adapter_in_model(config(), llama()), "use get_peft_model for prompts"),
    ],
)  # fmt: skip
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
