"""SSF: every kind of layer, exact merging, packed bases, default targets, deltatuner's files, and what it keeps."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SIZES, llama, logits, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
)
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.squeezebert.modeling_squeezebert import SqueezeBertLayerNorm
from transformers.models.videoprism.modeling_videoprism import VideoPrismLayerNorm
from transformers.models.vitdet.modeling_vitdet import VitDetLayerNorm
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, SSFConfig, SsfConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.ssf import SsfLayer, fused
from peft.utils.warning import PeftWarning

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

# Layers beyond those of test_invariants.py, an input for each, and where the output's channels stand.
LAYERS = {
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (2, 4, 7, 7), 1),
    "conv1d without bias": (lambda: nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9), 1),
    "conv3d without bias": (lambda: nn.Conv3d(4, 6, 2, bias=False), (2, 4, 3, 3, 3), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5), 1),
    "GroupNorm of images": (lambda: nn.GroupNorm(3, 6), (2, 6, 4, 5), 1),
    "ConvNeXt's LayerNorm": (lambda: ConvNextLayerNorm(6, data_format="channels_first"), (2, 6, 4, 6), 1),
    "VitDet's LayerNorm": (lambda: VitDetLayerNorm(6), (2, 6, 4, 6), 1),
    "SqueezeBERT's LayerNorm": (lambda: SqueezeBertLayerNorm(6), (2, 6, 6), 1),
    "VideoPrism's LayerNorm": (lambda: VideoPrismLayerNorm(6), (2, 3, 6), -1),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6), -1),
    "Llama's norm": (lambda: LlamaRMSNorm(6), (2, 3, 6), -1),
    "Gemma's norm": (lambda: GemmaRMSNorm(6), (2, 3, 6), -1),
    "Conv1D": (lambda: Conv1D(6, 5), (2, 3, 5), -1),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.layer(x)


def adapted(layer: nn.Module, **kw) -> tuple[nn.Module, SsfLayer]:
    model = get_peft_model(Net(layer), SsfConfig(target_modules=["layer"], **kw))
    return model, model.get_base_model().layer


def set_values(layer: SsfLayer, scale: torch.Tensor, shift: torch.Tensor, name: str = "default") -> None:
    layer.ssf_scale[name].data.copy_(scale)
    layer.ssf_shift[name].data.copy_(shift)


# ---- Layers and merging ----


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    make, shape, channel_dim = LAYERS[case]
    base, x = make(), torch.randn(shape)
    model, layer = adapted(base)
    plain = base(x)
    scale = torch.randn(6)
    shift = torch.zeros(6) if "s norm" in case else torch.randn(6)  # RMS norms have no place for a shift
    set_values(layer, scale, shift)
    view = (6, *[1] * (x.dim() - 2)) if channel_dim == 1 else (6,)
    expected = plain.double() * scale.double().view(view) + shift.double().view(view)
    torch.testing.assert_close(model(x), expected.float())
    had_bias = getattr(base, "bias", None) is not None
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(base(x), expected.float(), rtol=1e-4, atol=1e-5)
    assert "s norm" in case or base.bias is not None
    model.unmerge_adapter()
    assert (getattr(base, "bias", None) is not None) == had_bias
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in before.items())
    assert torch.equal(base(x), plain)


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm((3, 6)), nn.LayerNorm(6, elementwise_affine=False), nn.SyncBatchNorm(6)], ids=str
)
def test_norms_without_a_weight_for_each_of_the_last_channels_are_refused(layer):
    with pytest.raises(ValueError, match=r"layer \(\w+Norm\) is not supported"):
        adapted(layer)


class GatedNorm(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class RunningNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        self.seen += x.abs().mean(tuple(range(x.dim() - 1)))
        return x / self.seen * self.weight


def test_norms_that_cannot_be_tried_out_or_remember_it():
    model, layer = adapted(GatedNorm(6))
    assert layer.op.channel_dim == -1
    with pytest.raises(TypeError, match="GatedNorm cannot be run on a tensor alone, .* unload without merging"):
        model.merge_adapter()
    model, layer = adapted(RunningNorm())
    assert layer.op.channel_dim == -1 and not layer.base_layer.seen.any()


@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_shift_cannot_be_merged_into_an_rms_norm(norm):
    model, layer = adapted(norm(6))
    before = layer.weight.clone()
    set_values(layer, torch.randn(6), torch.ones(6))
    with pytest.raises(TypeError, match="has no bias, so a shift cannot be merged"):
        model.merge_adapter()
    assert torch.equal(layer.weight, before) and not layer.merged


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [nn.Linear, lambda i, o, bias: nn.Conv1d(i, o, 1, bias=bias)], ids=["linear", "conv"])
def test_unmerging_is_exact_for_any_scale(make, bias, dtype):
    base = make(5, 6, bias=bias).to(dtype)
    model, layer = adapted(base)
    model.add_adapter("second", SsfConfig(target_modules=["layer"], init_ssf_weights="normal"))
    model.set_adapter(["default", "second"])
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    for name in ("default", "second"):
        set_values(layer, torch.tensor([0.0, -0.0, 1e-38, -2.7, 1e-20, 3.0]), torch.randn(6), name)
    x = torch.randn(2, 5, 3) if isinstance(base, nn.Conv1d) else torch.randn(2, 5)
    forward = model(x.to(dtype))
    # What the output is if no two numbers cancel, all being positive: rounding errors are in proportion to it.
    positive = copy.deepcopy(base).double()
    for parameter in positive.parameters():
        parameter.data.abs_()
    size = positive(x.to(dtype).double().abs())
    for name in ("default", "second"):
        view = (6, 1) if isinstance(base, nn.Conv1d) else (6,)
        size = size * layer.ssf_scale[name].abs().view(view) + layer.ssf_shift[name].abs().view(view)
    model.merge_adapter()
    assert ((model(x.to(dtype)) - forward).abs() <= 10 * torch.finfo(dtype).eps * size).all()
    assert base.bias is not None and base.bias.dtype == dtype
    model.unmerge_adapter()
    after = base.state_dict()
    assert after.keys() == before.keys() and (base.bias is None) == (not bias)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) and torch.equal(after[key].signbit(), tensor.signbit())


def test_init():
    _, layer = adapted(nn.Linear(3, 20_000))
    assert torch.equal(layer.ssf_scale["default"], torch.ones(20_000)) and not layer.ssf_shift["default"].any()
    _, layer = adapted(nn.Linear(3, 20_000), init_ssf_weights="normal")
    for values, mean in ((layer.ssf_scale["default"], 1.0), (layer.ssf_shift["default"], 0.0)):
        assert values.mean().item() == pytest.approx(mean, abs=1e-3) and values.std().item() == pytest.approx(
            0.02, rel=0.05
        )


def test_bias_all_trains_and_saves_every_bias(tmp_path):
    def base():
        return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))

    model = get_peft_model(base(), SsfConfig(target_modules=["0"], bias="all"))
    model(torch.randn(6, 4)).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert {name.removeprefix("base_model.model.") for name in trained} == {
        "0.ssf_scale.default", "0.ssf_shift.default", "0.base_layer.bias", "1.bias",
    }  # fmt: skip
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    other = base()
    other.load_state_dict({k.replace("base_layer.", ""): v for k, v in model.get_base_model().state_dict().items()
                           if k.endswith("weight")}, strict=False)  # fmt: skip
    x = torch.randn(6, 4)
    assert torch.equal(PeftModel.from_pretrained(other, tmp_path)(x), model(x))


# ---- What is kept for the backward pass ----


def block_gradients(x, W, b, s, t, after, wide=torch.float64):
    """By autograd, in float64."""
    leaves = [v.detach().to(wide).requires_grad_() for v in (x, s, t)]
    y = after(F.linear(leaves[0], W.to(wide), None if b is None else b.to(wide)) * leaves[1] + leaves[2])
    return torch.autograd.grad((y * y).sum(), leaves)


AFTER = {
    "kept": lambda y: F.silu(y),
    "not kept": lambda y: y + 1,
    "changed in place": lambda y: y.relu_() * 1,
    "changed in place through a view": lambda y: (y.view(-1).mul_(3), y)[1] * 1,
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
@pytest.mark.parametrize("made", [True, False], ids=["input made again", "input kept"])
@pytest.mark.parametrize("layer", [nn.Linear(7, 6), nn.Linear(7, 6, bias=False), Conv1D(6, 7)], ids=str)
def test_gradients_with_any_scale_and_any_consumer(layer, made, after):
    model, ssf = adapted(layer)
    W = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    set_values(ssf, torch.tensor([0.0, 1e-30, -1e-3, -1.5, 1.0, 0.5]), torch.tensor([1.0, 0.0, 2.0, -1.0, 0.3, 200.0]))
    a = torch.randn(4, 3, 7, requires_grad=True)
    x = a * torch.randn(7) if made else a
    assert ssf._keeps_output("default", x)
    parameters = [ssf.ssf_scale["default"], ssf.ssf_shift["default"]]
    y = after(model(x))
    found = torch.autograd.grad((y * y).sum(), [x, *parameters])
    expected = block_gradients(x, W, getattr(layer, "bias", None), *parameters, after)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_second_derivatives():
    model, layer = adapted(nn.Linear(4, 3))
    model.double()
    set_values(layer, torch.randn(3), torch.randn(3))
    inputs = [torch.randn(2, 4).double().requires_grad_(), layer.ssf_scale["default"], layer.ssf_shift["default"]]

    def function(x, s, t):
        return fused.ScaledLinear.apply(x, layer.weight, layer.bias, s, t).tanh()

    assert torch.autograd.gradgradcheck(function, inputs)
    view = [
        torch.randn(2, 3, 4).double().requires_grad_(),
        *(torch.randn(3, 1).double().requires_grad_() for _ in "st"),
    ]
    assert torch.autograd.gradcheck(fused.ScaleShift.apply, view)
    assert torch.autograd.gradgradcheck(fused.ScaleShift.apply, view)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    model, layer = adapted(nn.Linear(4, 3))
    set_values(layer, torch.randn(3), torch.randn(3))
    parameters = [layer.ssf_scale["default"], layer.ssf_shift["default"]]
    x = torch.randn(5, 4, requires_grad=True)
    model(x).square().sum().backward()
    expected = [v.grad for v in (x, *parameters)]
    for v in (x, *parameters):
        v.grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([v.grad for v in (x, *parameters)], expected)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of the distinct memory that the graph of one forward holds, without parameters and the input."""
    y, held = model(x), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        names = [name for name in dir(node) if name.startswith("_saved_")]
        tensors = [getattr(node, name) for name in names] + list(getattr(node, "saved_tensors", ()))
        for t in tensors:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in own:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        todo += [before for before, _ in node.next_functions if before is not None]
    return sum(held.values())


def test_an_output_that_others_keep_is_kept_once():
    x = torch.randn(32, 16, requires_grad=True)
    base = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16), nn.SiLU()).requires_grad_(False)
    floor = saved_bytes(base, x)
    assert floor == 32 * (64 + 16) * 4  # what the activations keep
    assert saved_bytes(get_peft_model(base, SsfConfig(target_modules=["0", "2"])), x) == floor


def test_half_precision_outputs_are_kept_as_they_are():
    x = torch.randn(32, 16, dtype=torch.bfloat16, requires_grad=True)
    model, _ = adapted(nn.Linear(16, 64).bfloat16())
    assert saved_bytes(model, x) == 32 * 64 * 2


# ---- Packed bases ----


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_bases(bits, seed, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def make():
        torch.manual_seed(seed)
        layer = (
            bnb.nn.Linear4bit(64, 32, quant_type="nf4")
            if bits == 4
            else bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        )
        layer.weight.data.copy_(torch.randn(32, 64))
        return Net0(layer).requires_grad_(False).to("cpu")

    x = torch.randn(8, 64)
    base = make()
    plain = base(x)
    model = get_peft_model(base, SsfConfig(target_modules=["layer"], init_ssf_weights="normal"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    layer = base.layer
    y = model(x)
    expected = plain.double() * layer.ssf_scale["default"].double() + layer.ssf_shift["default"].double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    torch.testing.assert_close(layer.ssf_scale["default"].grad, (2 * y * plain).sum(0), rtol=1e-3, atol=1e-2)
    optimizer.step()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).train()  # in eval mode other kernels run
    assert torch.equal(loaded(x), model(x)) and not torch.equal(model(x), plain)


class Net0(nn.Module):
    """With the weights as they are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


# ---- Models and files ----

ARCHITECTURES = {
    "gpt2": (GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50), {"c_attn", "c_proj", "c_fc"}, 4),
    "gptj": (GPTJConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=50, rotary_dim=4),
             {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}, 6),
    "bloom": (BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50),
              {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, 4),
    "opt": (OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16),
            {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, 6),
    "gpt_neo": (GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, vocab_size=50,
                             attention_types=[[["global", "local"], 1]]),
                {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"}, 6),
    "falcon": (FalconConfig(**SIZES), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, 4),
    "llama": (LlamaConfig(**SIZES, intermediate_size=24),
              {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 7),
    "mpt": (MptConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=50),
            {"Wqkv", "out_proj", "up_proj", "down_proj"}, 4),
}  # fmt: skip


def post_in_torchs_operations(layer, name, x, y, before=()):
    return y * layer.ssf_scale[name] + layer.ssf_shift[name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_targets(architecture, tmp_path, monkeypatch):
    """Attention and MLP; gradients are those of torch's operations; saved, loaded and merged."""
    config, names, per_layer = ARCHITECTURES[architecture]
    base = AutoModelForCausalLM.from_config(config).float().eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, SsfConfig(init_ssf_weights="normal"))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SsfLayer)}
    assert {name.rpartition(".")[2] for name in layers} == names and len(layers) == 2 * per_layer
    ids = tokens()
    model.double()
    weights = torch.randn(*ids.shape, 50).double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def objective(parameters):
        return (torch.func.functional_call(model, parameters, (), {"input_ids": ids}).logits * weights).sum()

    found = torch.autograd.grad(objective(trained), list(trained.values()))
    for attribute, way in (("_keeps_output", lambda *_: False), ("post", post_in_torchs_operations)):
        monkeypatch.setattr(SsfLayer, attribute, way)
    expected = torch.autograd.grad(objective(trained), list(trained.values()))
    monkeypatch.undo()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # some models compute parts in float32
    model.float()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, ids), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), ids), expected, rtol=1e-4, atol=1e-4)


def test_mixed_batch_of_whole_models():
    model = get_peft_model(llama(), SsfConfig(init_ssf_weights="normal"), "a")
    model.add_adapter("b", SsfConfig(target_modules=["q_proj"], init_ssf_weights="normal"))
    ids = tokens(3)
    mixed = logits(model.eval(), ids, adapter_names=["b", "__base__", "a"])
    for row, name in ((0, "b"), (2, "a")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model, ids)[row])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model, ids)[1])


def test_alias():
    assert SSFConfig is SsfConfig


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("bias", [None, "all"])
def test_deltatuners_files(form, bias, tmp_path):
    """`bias: null`, bases called `linear_sub`, and layers that the search left out."""
    targets = ["q_proj", "v_proj"]
    base = nn.ModuleDict({f"layer{i}": nn.ModuleDict({name: nn.Linear(4, 4) for name in targets}) for i in range(2)})
    tensors = {
        f"base_model.model.layer1.{n}.ssf_{what}": torch.randn(4) for n in targets for what in ("scale", "shift")
    }
    if bias == "all":
        for name in targets:
            tensors[f"base_model.model.layer1.{name}.linear_sub.bias"] = torch.randn(4)
            tensors[f"base_model.model.layer0.{name}.bias"] = torch.randn(4)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "SSF", "target_modules": targets, "bias": bias, "inference_mode": True})
    )
    if form == "bin":
        torch.save(tensors, tmp_path / "adapter_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "adapter_model.safetensors")
    x, y = torch.randn(3, 4), {name: base["layer0"][name].weight for name in targets}
    with pytest.warns(PeftWarning, match=r"does not have \d+ tensors of adapter 'default', which keep their initial"):
        model = PeftModel.from_pretrained(base, tmp_path)
    for name in targets:  # a layer that the search left out is as it was
        bias_ = tensors.get(f"base_model.model.layer0.{name}.bias", base["layer0"][name].bias)
        torch.testing.assert_close(base["layer0"][name](x), F.linear(x, y[name], bias_))
    assert model.peft_config["default"].bias == ("none" if bias is None else bias)
    loaded = get_peft_model_state_dict(model)
    for key, tensor in tensors.items():
        key = key.replace("linear_sub.bias", "bias").replace(".bias", ".base_layer.bias")
        assert torch.equal(loaded[key], tensor), key


def test_norms_of_other_classes_under_compile():
    """Where their channels stand is found by running them once, not while torch.compile traces."""
    model, layer = adapted(LlamaRMSNorm(6))
    set_values(layer, torch.randn(6), torch.randn(6))
    x = torch.randn(2, 3, 6)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
