"""`tuners/recompute.py`: an input that autograd can make again is not kept, and every gradient stays what it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, SftConfig, get_peft_model
from peft.tuners.recompute import keep

WIDTH = 16


def factors(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that are results of something, as in the middle of a model."""
    return tuple(torch.randn(6, WIDTH, dtype=dtype, requires_grad=True) * 1 for _ in range(2))


def rms_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = a.float() if a.dtype == torch.bfloat16 else a
    scale = torch.linspace(0.5, 2, WIDTH, dtype=a.dtype)
    return scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(a.dtype)


PRODUCERS = {
    "product": lambda a, b: a * b,
    "gated": lambda a, b: F.silu(a) * b,
    "scaled": lambda a, b: torch.linspace(1, 2, WIDTH, dtype=a.dtype) * (a * b),
    "RMSNorm": rms_norm,
    "silu": lambda a, b: F.silu(a),
    "gelu": lambda a, b: F.gelu(a),
    "gelu_tanh": lambda a, b: F.gelu(a, approximate="tanh"),
    "dropout on the CPU": lambda a, b: F.dropout(a * b, 0.3, training=True),
    "dropout on accelerators": lambda a, b: torch.native_dropout(a * b, 0.3, True)[0],
    "LayerNorm": lambda a, b: F.layer_norm(a, (WIDTH,), torch.linspace(1, 2, WIDTH, dtype=a.dtype), None),
    "LayerNorm with bias": lambda a, b: F.layer_norm(a, (WIDTH,), b[0].detach(), b[1].detach()),
    "LayerNorm without weight": lambda a, b: F.layer_norm(a, (WIDTH,)),
}
producers = pytest.mark.parametrize("produce", PRODUCERS.values(), ids=PRODUCERS)


@producers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_made_input_is_not_kept_and_comes_back(produce, dtype):
    x = produce(*factors(dtype))
    parts, recipe = keep(x)
    if dtype == torch.bfloat16 and "LayerNorm" in x.grad_fn.name():  # on the CPU its statistics are rounded
        assert parts[0] is x
        return
    assert all(part.data_ptr() != x.data_ptr() for part in parts)
    with torch.no_grad():
        again = recipe(parts)
    assert again.dtype == x.dtype
    torch.testing.assert_close(again, x.detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    if dtype == torch.float64:
        torch.testing.assert_close(again, x.detach(), rtol=1e-13, atol=1e-13)


@producers
def test_what_is_kept_takes_no_memory_of_its_own(produce):
    """Every part is memory that autograd's own nodes hold on to."""
    x = produce(*factors())
    held, todo = set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(tensor := getattr(node, name), torch.Tensor):
                held.add(tensor.data_ptr())
        todo += [before for before, _ in node.next_functions if before is not None]
    assert {part.data_ptr() for part in keep(x)[0]} <= held


@pytest.mark.parametrize(
    "produce",
    [
        lambda a, b: a.detach(),
        lambda a, b: a.detach().requires_grad_(),
        lambda a, b: a + b,
        lambda a, b: a.exp(),
        lambda a, b: (a + b) * 2.0 * 3.0,  # nothing that is kept holds a + b
    ],
    ids=["constant", "leaf", "sum", "exp", "scaled sum"],
)
def test_what_cannot_be_made_again_is_kept_itself(produce):
    x = produce(*factors())
    (part,), recipe = keep(x)
    assert part is x and recipe([part]) is x


def test_a_result_changed_behind_autograds_back_is_kept_itself():
    a, b = factors()
    x = a * b
    with torch.no_grad():
        x += 1
    (part,), _ = keep(x)
    assert part is x


class Block(nn.Module):
    """Three layers with a common normed input and one with a gated input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, a, b):
        x = rms_norm(a, b)
        return self.o(F.silu(self.q(x)) * self.k(x)) + self.v(x)


CONFIGS = {
    "lora": lambda: LoraConfig(target_modules=["q", "k", "v", "o"], r=3, init_lora_weights=False),
    "sft": lambda: SftConfig(target_modules=["q", "k", "v", "o"], num_tunable_weights=200),
}
methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def adapted(config) -> nn.Module:
    model = get_peft_model(Block().double(), config()).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


def gradients(model, inputs, run=None) -> list[torch.Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = (run or model)(*inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad((y**2).sum(), [*inputs, *trained], allow_unused=True)


def without_recomputing(model, inputs) -> list[torch.Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return gradients(model, inputs)


@methods
def test_gradients_are_those_of_kept_inputs(config):
    model, inputs = adapted(config), factors()
    torch.testing.assert_close(gradients(model, inputs), without_recomputing(model, inputs), rtol=1e-12, atol=1e-12)


@methods
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("part", ["all", "norm"])
def test_checkpoints_around_or_before_a_layer(config, use_reentrant, part, monkeypatch):
    """A checkpoint gives every saved tensor out once, so nobody else may read it."""
    model, inputs = adapted(config), factors()
    expected = without_recomputing(model, inputs)
    if part == "all":
        found = gradients_by_backward(model, inputs, lambda *x: checkpoint(model, *x, use_reentrant=use_reentrant))
    else:
        norm = rms_norm
        monkeypatch.setitem(globals(), "rms_norm", lambda *x: checkpoint(norm, *x, use_reentrant=use_reentrant))
        found = gradients_by_backward(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def gradients_by_backward(model, inputs, run=None) -> list[torch.Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    model.zero_grad()
    ((run or model)(*inputs) ** 2).sum().backward()
    return [t.grad for t in (*inputs, *(p for p in model.parameters() if p.requires_grad))]


@methods
def test_off_loaded_activations(config):
    model, inputs = adapted(config), factors()
    expected = without_recomputing(model, inputs)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients():
    model, inputs = adapted(CONFIGS["lora"]), factors()

    def penalty():
        a, b = (t.detach().requires_grad_() for t in inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad((model(a, b) ** 2).sum(), [a, *trained], create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), [a, *trained])

    found = penalty()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = penalty()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_layers_with_a_common_input_make_it_once():
    a, b = factors()
    x = a * b
    kept = [keep(x) for _ in range(3)]
    with torch.no_grad():
        made = [recipe(parts) for parts, recipe in kept]
        assert made[0] is made[1] is made[2]
        again = kept[0][1](kept[0][0])  # a second backward pass over a retained graph
    assert again is not made[0]
    torch.testing.assert_close(again, x.detach())


@methods
def test_retained_graph(config):
    model, inputs = adapted(config), [t.detach().requires_grad_() for t in factors()]
    loss = (model(*inputs) ** 2).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, trained), first)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inputs_after_norms_and_activations_are_not_kept(name, monkeypatch):
    """That a new version of transformers writes its norms in another way should not go unnoticed."""
    from peft.tuners.lora import fused

    base = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24)),
        "bert": lambda: BertModel(BertConfig(**SIZES, intermediate_size=24)),
    }[name]()
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2)).train()
    names = {id(layer.lora_A["default"].weight): key for key, layer in base.named_modules() if hasattr(layer, "lora_A")}
    kept, apply = [], fused.FusedLora.apply

    def watching(x, xd, y, W, b, ways, A, *rest):
        if keep(x if xd is None else xd)[0][0] is (x if xd is None else xd):
            kept.append(names[id(A)])
        return apply(x, xd, y, W, b, ways, A, *rest)

    monkeypatch.setattr(fused.FusedLora, "apply", watching)
    model(tokens())
    last_layer = {key.partition(".1.")[2] for key in kept if ".1." in key}
    # Attention's output is kept by attention anyway.
    assert last_layer == {"llama": {"self_attn.o_proj"}, "bert": {"attention.output.dense"}}[name], kept
