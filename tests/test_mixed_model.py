"""Models with adapters of several methods: `get_peft_model(..., mixed=True)`."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import llama, logits, tokens
from torch import nn

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer

CONFIGS = {
    "lora": lambda *t, **kw: LoraConfig(r=2, init_lora_weights=False, target_modules=list(t), **kw),
    "loha": lambda *t, **kw: LoHaConfig(r=2, init_weights=False, target_modules=list(t), **kw),
    "lokr": lambda *t, **kw: LoKrConfig(r=2, init_weights=False, target_modules=list(t), **kw),
    "oft": lambda *t, **kw: OFTConfig(r=0, oft_block_size=2, init_weights=False, target_modules=list(t), **kw),
}
METHODS = pytest.mark.parametrize("order", [("lora", "loha", "oft"), ("oft", "lokr", "lora"), ("loha", "oft", "lokr")])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def mixed(base: nn.Module, order, *targets: str) -> PeftMixedModel:
    """Adapters named like their methods; the last one without the last target."""
    model = get_peft_model(base, CONFIGS[order[0]](*targets), order[0], mixed=True)
    for name in order[1:]:
        model.add_adapter(name, CONFIGS[name](*(targets[:-1] if name == order[-1] else targets)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or any(f".{one}" in name for one in order):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


@METHODS
def test_forward_is_the_weight_folded_by_one_method_after_the_other(order):
    base, x = Net().double(), torch.randn(3, 6).double()
    fresh, before = copy.deepcopy(base), base(x)
    model = mixed(base, order, "b", "a")
    assert type(model) is PeftMixedModel and isinstance(model, PeftModel)
    assert model.active_adapters == [order[0]]
    for names in (list(order), list(order[:2]), [order[2]], list(order[::-1])):
        model.set_adapter(names)
        wanted = copy.deepcopy(fresh)
        for target in "ab":
            layer, stack = model.get_base_model().get_submodule(target), []
            while isinstance(layer, BaseTunerLayer):
                stack.append(layer)
                layer = layer.base_layer
            assert len(stack) == (3 if target == "b" else 2)
            W, b = layer.weight, layer.bias
            for own in reversed(stack):
                for name in own._available_adapters & set(names):
                    W, b = own.fold(name, W, b)
            wanted.get_submodule(target).weight.data = W.detach()
        torch.testing.assert_close(model(x), wanted(x))
        trained = {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}
        assert trained & set(order) == set(names)
        model.merge_adapter()
        torch.testing.assert_close(model(x), wanted(x))
        with model.disable_adapter():
            torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(model(x), wanted(x))
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), wanted(x))
    model.set_adapter(list(order))
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model).unload()(x), before)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.b) is nn.Linear
    torch.testing.assert_close(merged(x), expected)
    model.delete_adapter(order[1])
    model.set_adapter([order[0], order[2]])
    assert sum(isinstance(module, BaseTunerLayer) for module in model.modules()) == 3
    assert model(x).isfinite().all()


@METHODS
def test_each_adapter_has_a_file_that_models_of_its_method_can_read(order, tmp_path):
    base, ids = llama(), tokens()
    fresh = copy.deepcopy(base)
    model = mixed(base, order, "q_proj", "v_proj")
    model.save_pretrained(tmp_path)
    for name in order:
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / name)
        assert get_peft_model_state_dict(alone).keys() == get_peft_model_state_dict(model, adapter_name=name).keys()
        torch.testing.assert_close(logits(alone, ids), logits(model, ids))
    model.set_adapter(list(order))
    loaded = PeftMixedModel.from_pretrained(fresh, tmp_path / order[0], order[0])
    for name in order[1:]:
        loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(list(order))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    status = loaded.get_model_status()
    assert status.peft_types == {name: name.upper() for name in order} and status.enabled is True


def test_gradients_reach_all_active_adapters():
    base, x = Net(), torch.randn(3, 6)
    model = mixed(base, ("lora", "loha", "oft"), "a", "b")
    model.set_adapter(["lora", "oft"])
    model(x).square().sum().backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads and all(".lora." in name or ".oft." in name for name in grads)
    assert grads == {name for name, p in model.named_parameters() if p.requires_grad}


def test_trained_adalora_beside_lora(tmp_path):
    base, x = Net(), torch.randn(3, 6)
    fresh = copy.deepcopy(base)
    config = AdaLoraConfig(total_step=9, init_lora_weights=False, target_modules=["a"])
    get_peft_model(base, config).save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    model = get_peft_model(fresh, LoraConfig(target_modules=["a"]), "lora", mixed=True)
    model.load_adapter(tmp_path, "ada")
    model.set_adapter(["lora", "ada"])
    torch.testing.assert_close(model(x), alone(x))


def test_what_cannot_be_mixed_is_refused():
    def make():
        return get_peft_model(Net(), CONFIGS["lora"]("a"), "lora", mixed=True)

    with pytest.raises(ValueError, match="can have LORA, LOHA, LOKR, ADALORA, OFT, got"):
        get_peft_model(Net(), IA3Config(target_modules=["a"], feedforward_modules=[]), mixed=True)
    for refused, kw in ((LoraConfig, {"use_dora": True}), (LoraConfig, {"init_lora_weights": "pissa"})):
        with pytest.raises(ValueError, match="cannot be one of several methods"):
            make().add_adapter("x", refused(target_modules=["a"], **kw))
    with pytest.raises(ValueError, match="AdaLoRA trains with a loss"):
        make().add_adapter("x", AdaLoraConfig(total_step=9, target_modules=["a"]))
    model = make()
    with pytest.raises(ValueError, match="no mixed batches"):
        model(torch.randn(2, 6), adapter_names=["lora", "__base__"])
    with pytest.raises(ValueError, match="already"):
        model.add_adapter("lora", CONFIGS["loha"]("a"))
    model.add_adapter("loha", CONFIGS["loha"]("a"))
    model.merge_adapter(["loha"])
    for call in (lambda: model.merge_adapter(["lora"]), lambda: model.add_adapter("oft", CONFIGS["oft"]("a"))):
        with pytest.raises(ValueError, match="'loha'\\] are merged"):
            call()
    with pytest.raises(ValueError, match="mixed=True"):
        get_peft_model(Net(), CONFIGS["lora"]("a")).add_adapter("x", CONFIGS["loha"]("a"))
