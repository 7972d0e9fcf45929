"""LN tuning: default targets, copies that are its own, and what is refused. (The rest is in test_invariants.py.)"""

from __future__ import annotations

import pytest
import torch
from quantized_bases import BASES, WIDTH
from tiny_models import bert, gpt2, llama, logits, tokens
from torch import nn
from torch.testing import assert_close

from peft import LNTuningConfig, get_peft_model


@pytest.mark.parametrize("make", [llama, gpt2])
def test_default_targets_are_the_norms_and_all_that_trains(make):
    model = get_peft_model(make(), LNTuningConfig())
    norms = [m for m in make().modules() if type(m).__name__.endswith("Norm")]
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for norm in norms for p in norm.parameters())


def test_models_without_defaults_need_targets():
    with pytest.raises(ValueError, match="No default target_modules for model type 'bert'"):
        get_peft_model(bert(), LNTuningConfig())


def test_training_changes_the_copies_and_merging_the_model():
    base, ids = llama(), tokens()
    before = {name: p.clone() for name, p in base.named_parameters()}
    expected = logits(base, ids)
    model = get_peft_model(base, LNTuningConfig())
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    adapted = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged, ids), adapted)
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "norm" in name}


def test_a_second_adapter_starts_from_the_base_model_and_is_not_merged_beside_the_first():
    model = get_peft_model(llama(), LNTuningConfig(), "a")
    model.add_adapter("b", LNTuningConfig())
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match=r"Only one adapter can replace a module as a whole, but \['a', 'b'\]"):
        model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="starts from the base weights: call unmerge_adapter"):
        model.add_adapter("c", LNTuningConfig())
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_packed_weights_are_refused(base):
    net = nn.Sequential(BASES[base].pack(nn.Linear(WIDTH, WIDTH)))
    with pytest.raises(ValueError, match="LN tuning trains a layer's own weights, and those of Linear.* are packed"):
        get_peft_model(net, LNTuningConfig(target_modules=["0"]))
