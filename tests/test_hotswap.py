"""Hot-swapping: an adapter's numbers exchanged in place, in plain and in compiled models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, SsfConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(6, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(self.conv(x).mT)


def lora(*targets: str, **kw) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(targets or ("conv", "linear")), **kw})


def adapted(base: Net, config: LoraConfig) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    return model


OTHERS = [
    lora(), lora(r=2), lora(lora_alpha=3), lora("linear"), lora(r=3, rank_pattern={"conv": 1}),
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda c: f"r={c.r}, alpha={c.lora_alpha}, {len(c.target_modules)}")
@pytest.mark.parametrize("target_rank", [None, 6])
def test_the_new_adapter_takes_the_place_of_the_old(other, target_rank, tmp_path):
    base, x = Net().double(), torch.randn(2, 6, 5).double()
    wanted = adapted(base, other)
    wanted.save_pretrained(tmp_path)
    model = adapted(base, lora())
    if target_rank:
        before = model(x)
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        torch.testing.assert_close(model(x), before)
    tensors = {key: id(p) for key, p in model.named_parameters()}
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), wanted(x), atol=1e-5, rtol=1e-5)  # adapters are float32
    assert {key: id(p) for key, p in model.named_parameters()} == tensors
    torch.testing.assert_close(model.merge_and_unload()(x), wanted(x), atol=1e-5, rtol=1e-4)


def test_a_larger_rank_needs_no_preparation_in_a_plain_model(tmp_path):
    base, x = Net(), torch.randn(2, 6, 5)
    wanted = adapted(base, lora(r=7))
    model = adapted(base, lora())
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(wanted), "default", wanted.peft_config["default"])
    torch.testing.assert_close(model(x), wanted(x))
    model.save_pretrained(tmp_path)  # it is a whole adapter: it can be saved
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), wanted(x))


@pytest.mark.parametrize("other", ["ab", "xa", "lora"])
def test_other_adapters_stay_as_they_are(other):
    base = Net()
    wanted, model = adapted(base, lora("linear")), get_peft_model(copy.deepcopy(base), lora(), "a")
    model.add_adapter(other, lora())
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model, adapter_name=other).items()}
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(wanted), "a", wanted.peft_config["default"])
    after = get_peft_model_state_dict(model, adapter_name=other)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(model(x), wanted(x))


def test_dora_and_a_model_without_peft_model_around_it():
    from peft import inject_adapter_in_model

    base, x = Net(), torch.randn(2, 6, 5)
    wanted = adapted(base, lora(use_dora=True))
    for layer in wanted.base_model.layers():
        nn.init.normal_(layer.lora_magnitude_vector["default"].weight)
    model = inject_adapter_in_model(lora(use_dora=True), copy.deepcopy(base))
    tensors = get_peft_model_state_dict(wanted)
    short = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    hotswap_adapter_from_state_dict(model, short, "default", wanted.peft_config["default"])
    torch.testing.assert_close(model(x), wanted(x))
    del short["conv.lora_magnitude_vector"]
    with pytest.raises(RuntimeError, match="lacks .*conv.lora_magnitude_vector"):
        hotswap_adapter_from_state_dict(model, short, "default", wanted.peft_config["default"])


def test_a_compiled_model_is_not_compiled_again():
    torch.compiler.reset()  # what other tests have compiled counts towards dynamo's limit
    base, x = Net(), torch.randn(2, 6, 5)
    model = adapted(base, lora()).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        compiled(x)
        count = len(graphs)
        for other in (lora(r=6), lora(r=1, lora_alpha=5), lora("linear")):
            wanted = adapted(base, other)
            state = get_peft_model_state_dict(wanted)
            hotswap_adapter_from_state_dict(compiled, state, "default", wanted.peft_config["default"])
            torch.testing.assert_close(compiled(x), wanted(x))
        assert len(graphs) == count > 0
        large = adapted(base, lora(r=9))
        with pytest.raises(ValueError, match=r"room for the rank 6, and the new adapter has 9: call prepare"):
            hotswap_adapter_from_state_dict(compiled, get_peft_model_state_dict(large), "default", lora(r=9))
    with pytest.raises(ValueError, match="before the model is compiled"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="before the model is compiled"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_configurations_are_brought_to_the_target_rank_at_the_same_scaling(use_rslora, tmp_path):
    base, x = Net(), torch.randn(2, 6, 5)
    model = adapted(base, lora(use_rslora=use_rslora))
    expected = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), expected)


def test_what_cannot_be_swapped_is_refused_and_nothing_changes():
    base, x = Net(), torch.randn(2, 6, 5)
    model = adapted(base, lora("linear"))
    expected, other = model(x), adapted(base, lora())
    state, config = get_peft_model_state_dict(other), other.peft_config["default"]
    with pytest.raises(RuntimeError, match="2 tensors have no place in adapter 'default', such as"):
        hotswap_adapter_from_state_dict(model, state, "default", config)
    with pytest.raises(ValueError, match="no LoRA adapter 'b'"):
        hotswap_adapter_from_state_dict(model, state, "b", config)
    wide = {key: torch.zeros(*t.shape, 2) for key, t in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match="has the shape"):
        hotswap_adapter_from_state_dict(model, wide, "default", config)
    assert torch.equal(model(x), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged: call unmerge_adapter"):
        hotswap_adapter_from_state_dict(model, {}, "default", config)
    with pytest.raises(ValueError, match="target_rank=2 is smaller than a rank that the model has, 4"):
        prepare_model_for_compiled_hotswap(other, target_rank=2)
    with pytest.raises(ValueError, match="no LoRA layers"):
        prepare_model_for_compiled_hotswap(base)
    with pytest.raises(ValueError, match="check_compiled must be .* got 'maybe'"):
        prepare_model_for_compiled_hotswap(other, check_compiled="maybe")


@pytest.mark.parametrize(
    "fields", [{"lora_dropout": 0.1}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"conv": 3}}], ids=str
)
def test_configurations_that_do_not_fit_each_other(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"cannot be hot-swapped: {name} is"):
        check_hotswap_configs_compatible(lora(), lora(**fields))
    with pytest.raises(ValueError, match="Only LoRA adapters can be hot-swapped, got .*SSF"):
        check_hotswap_configs_compatible(lora(), SsfConfig())
    check_hotswap_configs_compatible(lora(), lora(r=2, lora_alpha=1, init_lora_weights="gaussian"))
