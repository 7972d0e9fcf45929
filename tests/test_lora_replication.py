"""Layer replication: deeper models whose added layers share weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import bert, gpt2, llama, logits, tokens
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model


def lora(ranges, *targets: str, **kw) -> LoraConfig:
    kw = {"r": 2, "init_lora_weights": False, "target_modules": list(targets or ("q_proj", "down_proj")), **kw}
    return LoraConfig(layer_replication=ranges, **kw)


def deeper(base: nn.Module, order: list[int]) -> nn.Module:
    """A model of its own with the layers of another one."""
    model = llama(num_hidden_layers=len(order)).to(base.dtype)
    own = {key: tensor for key, tensor in base.state_dict().items() if ".layers." not in key}
    for new, old in enumerate(order):
        own |= {f"model.layers.{new}.{key}": t for key, t in base.model.layers[old].state_dict().items()}
    model.load_state_dict(own)
    return model


def test_a_deeper_model_that_shares_its_weights(tmp_path):
    base, ids = llama(num_hidden_layers=4).double(), tokens()  # no choice of a token hangs on rounding
    fresh, before = copy.deepcopy(base), logits(base, ids)
    expected = logits(deeper(base, [0, 1, 2, 1, 2, 3]), ids)
    model = get_peft_model(base, lora([(0, 3), (1, 4)]))
    layers = base.model.layers
    assert len(layers) == base.config.num_hidden_layers == 6
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(6))
    assert layers[1].mlp.up_proj.weight is layers[3].mlp.up_proj.weight
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), expected)
        cached = base.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        assert torch.equal(cached, base.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    adapted = logits(model, ids)
    assert not torch.allclose(adapted, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    assert torch.equal(logits(loaded, ids), adapted)
    loaded.load_adapter(tmp_path, "b")  # not once more
    assert loaded.config.num_hidden_layers == 6
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), adapted, atol=1e-5, rtol=1e-4)
    model.delete_adapter("default")
    model.add_adapter("c", lora([(0, 3), (1, 4)]))
    assert base.config.num_hidden_layers == len(base.model.layers) == 6
    copied = pickle.loads(pickle.dumps(model)).unload()
    assert len(copied.model.layers) == 4 and torch.equal(logits(copied, ids), before)
    assert base.config.num_hidden_layers == len(base.model.layers) == 6
    plain = model.unload()
    assert plain.config.num_hidden_layers == len(plain.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in plain.model.layers] == [0, 1, 2, 3]
    assert torch.equal(logits(plain, ids), before)


@pytest.mark.parametrize(
    ("make", "target", "path"), [(gpt2, "c_attn", "transformer.h"), (bert, "query", "bert.encoder.layer")]
)
def test_other_models(make, target, path):
    base, ids = make(), tokens()
    model = get_peft_model(base, lora([[0, 2], [0, 1]], target))
    assert len(base.get_submodule(path)) == 3
    before = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused():
    for bad in ([(2, 1)], [(-1, 2)], [(1,)]):
        with pytest.raises(ValueError, match="must be pairs"):
            lora(bad)
    base = llama()
    with pytest.raises(ValueError, match="goes beyond the 2 layers"):
        get_peft_model(base, lora([(0, 3)]))
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(base, lora([(0, 2), (0, 2)], "nothing"))
    assert base.config.num_hidden_layers == len(base.model.layers) == 2
    with pytest.raises(ValueError, match="has 0"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), lora([(0, 1)], "0"))
    model = get_peft_model(base, lora([(0, 2), (0, 2)]))
    with pytest.raises(ValueError, match="must have the same layer_replication"):
        model.add_adapter("b", lora(None))
