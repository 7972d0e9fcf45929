"""Adapters on packed base weights: every backend that runs here x LoRA, SFT, SSF, against plain copies in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from invariant_cases import METHODS, OPS
from quantized_bases import BASES, READ_ONLY, REWRITABLE, WIDTH, Net, eight_bit, four_bit, quanto, weight_of
from tiny_models import llama, logits, opt, tokens
from torch import nn
from torch.testing import assert_close

from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model
from peft.tuners import lora
from peft.tuners.ops import Op
from peft.utils.blockwise import quantize_
from peft.utils.integrations import dequantize_module_weight
from peft.utils.quantization_utils import find_backend, packed_state

CONFIGS = {  # on every base; what is changed in the configurations of invariant_cases
    "lora": {"init_lora_weights": False},
    "dora": {},
    "sft": {"num_tunable_weights": 300, "selection_algorithm": "static"},
    "sft_row": {"density": 0.05},
    "ssf": {"init_ssf_weights": "normal"},
}
OTHERS = {  # on one of 4 bits, one of 8, and one that cannot be rewritten
    "adalora": {},
    "boft": {"boft_block_size": 4},
    "bottleneck": {},
    "bottleneck_parallel": {},
    "ia3": {},
    "ia3_feedforward": {"feedforward_modules": "first|second"},
    "loha": {},
    "lokr": {},
    "oft": {"oft_block_size": 4},
    "oft_cayley": {"r": 4},
    "sft_block": {"num_tunable_weights": 400},
    "sft_column": {"density": 0.05},
    "trainable_tokens": {},
    "vera": {},
}
EVERY = [*((m, b) for m in CONFIGS for b in BASES), *((m, b) for m in OTHERS for b in ("nf4", "int8", "GPTQ"))]
MERGES = [(method, base) for method, base in EVERY if METHODS[method].merges]
methods = pytest.mark.parametrize("method", list(CONFIGS))
bases = pytest.mark.parametrize("base", list(BASES))
every = pytest.mark.parametrize(("method", "base"), EVERY)
merging = pytest.mark.parametrize(("method", "base"), [row for row in MERGES if row[1] in REWRITABLE])
rewritable = pytest.mark.parametrize("base", REWRITABLE)
BOTH = ("first", "second")
linear = OPS["linear"]


def adapt(net: nn.Module, method: str, *names: str, targets=BOTH, amount: float = 0.1, **kw) -> PeftModel:
    """Adapters with values of about `amount`, in training mode (in which bitsandbytes does not round activations)."""
    kw = {"target_modules": list(targets), **(CONFIGS | OTHERS)[method], **kw}
    names = names or ("default",)
    model = get_peft_model(net, METHODS[method].config(**kw), names[0])
    for name in names[1:]:
        model.add_adapter(name, METHODS[method].config(**kw))
    for layer in model.base_model.layers():
        for name in names:
            for _, parameter in layer.adapter_tensors(name):
                if parameter.is_floating_point():
                    parameter.data.add_(amount * torch.randn_like(parameter))
    return model.train()


def draw(base: str) -> torch.Tensor:
    return torch.randn(8, 3, WIDTH, dtype=BASES[base].dtype)


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all numbers in a model's state."""
    state = {}
    for key, value in net.state_dict().items():
        inside = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
        state |= {f"{key}.{name}": getattr(value, name).clone() for name in inside}
        if torch.is_tensor(value) and not inside:
            state[key] = value.clone()
    return state


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest entry."""
    difference = (ours.double() - theirs.double()).abs().max()
    assert difference <= tolerance * theirs.double().abs().max(), difference.item()


def float_copy(model: PeftModel, method: str, weights: dict, x: torch.Tensor):
    """`(output, leaves)` of the net with plain float64 weights, by the method's formula; leaves by layer and path."""
    net, leaves = model.get_base_model(), {"x": x.detach().double().requires_grad_()}
    h = leaves["x"]
    for key in BOTH:
        W, b = weights[key]
        layer = getattr(net, key)
        parts = {}
        for path, parameter in layer.adapter_tensors("default"):
            value = parameter.detach()
            parts[path] = value.double().requires_grad_() if value.is_floating_point() else value
            leaves[key, path] = parts[path]
        op = copy.copy(linear)
        op.function = lambda x, W, b: x @ W.T if b is None else x @ W.T + b
        h = METHODS[method].formula(op, W, b, parts, h)
        h = h.tanh() if key == "first" else h
    return h, leaves


def weights_of(net: Net, dtype: torch.dtype) -> dict:
    return {
        key: (weight_of(layer, dtype), None if layer.bias is None else layer.bias.detach().double())
        for key in BOTH
        for layer in [getattr(net, key)]
    }


@every
def test_forward_and_gradients_are_those_of_a_plain_copy(method, base):
    net, x = Net(base), draw(base).requires_grad_()
    weights = weights_of(net, x.dtype)
    model = adapt(net, method)
    assert {s.quantization_backend for s in model.get_layer_status()} == {BASES[base].name}
    tolerance = BASES[base].tolerance
    expected, leaves = float_copy(model, method, weights, x)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    y = model(x)
    assert y.dtype == x.dtype
    close(y, expected, 2 * tolerance)
    y.backward(upstream.to(y.dtype))
    close(x.grad, leaves["x"].grad, 5 * tolerance)
    for key in BOTH:
        for path, parameter in getattr(net, key).adapter_tensors("default"):
            if parameter.is_floating_point():
                close(parameter.grad, leaves[key, path].grad, 5 * tolerance)
    assert all(p.grad is None for layer in (net.first, net.second) for p in layer.base_layer.parameters())


@bases
def test_layers_are_of_the_classes_that_other_libraries_ask_for(base):
    classes = {"bitsandbytes 4-bit": lora.bnb.Linear4bit, "bitsandbytes 8-bit": lora.bnb.Linear8bitLt}
    model = adapt(Net(base), "lora")
    assert {type(layer) for layer in model.base_model.layers()} == {classes.get(BASES[base].name, lora.Linear)}
    assert all(isinstance(layer, lora.Linear) for layer in model.base_model.layers())


@bases
@pytest.mark.parametrize("method", [method for method in CONFIGS if method != "dora"])  # it needs the weight's norms
def test_training_forms_no_dense_weight(base, method, monkeypatch):
    net, x = Net(base), draw(base).requires_grad_()
    model = adapt(net, method)

    def refuse(op):
        raise AssertionError("dequantised")

    monkeypatch.setattr(Op, "load", refuse)
    model(x).square().sum().backward()
    assert x.grad.any() and all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(AssertionError, match="dequantised"):
        model.merge_adapter()


@every
def test_training_saving_switching(method, base, tmp_path):
    torch.manual_seed(seed := torch.seed() % 2**31)
    net, x = Net(base), draw(base)
    plain, before = net.train()(x), snapshot(net)
    model = adapt(net, method, "a", "b")
    target = torch.randn_like(plain)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (model(x) - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {key.replace("base_layer.", ""): t for key, t in snapshot(net).items() if "base_layer." in key}
    assert_same({key: after[key] for key in before if key in after}, {k: t for k, t in before.items() if k in after})

    single = {"a": model(x)}
    with model.disable_adapter():
        single["__base__"] = model(x)
    assert torch.equal(single["__base__"], plain)
    model.set_adapter("b")
    single["b"] = model(x)
    rows = ["b", "a", "__base__", "a"] * 2
    mixed = model(x, adapter_names=rows)
    for row, name in enumerate(rows):
        close(mixed[row], single[name][row], BASES[base].tolerance)
    assert not torch.equal(single["a"], single["b"])

    model.save_pretrained(tmp_path)
    torch.manual_seed(seed)
    loaded = PeftModel.from_pretrained(Net(base), tmp_path / "a", adapter_name="a", is_trainable=True).train()
    assert torch.equal(loaded(x), single["a"])


@merging
def test_merging_and_back(method, base):
    net, x = Net(base), draw(base)
    weights, packing = weights_of(net, x.dtype), BASES[base]
    names = ["a", "b"] if METHODS[method].combines else ["a"]
    model = adapt(net, method, *names, targets=["first"])
    model.set_adapter(names)
    layer, forward = net.first, model(x)
    before, state = snapshot(layer.base_layer), packed_state(layer.base_layer)
    exact, b = weights["first"]
    with torch.no_grad():
        for name in names:
            exact, b = layer.fold(name, exact, b)

    with pytest.warns(PeftWarning, match="1 merged weights were packed again.*dequantize=True"):
        model.merge_adapter()
    stored = weight_of(layer, x.dtype)
    error, change = (stored - exact).norm(), (exact - weights["first"][0]).norm()
    assert error <= packing.error * exact.norm()
    (reported,) = model.merge_errors.values()
    assert list(model.merge_errors) == ["first"] and reported == layer.merge_error
    for ours, theirs in zip(reported, (error, exact.norm(), change)):
        assert ours == pytest.approx(theirs.item(), rel=1e-2, abs=packing.tolerance * exact.norm().item())
    hidden = x.double() @ stored.T + b
    close(model(x), hidden.tanh() @ weights["second"][0].T, 3 * packing.tolerance)
    close(model(x), forward, 5 * packing.error)

    with model.disable_adapter():
        close(model(x), (x.double() @ weights["first"][0].T + weights["first"][1]).tanh() @ weights["second"][0].T,
              3 * packing.tolerance)  # fmt: skip
    model.unmerge_adapter()
    assert_same(snapshot(layer.base_layer), before)
    assert all(ours is theirs for ours, theirs in zip(packed_state(layer.base_layer).values(), state.values()))
    assert layer.merge_error is None and torch.equal(model(x), forward)


@rewritable
def test_merge_one_by_one_and_take_a_failed_merge_back(base, monkeypatch):
    net = Net(base, bias=False)
    before = snapshot(net)
    model = adapt(net, "ssf", "a", "b")  # it gives the layers biases, too
    with pytest.warns(PeftWarning, match="2 merged weights"):
        model.merge_adapter(["a"])
    merged = {key: snapshot(getattr(net, key).base_layer) for key in BOTH}
    assert all("bias" in state for state in merged.values())

    def fail(W, b):
        raise RuntimeError("no")

    monkeypatch.setattr(net.second.op, "store", fail)
    with pytest.raises(RuntimeError, match="no"):
        model.merge_adapter(["b"])
    monkeypatch.undo()
    for key in BOTH:
        assert getattr(net, key).merged_adapters == ["a"]
        assert_same(snapshot(getattr(net, key).base_layer), merged[key])
    with pytest.warns(PeftWarning, match="2 merged weights"):
        model.merge_adapter(["b"])
    model.unmerge_adapter()
    assert_same(snapshot(model.unload()), before)


@merging
def test_merge_and_unload_keeps_the_storage(method, base):
    net, x = Net(base), draw(base)
    kind = type(net.first)
    model = adapt(net, method)
    forward = model(x)
    with pytest.warns(PeftWarning, match="2 merged weights were packed again"):
        merged = model.merge_and_unload(safe_merge=True)
    assert merged is net and type(net.first) is kind and packed_state(net.first) is not None
    assert model.merge_errors.keys() == set(BOTH)
    close(merged(x), forward, 10 * BASES[base].error)


@pytest.mark.parametrize(
    ("method", "base", "merged_before"),
    [(*row, before) for row in MERGES for before in (False, True) if not before or row[1] in REWRITABLE],
)
def test_dequantised_merging_is_exact(method, base, merged_before):
    net, x = Net(base), draw(base)
    model = adapt(net, method, targets=["first"])
    forward = model(x)
    if merged_before:
        with pytest.warns(PeftWarning, match="packed again"):
            model.merge_adapter()
    merged = model.merge_and_unload(dequantize=torch.float32)
    assert model.merge_errors == {} or merged_before
    assert {type(layer) for layer in (merged.first, merged.second)} == {nn.Linear}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    close(merged(x.float()), forward, 2 * BASES[base].tolerance)


def test_dequantised_merging_takes_the_type_of_the_models_own_parameters():
    class Headed(Net):
        def __init__(self, dtype):
            super().__init__("nf4")
            self.norm = nn.LayerNorm(WIDTH, dtype=dtype)

        def forward(self, x):
            return super().forward(self.norm(x).float())

    for dtype in (torch.float16, torch.float32):
        merged = adapt(Headed(dtype), "lora").merge_and_unload(dequantize=True)
        assert merged.first.weight.dtype == merged.second.weight.dtype == dtype
    merged = adapt(Net("nf4 bfloat16"), "lora").merge_and_unload(dequantize=True)
    assert merged.first.weight.dtype == merged.second.weight.dtype == torch.bfloat16


def test_a_failed_dequantised_merge_leaves_the_packed_model():
    net = Net("nf4")
    model = adapt(net, "lora")
    before = snapshot(net)
    net.first.lora_A["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True, dequantize=True)
    net.first.lora_A["default"].weight.data[0, 0] = before["first.lora_A.default.weight"][0, 0]
    assert_same(snapshot(net), before)


@pytest.mark.parametrize(("method", "base"), [row for row in MERGES if row[1] in READ_ONLY])
def test_storages_that_cannot_be_rewritten_say_so(method, base):
    net, x = Net(base), draw(base)
    model = adapt(net, method)
    forward, before = model(x), snapshot(net)
    with pytest.raises(TypeError, match=f"{BASES[base].name} weights cannot be rewritten.*dequantize=True"):
        model.merge_and_unload()
    assert not net.first.merged
    assert_same(snapshot(net), before)
    assert torch.equal(model(x), forward)


@pytest.mark.parametrize("base", ["nf4", "int8", "hqq 8 bits", "quanto 8 bits", "torchao rows"])
def test_merging_does_not_touch_who_shares_the_packed_weight(base):
    net, x = Net(base), draw(base)
    net.train()(x)  # bitsandbytes moves the scales of 8 bits from the weight to the layer
    other = copy.copy(net.first)  # another layer around the same tensors
    other.__dict__ = {**net.first.__dict__, "_parameters": dict(net.first._parameters)}
    if hasattr(other, "state"):
        other.state = copy.copy(other.state)
    expected = other(x)
    model = adapt(net, "lora")
    with pytest.warns(PeftWarning):
        model.merge_and_unload()
    assert torch.equal(other(x), expected) and not torch.equal(net.first(x), expected)


@rewritable
def test_backward_of_a_forward_before_merging_and_unmerging(base):
    net, x = Net(base), draw(base)
    model = adapt(net, "lora")
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, parameters, upstream)
    y = model(x)
    with pytest.warns(PeftWarning):
        model.merge_adapter()
    model(x)
    model.unmerge_adapter()
    for ours, theirs in zip(torch.autograd.grad(y, parameters, upstream), expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", [m for m in CONFIGS | OTHERS if "embedding" in METHODS[m].ops and METHODS[m].merges])
@pytest.mark.parametrize(("kind", "error"), [("EmbeddingNF4", 0.3), ("Embedding8bit", 0.02), ("block-wise", 0.1)])
def test_packed_embeddings(kind, error, method, tmp_path):
    table = torch.randn(20, WIDTH)

    def pack():
        layer = nn.Embedding(20, WIDTH) if kind == "block-wise" else getattr(bnb.nn, kind)(20, WIDTH)
        layer.load_state_dict({"weight": table})
        if kind == "block-wise":
            quantize_({"0": layer})
        return nn.Sequential(layer.to("cpu")).requires_grad_(False)

    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed := torch.seed() % 2**31)
    net, x = pack(), torch.arange(20).view(4, 5)
    layer = net[0]
    packed, state = net(torch.arange(20)), packed_state(layer)
    model = adapt(net, method, targets=["0"])
    leaves = {}
    for path, parameter in net[0].adapter_tensors("default"):
        value = parameter.detach()
        leaves[path] = value.double().requires_grad_() if value.is_floating_point() else value
    expected = METHODS[method].formula(OPS["embedding"], packed.double(), None, leaves, x)
    y = model(x)
    close(y, expected, 1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.double())
    for path, parameter in net[0].adapter_tensors("default"):
        if parameter.is_floating_point():
            close(parameter.grad, leaves[path].grad, 1e-4)
    with pytest.warns(PeftWarning):
        model.merge_adapter()
    close(model(x), expected, error)
    model.unmerge_adapter()
    assert all(ours is theirs for ours, theirs in zip(packed_state(layer).values(), state.values()))
    assert torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    torch.manual_seed(seed)
    assert torch.equal(PeftModel.from_pretrained(pack(), tmp_path)(x), y)
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged[0]) is nn.Embedding
    close(merged(x), expected, 1e-5)


def test_blockwise_embeddings_of_a_class_of_their_own():
    """OPT's table of positions looks up others than it is given."""
    net, ids = opt(), tokens()
    quantize_({"positions": net.model.decoder.embed_positions})
    kind = type(opt().model.decoder.embed_positions)
    model = adapt(net, "lora", targets=["embed_positions"]).eval()
    expected = logits(model, ids)
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.model.decoder.embed_positions) is kind
    assert_close(logits(merged, ids), expected)
    assert merged.state_dict().keys() == opt().state_dict().keys()


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_tied_packed_weights_stay_tied_unless_one_of_them_changes(target, dequantize):
    net, ids = llama(tie_word_embeddings=True), tokens()
    quantize_({"tokens": net.model.embed_tokens, "head": net.lm_head})
    model = adapt(net, "lora", targets=[target]).eval()
    expected = logits(model, ids)
    model.merge_adapter()
    model.unmerge_adapter()
    assert getattr(net.lm_head, "base_layer", net.lm_head).weight is net.model.embed_tokens.weight
    merged = model.merge_and_unload(dequantize=dequantize)
    is_tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert is_tied == merged.config.tie_word_embeddings == (target == "q_proj")
    close(logits(merged, ids), expected, 1e-5 if dequantize or is_tied else 0.1)


def test_convolutions_of_quanto():
    library = pytest.importorskip("optimum.quanto")
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), torch.randn(2, 4, 5, 5)
    library.quantize(net, weights=library.qint8)
    library.freeze(net)
    model = adapt(net, "lora", targets=["0"])
    forward = model(x)
    with pytest.warns(PeftWarning):
        model.merge_adapter()
    close(model(x), forward, 0.05)
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged[0]) is nn.Conv2d
    close(merged(x), forward, 1e-5)


def test_all_linear_means_packed_linear_layers_and_no_other_packed_ones():
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Module()
    net.embedding = bnb.nn.EmbeddingNF4(20, WIDTH).to("cpu")
    net.conv = quanto("qint8")(nn.Conv2d(2, 2, 3))
    for name in ("GPTQ", "EETQ", "hqq 4 bits", "int8"):
        net.add_module(name.replace(" ", "_"), BASES[name].pack(nn.Linear(WIDTH, WIDTH)))
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert {path for path, _ in model.get_base_model().named_modules() if path + ".base_layer" in
            dict(model.get_base_model().named_modules())} == {"GPTQ", "EETQ", "hqq_4_bits", "int8"}  # fmt: skip


@pytest.mark.parametrize("base", ["nf4", "hqq 4 bits", "quanto 4 bits", "torchao rows", "block-wise", "GPTQ"])
def test_packed_weights_count_what_they_encode(base):
    model = adapt(Net(base), "lora", targets=["first"])
    trained, total = model.get_nb_trainable_parameters()
    bias = 0 if base in ("hqq 4 bits", "GPTQ") else WIDTH  # where it is no parameter
    assert (trained, total) == (8 * WIDTH, 2 * WIDTH**2 + bias + 8 * WIDTH)


def test_training_on_rounded_activations_is_refused():
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    quantization.quantize_(net, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="0 rounds its input to 8 bits .* passes no gradient on"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))
    model, x = adapt(net, "lora", targets=["0", "1"], inference_mode=True), torch.randn(4, WIDTH)
    with torch.no_grad():
        forward = model(x)
        close(model.merge_and_unload(dequantize=True)(x), forward, 0.05)


def test_a_packed_weight_of_unknown_shape_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(3, dtype=torch.int8))

    net = nn.Sequential(Odd())
    with pytest.raises(TypeError, match="Odd holds a packed weight .* leave it out of target_modules"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))


def test_a_packed_layer_that_is_trained_beside_is_left_alone_by_its_wrapper():
    net = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH), "head": BASES["GPTQ"].pack(nn.Linear(WIDTH, WIDTH))})
    model = get_peft_model(net, LoraConfig(target_modules=["layer"], modules_to_save=["head"]))
    assert find_backend(net["head"]) is None and find_backend(net["head"].original_module).name == "GPTQ"
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged["head"]) is type(merged["layer"]) is nn.Linear


@bases
def test_dequantize_module_weight(base):
    net = Net(base, bias=False)
    weight = dequantize_module_weight(net.first)
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad
    close(weight, weight_of(net.first.train(), BASES[base].dtype), BASES[base].tolerance)
    plain = nn.Linear(3, 2)
    assert dequantize_module_weight(plain) is plain.weight


@pytest.mark.parametrize("pack", [four_bit("nf4"), four_bit("nf4", nested=True), eight_bit])
def test_merging_after_inference(pack):
    """In eval mode bitsandbytes may repack a weight for a CPU kernel, or move its scales elsewhere."""
    plain = nn.Linear(WIDTH, WIDTH)
    net, x = nn.Sequential(pack(copy.deepcopy(plain))), torch.randn(4, WIDTH)
    model = adapt(net, "lora", targets=["0"], inference_mode=True).eval()
    with torch.no_grad():
        forward = model(x)
        merged = model.merge_and_unload(dequantize=True)
        close(merged(x), forward, 0.05)
        close(merged[0].weight - plain.weight, (merged[0].weight - plain.weight).double(), 1e-6)
