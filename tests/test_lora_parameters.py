"""LoRA on bare parameters: fused experts of transformers' models, and parameters of modules of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import SIZES, logits, tokens
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from peft import (
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import ParamWrapper
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> nn.Module:
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)).eval()


def gpt_oss() -> nn.Module:
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)).eval()


models = pytest.mark.parametrize("make", [mixtral, gpt_oss])


class Own(nn.Module):
    """A matrix and a stack of matrices: (N, 6) -> (N, 4)."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(2, 4, 6))
        self.line, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = self.line(x)
        return (x @ self.w.T + torch.einsum("ni,eoi->no", x, self.v)) * self.gain


def lora(*parameters: str, **kw) -> LoraConfig:
    kw = {"r": 2, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False, **kw}
    return LoraConfig(target_parameters=list(parameters), **kw)


def delta(A: torch.Tensor, B: torch.Tensor, s: float, shape: torch.Size, transposed: bool) -> torch.Tensor:
    """By upstream's layout: row `e r + j` of A and column `j E + e` of B are expert e's j-th."""
    E = shape[0] if len(shape) == 3 else 1
    r = len(A) // E
    each = [s * sum(torch.outer(B[:, j * E + e], A[e * r + j]) for j in range(r)) for e in range(E)]
    each = [one.T if transposed else one for one in each]
    return torch.stack(each) if len(shape) == 3 else each[0]


@models
def test_experts_run_with_changed_weights_and_merge(make):
    base, ids = make().double(), tokens()
    base.set_experts_implementation("eager")  # the others have no float64
    reference, before = copy.deepcopy(base), logits(base, ids)
    model = get_peft_model(base, lora(*BOTH, rank_pattern={"layers.0.mlp.experts.down_proj": 3}))
    for key, owner in (("0.mlp.experts", reference.model.layers[0].mlp.experts), ("1.mlp.experts", None)):
        outer = base.model.layers.get_submodule(key)
        owner = owner or reference.model.layers[1].mlp.experts
        assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
        assert len(outer.lora_A["default"].weight) == 3 * (3 if key[0] == "0" else 2)
        for wrapper in (outer, outer.base_layer):
            parameter = getattr(owner, wrapper.parameter_name)
            A, B = (factor.detach() for factor in wrapper.factors("default"))
            s = wrapper.scaling["default"]
            parameter.data += delta(A, B, s, parameter.shape, make is gpt_oss)
    wanted = logits(reference, ids)
    torch.testing.assert_close(logits(model, ids), wanted)
    assert not torch.allclose(wanted, before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), wanted)
    torch.testing.assert_close(base.state_dict()["model.layers.0.mlp.experts.base_layer.base_layer.down_proj"],
                               reference.model.layers[0].mlp.experts.down_proj.detach())  # fmt: skip
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), before)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), wanted)
    plain = copy.deepcopy(model).unload()
    torch.testing.assert_close(logits(plain, ids), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), wanted)
    assert not any(isinstance(module, ParamWrapper) for net in (plain, merged) for module in net.modules())


@models
def test_files_and_several_adapters(make, tmp_path):
    base, ids = make(), tokens()
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, lora(*BOTH, target_modules=["q_proj"]))
    expected = logits(model, ids)
    keys = {key.split("layers.0.")[1] for key in get_peft_model_state_dict(model) if "layers.0." in key}
    assert keys == {
        f"{module}.lora_{factor}.weight"
        for module in ("self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer")
        for factor in "AB"
    }
    model.save_pretrained(tmp_path)
    theirs = copy.deepcopy(fresh)
    theirs.load_adapter(str(tmp_path))
    assert torch.equal(logits(theirs, ids), expected)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, ids), expected)
    loaded.add_adapter("b", lora(*BOTH, r=3))
    assert torch.equal(logits(loaded, ids), expected)
    loaded.set_adapter("b")
    alone = logits(loaded, ids)
    loaded.base_model.set_adapter(["default", "b"])
    together = logits(loaded, ids)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, ids), together, atol=1e-5, rtol=1e-4)
    loaded.unmerge_adapter()
    loaded.delete_adapter("default")
    torch.testing.assert_close(logits(loaded, ids), alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="mixed batch cannot go through target_parameters"):
        loaded(ids, adapter_names=["b", "__base__"])


@models
def test_a_new_adapter_does_nothing_and_learns(make):
    base, ids = make(), tokens(4, 8)
    before = logits(base, ids)
    model = get_peft_model(base, lora(*BOTH, init_lora_weights=True)).train()
    model.base_model.model.gradient_checkpointing_enable()
    assert torch.equal(logits(model, ids), before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02  # usually 0.15


def test_parameters_of_ones_own_module():
    net, x = nn.Sequential(Own()).double(), torch.randn(3, 6).double()
    reference = copy.deepcopy(net)
    with pytest.raises(ValueError, match="a parameter of the whole model"):
        get_peft_model(Own(), lora("w"))
    model = get_peft_model(net, lora("v", "w"))
    with torch.no_grad():
        for wrapper in (m for m in model.modules() if isinstance(m, ParamWrapper)):
            parameter = getattr(reference[0], wrapper.parameter_name)
            parameter += delta(*wrapper.factors("default"), wrapper.scaling["default"], parameter.shape, False)
    torch.testing.assert_close(model(x), reference(x))


def test_what_cannot_be_is_refused():
    net = nn.Sequential(Own())
    for kw in ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match=next(iter(kw))):
            lora("w", **kw)
    with pytest.raises(ValueError, match="only parameters of 2 or 3 dimensions"):
        get_peft_model(net, lora("gain"))
    with pytest.raises(ValueError, match="is a target of target_modules"):
        get_peft_model(net, lora("line.weight", target_modules=["line"]))
    with pytest.raises(NoMatchingPeftModuleError, match="target_parameters=\\['x'\\]"):
        get_peft_model(net, lora("x"))
    assert type(net[0]) is Own and type(net[0].line) is nn.Linear  # nothing is left behind
    with pytest.warns(PeftWarning, match="target_parameters \\['x'\\]"):
        model = get_peft_model(net, lora("w", "x"))
    with pytest.raises(ValueError, match="must have the same target_parameters"):
        model.add_adapter("b", lora("v"))
    with pytest.raises(ValueError, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "c")
    with pytest.raises(ValueError, match="cannot be given another rank"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert not model.supports_lora_conversion()
