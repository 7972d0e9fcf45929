"""`nn.MultiheadAttention` as a target: torch takes the weights of its projections and calls neither.

The reference is torch's own attention in float64, with the weights that the adapters' formulas say.

Letters: N rows of a batch, L tokens of the query, S tokens of key and value, E width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import accelerate
import pytest
import torch
import torch.nn.functional as F
from invariant_cases import METHODS, OPS
from safetensors.torch import load_file
from torch import nn

from peft import (
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    SsfConfig,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Linear, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.warning import PeftWarning

N, L, S, E, HEADS = 4, 3, 5, 6, 2
# Those that change the weight of a linear layer, of any size.
FOLDING = [m for m, case in METHODS.items() if case.merges and "linear" in case.ops and m != "trainable_tokens"]
folding = pytest.mark.parametrize("method", [m for m in FOLDING if m != "ln_tuning"])


class Net(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **kw})
        self.out = nn.Linear(E, E)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, query, key=None, value=None, **kw):
        key = query if key is None else key
        y, weights = self.attn(query, key, key if value is None else value, **kw)
        return (self.out(y), weights) if kw.get("need_weights") else self.out(y)


class Block(nn.Module):
    """As in a vision transformer of torchvision or of CLIP."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.self_attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_proj, self.head = nn.Conv2d(3, E, 2, stride=2), nn.Linear(E, 2)
        self.encoder = nn.Sequential(Block(), Block())

    def forward(self, images):
        return self.head(self.encoder(self.conv_proj(images).flatten(2).mT).mean(1))


def lora(**kw) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["attn"], "init_lora_weights": False, **kw})


def adapted(base: nn.Module, config=None, **kw) -> PeftModel:
    return get_peft_model(base, lora() if config is None else config, **kw)


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def delta(layer: BaseTunerLayer, name: str = "default") -> torch.Tensor:
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.scaling[name] * B.double() @ A.double()


def with_deltas(base: Net, model: PeftModel, names=("default",)) -> Net:
    """The base model in float64, with `W + scaling B A` in both projections."""
    reference, adapter = copy.deepcopy(base).double(), model.get_base_model().attn
    for name in names:
        reference.attn.in_proj_weight.data += delta(adapter, name)
        reference.attn.out_proj.weight.data += delta(adapter.out_proj, name)
    return reference.train(model.training)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max().clamp(min=1)


def doubled(inputs: dict) -> dict:
    is_float = {key: torch.is_tensor(value) and value.is_floating_point() for key, value in inputs.items()}
    return {key: value.double() if is_float[key] else value for key, value in inputs.items()}


# What it computes

CALLS: dict[str, Callable[[], dict]] = {
    "self": lambda: {},
    "weights": lambda: {"need_weights": True},
    "weights of all heads": lambda: {"need_weights": True, "average_attn_weights": False},
    "padding": lambda: {"key_padding_mask": torch.arange(L).expand(N, -1) > 1},
    "mask": lambda: {"attn_mask": torch.ones(L, L).triu(1).bool()},
    "float mask per head": lambda: {"attn_mask": torch.randn(N * HEADS, L, L)},
    "causal": lambda: {"attn_mask": torch.ones(L, L).triu(1).bool(), "is_causal": True, "need_weights": False},
    "cross": lambda: {"key": torch.randn(N, S, E), "value": torch.randn(N, S, E)},
    "key is value": lambda: {"key": torch.randn(N, S, E)},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_both_projections_have_their_delta(call, training, batch_first, grad):
    base = Net(batch_first=batch_first)
    model = adapted(copy.deepcopy(base)).train(training)
    inputs = {"query": torch.randn(N, L, E), **CALLS[call]()}
    if not batch_first:
        inputs |= {name: inputs[name].transpose(0, 1) for name in ("query", "key", "value") if name in inputs}
    with torch.set_grad_enabled(grad):
        ours, theirs = model(**inputs), with_deltas(base, model)(**doubled(inputs))
        for mine, its in zip(ours, theirs) if isinstance(ours, tuple) else [(ours, theirs)]:
            assert_close(mine, its)
        assert not torch.allclose(ours[0], base(**inputs)[0], atol=1e-3)


@pytest.mark.parametrize(
    "kw", [{"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"num_heads": 3}], ids=str
)
@pytest.mark.parametrize("grad", [True, False])
def test_attentions_of_all_kinds(kw, grad):
    base = Net(**{key: value for key, value in kw.items() if key != "num_heads"})
    if "num_heads" in kw:
        base.attn.num_heads, base.attn.head_dim = 3, 2
    model = adapted(copy.deepcopy(base)).eval()
    x = torch.randn(N, L, E)
    with torch.set_grad_enabled(grad):
        assert_close(model(x), with_deltas(base, model)(x.double()))
    x = torch.randn(L, E)  # no batch
    assert_close(model(x), with_deltas(base, model)(x.double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(dtype):
    base = Net().to(dtype)
    model = adapted(copy.deepcopy(base))
    x = torch.randn(N, L, E, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    assert_close(y, with_deltas(base, model)(x.double()), 1e-10 if dtype == torch.float64 else 0.1)


def in_projection(model: PeftModel, base: Net, method: str, name: str, x: torch.Tensor, leaves: dict) -> torch.Tensor:
    """The method's formula for a linear layer, on the packed in-projection, in float64."""
    for path, parameter in model.get_base_model().attn.adapter_tensors(name):
        value = parameter.detach().double() if parameter.is_floating_point() else parameter.detach()
        leaves[path] = value.requires_grad_(value.is_floating_point())
    W, b = base.attn.in_proj_weight.double(), base.attn.in_proj_bias.double()
    return METHODS[method].formula(OPS["linear"], W, b, leaves, x.double())


def attention_of(q, k, v) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def adapt_by(method: str, base: Net, names=("a",), dtype=torch.float32, **kw) -> PeftModel:
    """With adapters of the in-projection alone, of which every part matters."""
    wide = METHODS[method].wide if dtype == torch.float64 else {}
    wide |= {"feedforward_modules": ".*attn"} if method == "ia3_feedforward" else {}
    configs = [METHODS[method].config(target_modules=["attn"], exclude_modules=["out_proj"], **wide) for _ in names]
    model = get_peft_model(base, configs[0], adapter_name=names[0], **kw)
    for name, config in zip(names[1:], configs[1:]):
        model.add_adapter(name, config)
    for layer in layers(model).values():
        for name in names:
            for _, parameter in layer.adapter_tensors(name):
                if parameter.is_floating_point():
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@folding
def test_methods_that_change_a_weight_work_by_their_formula(method):
    base = Net().double()
    model = adapt_by(method, copy.deepcopy(base), dtype=torch.float64)
    assert list(layers(model)) == ["base_model.model.attn"]
    query, key, leaves = torch.randn(N, L, E).double(), torch.randn(N, S, E).double(), {}
    of_query, of_key = (in_projection(model, base, method, "a", x, {}) for x in (query, key))
    q, k, v = of_query[..., :E], of_key[..., E : 2 * E], of_key[..., 2 * E :]
    assert_close(model(query, key), base.out(base.attn.out_proj(attention_of(q, k, v))), 1e-9)
    packed = in_projection(model, base, method, "a", query, leaves)
    base.out(base.attn.out_proj(attention_of(*packed.split(E, -1)))).sum().backward()
    model(query).sum().backward()
    for path, parameter in model.get_base_model().attn.adapter_tensors("a"):
        if parameter.is_floating_point():
            assert_close(parameter.grad, leaves[path].grad, 1e-8)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and not any("in_proj" in name or "out" in name for name in trained)


@folding
def test_merging_and_mixed_batches_of_all_methods(method):
    base = Net()
    model = adapt_by(method, copy.deepcopy(base), ("a", "b")).eval()
    plain = copy.deepcopy(model.get_base_model().attn.base_layer.state_dict())
    x, rows = torch.randn(N, L, E), ["b", "__base__", "a", "b"]
    with torch.no_grad():
        single = {"__base__": base(x)}
        for name in "ab":
            model.set_adapter(name)
            single[name] = model(x)
        expected = torch.stack([single[name][i] for i, name in enumerate(rows)])
        assert_close(model(x, adapter_names=rows), expected)
        model.set_adapter("a")
        model.merge_adapter()
        assert_close(model(x), single["a"])
        with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
            model(x, adapter_names=rows)
        model.unmerge_adapter()
        for key, tensor in model.get_base_model().attn.base_layer.state_dict().items():
            if METHODS[method].unmerges_exactly:
                assert torch.equal(tensor, plain[key])
            assert_close(tensor, plain[key])
        merged = model.merge_and_unload()
        assert type(merged.attn) is nn.MultiheadAttention
        assert_close(merged(x), single["a"])


@pytest.mark.parametrize("batch_first", [True, False])
def test_mixed_batch_with_all_that_an_attention_takes(batch_first):
    model = adapted(Net(batch_first=batch_first), adapter_name="a").eval()
    model.add_adapter("b", lora(r=3))
    rows = ["b", "__base__", "a", "b"]
    inputs = {"query": torch.randn(N, L, E), "key": torch.randn(N, S, E), "value": torch.randn(N, S, E)}
    masks = {"key_padding_mask": torch.arange(S).expand(N, -1) > 2, "need_weights": True}

    def run(names, kept=slice(None)):
        some = {key: value[kept] if batch_first else value[kept].transpose(0, 1) for key, value in inputs.items()}
        y, weights = model(**some, key_padding_mask=masks["key_padding_mask"][kept], need_weights=True, **names)
        return y if batch_first else y.transpose(0, 1), weights

    mixed = run({"adapter_names": rows})
    for i, name in enumerate(rows):
        model.set_adapter("a" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone = run({}, slice(i, i + 1))
        else:
            alone = run({}, slice(i, i + 1))
        for mine, its in zip(mixed, alone):
            assert_close(mine[i], its[0])
    with pytest.raises(ValueError, match=r"needs a query with rows, \(N, L, E\), got the shape \(3, 6\)"):
        model(torch.randn(L, E), adapter_names=["a"] * L)


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_drops_the_adapters_inputs_alone(batch_first):
    base = Net(batch_first=batch_first)
    model = adapted(copy.deepcopy(base), lora(lora_dropout=0.5))
    x, key = torch.randn(N, L, E), torch.randn(N, L, E)
    reference = with_deltas(base, model)
    assert_close(model.eval()(x, key), reference.eval()(x.double(), key.double()))
    model.train()
    assert not torch.allclose(model(x, key), model(x, key), atol=1e-4)
    with model.disable_adapter():
        assert_close(model(x, key), base(x, key))
    # Every number of the input of A is dropped or doubled: seen where it can be told, in an adapter of one rank.
    for layer in layers(model).values():
        layer.lora_dropout["default"] = nn.Identity()
    assert_close(model(x, key), reference(x.double(), key.double()))  # in pieces, and the same
    model(x, key).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    pieces = {name: gradient.clone() for name, gradient in trained.items()}
    model.zero_grad()
    for layer in layers(model).values():
        layer._dropping.clear()
    model(x, key).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, pieces[name])


# Inside of torch's transformer layers, whose fast path takes the weights of all their parts


@pytest.mark.parametrize("targets", [["self_attn"], ["out_proj"], ["self_attn", "linear1"], "all-linear"], ids=str)
def test_transformer_encoder_in_evaluation(targets):
    layer = nn.TransformerEncoderLayer(E, HEADS, 8, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2)
    plain, x = copy.deepcopy(base).eval(), torch.randn(N, L, E)
    model = adapted(base, lora(target_modules=targets))
    real = torch.tensor([[True, True, False]] * 2 + [[True] * L] * 2)
    for masks in ({}, {"src_key_padding_mask": ~real}, {"mask": torch.ones(L, L).triu(1).bool(), "is_causal": True}):
        expected = model.train()(x, **masks)[real]
        assert_close(model.eval()(x, **masks)[real], expected)
        with torch.no_grad():
            assert_close(model(x, **masks)[real], expected)
            assert not torch.allclose(expected, plain(x, **masks)[real], atol=1e-3)
    with torch.no_grad():
        expected = model(x)
        assert_close(model.merge_and_unload()(x), expected)


def test_transformer_decoder_and_its_cross_attention():
    base = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, HEADS, 8, dropout=0.0, batch_first=True), 2)
    model = adapted(base, lora(target_modules=["multihead_attn"]))
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    y = model(x, memory)
    with torch.no_grad():
        assert_close(model.eval()(x, memory), y)
        assert_close(model.merge_and_unload()(x, memory), y)


# Which modules, which names


def test_names_shapes_and_what_trains():
    model = adapted(Net())
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.attn.lora_A.default.weight": (2, E),
        "base_model.model.attn.lora_B.default.weight": (3 * E, 2),
        "base_model.model.attn.base_layer.out_proj.lora_A.default.weight": (2, E),
        "base_model.model.attn.base_layer.out_proj.lora_B.default.weight": (E, 2),
    }
    assert set(get_peft_model_state_dict(model)) == {
        f"base_model.model.attn.{path}lora_{letter}.weight" for path in ("", "base_layer.out_proj.") for letter in "AB"
    }
    attention = model.get_base_model().attn
    assert type(attention) is MultiheadAttention and type(attention.out_proj) is Linear
    # Upstream counts the change of out_proj twice, and adapters from there were trained so.
    assert attention.scaling == {"default": 1.5} and attention.out_proj.scaling == {"default": 3.0}
    assert [s.name for s in model.get_layer_status()] == ["model.attn", "model.attn.base_layer.out_proj"]


def test_a_new_adapter_changes_nothing():
    base, x = Net(), torch.randn(N, L, E)
    model = adapted(copy.deepcopy(base), lora(init_lora_weights=True))
    for layer in layers(model).values():
        assert all(torch.equal(t, own) for t, own in zip((layer.weight, layer.bias), layer.op.load()))
    assert_close(model(x), base(x), 1e-6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["attn"]}, {"attn": 2, "attn.base_layer.out_proj": 2}),
        ({"target_modules": ["attn", "out_proj"]}, {"attn": 2, "attn.base_layer.out_proj": 2}),
        ({"target_modules": r".*attn"}, {"attn": 2, "attn.base_layer.out_proj": 2}),
        ({"target_modules": ["out_proj"]}, {"attn.out_proj": 2}),
        ({"target_modules": ["attn"], "exclude_modules": ["out_proj"]}, {"attn": 2}),
        ({"target_modules": "all-linear"}, {"attn": 2, "attn.base_layer.out_proj": 2, "out": 2}),
        ({"rank_pattern": {"attn": 4}}, {"attn": 4, "attn.base_layer.out_proj": 4}),  # one pattern for both, as there
    ],
    ids=str,
)
def test_targets(fields, expected):
    model = adapted(Net(), lora(**fields))
    found = {path.removeprefix("base_model.model."): layer.r["default"] for path, layer in layers(model).items()}
    assert found == expected


def test_out_proj_alone_has_effect():
    base, x = Net(), torch.randn(N, L, E)
    model = adapted(copy.deepcopy(base), lora(target_modules=["out_proj"]))
    reference = copy.deepcopy(base).double()
    reference.attn.out_proj.weight.data += delta(model.get_base_model().attn.out_proj)
    for training in (True, False):
        assert_close(model.train(training)(x), reference(x.double()))
        with torch.no_grad():
            assert_close(model(x), reference(x.double()))
    with model.disable_adapter():
        assert_close(model(x), base(x))
    with pytest.raises(ValueError, match="attn.out_proj, whose weight torch takes without calling it: target"):
        model(x, adapter_names=["default"] * N)
    with pytest.raises(ValueError, match="attn.out_proj is part of a MultiheadAttention .* drops something"):
        adapted(Net(), lora(target_modules=["out_proj"], lora_dropout=0.1))
    with pytest.raises(ValueError, match="attn.out_proj is part of a MultiheadAttention .* no change of a weight"):
        adapted(Net(), BottleneckConfig(target_modules=["out_proj"], bottleneck_size=2))
    adapted(Net(), lora(target_modules=["out_proj"], lora_dropout=0.1, inference_mode=True))  # there nothing is dropped


def test_three_projections_are_refused_with_the_reason():
    base = Net(kdim=5, vdim=7)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="kdim=5 or vdim=7 is not embed_dim=6, so it has three in-projections"):
        adapted(base)
    assert base.state_dict().keys() == before.keys() and not hasattr(base, "peft_config")
    model = adapted(base, lora(target_modules=["out_proj"]))
    query, key, value = torch.randn(N, L, E), torch.randn(N, S, 5), torch.randn(N, S, 7)
    y = model(query, key, value)
    assert_close(model.merge_and_unload()(query, key, value), y)


@pytest.mark.parametrize("target", ["attn", "out_proj"])
def test_off_loaded_attentions_are_refused(target):
    base = Net()
    accelerate.cpu_offload(base, torch.device("cpu"), preload_module_classes=["MultiheadAttention"])
    with pytest.raises(ValueError, match="is an off-loaded MultiheadAttention or part of one"):
        adapted(base, lora(target_modules=[target]))
    assert not layers(base)


def test_bottlenecks_stand_behind_the_whole_attention():
    model = adapted(Net(), BottleneckConfig(target_modules=["attn"], bottleneck_size=2))
    assert list(layers(model)) == ["base_model.model.attn"]
    assert model(torch.randn(N, L, E)).shape == (N, L, E)
    model = adapted(Net(), BottleneckConfig(target_modules="all-linear", bottleneck_size=2))
    assert list(layers(model)) == ["base_model.model.out"]
    encoder = nn.TransformerEncoderLayer(E, HEADS, 8, dropout=0.0, batch_first=True)
    config = BottleneckConfig(target_modules=["self_attn"], bottleneck_size=2, init_weights=False)
    model, x = adapted(nn.Sequential(encoder), config), torch.randn(N, L, E)
    y = model(x)
    with torch.no_grad():
        assert_close(model.eval()(x), y)


def test_the_out_projections_lora_bias_counts_once_however_it_is_run():
    model, x = adapted(Net(), lora(lora_bias=True, lora_dropout=1e-9)), torch.randn(N, L, E)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    with torch.no_grad():
        called = model.train()(x)
        read = model.eval()(x)
        mixed = model(x, adapter_names=["default"] * N)
        merged = model.merge_and_unload()(x)
    for other in (called, mixed, merged):
        assert_close(other, read)


def test_lora_only_trains_the_biases_of_both_projections():
    model = adapted(Net(), lora(bias="lora_only"))
    biases = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    attention = "base_model.model.attn.base_layer."
    assert biases == {f"{attention}in_proj_bias", f"{attention}out_proj.base_layer.bias"}


def test_a_pattern_for_the_out_projection_alone_is_called_useless():
    with pytest.warns(PeftWarning, match="rank_pattern"):
        adapted(Net(), lora(rank_pattern={"out_proj": 4}))


# Life of an adapter


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model = adapted(VisionTransformer(), lora(target_modules=["self_attention"], init_lora_weights=True, r=4))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    images, labels = torch.randn(8, 3, 4, 4), torch.arange(8) % 2
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert all(p.grad is None for name, p in model.named_parameters() if name in before)


def test_merge_and_unmerge_of_several_adapters():
    base, x = Net(), torch.randn(N, L, E)
    model = adapted(copy.deepcopy(base))
    model.add_adapter("other", lora(r=3))
    one = model(x)
    model.set_adapter("other")
    other = model(x)
    model.set_adapter(["default", "other"])
    both = model(x)
    assert_close(both, with_deltas(base, model, ["default", "other"])(x.double()))
    model.merge_adapter(["default"])
    assert_close(model(x), both)
    model.merge_adapter(["other"], safe_merge=True)
    assert_close(model(x), both)
    with model.disable_adapter():
        assert_close(model(x), base(x))
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert_close(model(x), one)
    assert not torch.allclose(one, other, atol=1e-3)
    plain = model.unload()
    assert type(plain.attn) is nn.MultiheadAttention and type(plain.attn.out_proj) is type(base.attn.out_proj)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert_close(plain(x), base(x))


def test_what_is_merged_in_float64_comes_out_bit_by_bit():
    base = Net()
    model = adapted(copy.deepcopy(base), SsfConfig(target_modules=["attn"], init_ssf_weights="normal"))
    model.merge_adapter()
    model.unmerge_adapter()
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])


def test_a_method_that_makes_a_bias():
    base, x = Net(bias=False), torch.randn(N, L, E)
    model = adapted(copy.deepcopy(base), SsfConfig(target_modules=["attn"], init_ssf_weights="normal"))
    for layer in layers(model).values():
        nn.init.normal_(layer.ssf_shift["default"])
    y = model(x)
    model.merge_adapter()
    assert model.get_base_model().attn.base_layer.in_proj_bias.shape == (3 * E,)
    assert_close(model(x), y)
    model.unmerge_adapter()
    assert model.get_base_model().attn.base_layer.in_proj_bias is None
    assert_close(model(x), y)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("targets", [["attn"], ["out_proj"], ["attn", "out"]], ids=str)
def test_save_and_load(tmp_path, low_cpu_mem_usage, targets):
    base, x = Net(), torch.randn(N, L, E)
    model = adapted(copy.deepcopy(base), lora(target_modules=targets))
    model.add_adapter("other", lora(target_modules=targets, r=1))
    expected = [model(x)]
    model.set_adapter("other")
    expected.append(model(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    for name, y in zip(("default", "other"), expected):
        loaded.set_adapter(name)
        assert_close(loaded(x), y)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    injected = inject_adapter_in_model(lora(target_modules=targets), copy.deepcopy(base), state_dict=tensors)
    set_peft_model_state_dict(injected, tensors)
    assert_close(injected(x), expected[0])
    again = copy.deepcopy(loaded)
    assert torch.equal(again(x), loaded(x))
    with torch.no_grad():
        next(p for name, p in again.named_parameters() if "lora_A.other" in name).mul_(2)
    assert not torch.equal(again(x), loaded(x))


def test_the_out_proj_of_an_attention_that_another_adapter_has(tmp_path):
    base, x = Net(), torch.randn(N, L, E)
    model = adapted(copy.deepcopy(base), lora(exclude_modules=["out_proj"]))
    one = model(x)
    model.add_adapter("other", lora(target_modules=["out_proj"]))
    assert type(model.get_base_model().attn.base_layer.out_proj) is Linear
    assert_close(model(x), one)
    model.set_adapter("other")
    two = model(x)
    reference = copy.deepcopy(base).double()
    reference.attn.out_proj.weight.data += delta(model.get_base_model().attn.out_proj, "other")
    assert_close(two, reference(x.double()))
    mixed = model(x, adapter_names=["default", "other"] * 2)
    assert_close(mixed, torch.stack([one[0], two[1], one[2], two[3]]))


@pytest.mark.parametrize("order", [["whole", "out"], ["out", "whole"]], ids="-".join)
def test_files_do_not_know_of_other_adapters_layers(order, tmp_path):
    base, x = Net(), torch.randn(N, L, E)
    expected = {}
    for name, target in (("whole", "attn"), ("out", "out_proj")):
        alone = adapted(copy.deepcopy(base), lora(target_modules=[target]), adapter_name=name)
        alone.save_pretrained(tmp_path)
        expected[name] = alone(x)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / order[0], order[0])
    result = model.load_adapter(tmp_path / order[1], order[1])
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    model.save_pretrained(tmp_path / "both")
    for name in order:
        model.set_adapter(name)
        assert_close(model(x), expected[name])
        assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both" / name)(x), expected[name])


@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_as_a_lora_of_another_rank(method):
    base, x = Net(), torch.randn(N, L, E)
    configs = {"ssf": SsfConfig(target_modules=["attn"], init_ssf_weights="normal"), "lora": lora(r=1)}
    model = adapted(copy.deepcopy(base), configs[method])
    config, tensors = convert_to_lora(model, rank=E)
    loaded = get_peft_model(copy.deepcopy(base), config)
    set_peft_model_state_dict(loaded, tensors)
    assert_close(loaded(x), model(x))
    with pytest.raises(ValueError, match="both of whose projections have one rank"):
        convert_to_lora(model, rank=0.9)


def test_weighted_combinations():
    base, x = Net(), torch.randn(N, L, E)
    model = adapted(copy.deepcopy(base))
    model.add_adapter("other", lora(r=3))
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["default", "other"], [0.5, 2.0], kind, combination_type=kind, svd_rank=5)
        model.set_adapter(kind)
        reference, attention = copy.deepcopy(base).double(), model.get_base_model().attn
        for name, weight in (("default", 0.5), ("other", 2.0)):
            reference.attn.in_proj_weight.data += weight * delta(attention, name)
            reference.attn.out_proj.weight.data += weight * delta(attention.out_proj, name)
        assert_close(model(x), reference(x.double()))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian"])
def test_inits_leave_the_output_as_it_is(init):
    base, x = Net(), torch.randn(N, L, E)
    assert_close(adapted(copy.deepcopy(base), lora(init_lora_weights=init))(x), base(x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_bias_and_dora_merge_to_what_they_compute(use_dora):
    base, x = Net(), torch.randn(N, L, E)
    model = adapted(base, lora(use_dora=use_dora, lora_bias=not use_dora))
    for path, parameter in model.named_parameters():
        if path.endswith("lora_B.default.bias"):
            nn.init.normal_(parameter)
    before = {path: layer.bias.clone() for path, layer in layers(model).items() if not use_dora}
    y = model(x)
    model.merge_adapter()
    assert_close(model(x), y)
    assert before.keys() <= layers(model).keys()


def test_methods_inside_of_each_other():
    """The outer one's change is of what the inner one has made of the weight: forward equals merged."""
    base, x = Net(), torch.randn(N, L, E)
    model = get_peft_model(copy.deepcopy(base), METHODS["loha"].config(target_modules=["attn"]), mixed=True)
    model.add_adapter("other", METHODS["oft"].config(target_modules=["attn"]))
    model.set_adapter(["default", "other"])
    for layer in layers(model).values():
        for name in ("default", "other"):
            for _, parameter in layer.adapter_tensors(name):
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    y = model(x)
    assert not torch.allclose(y, base(x), atol=1e-3)
    assert_close(model.merge_and_unload()(x), y)
