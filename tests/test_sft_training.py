"""Sparse fine-tuning under everything that people train with, each against the plain run of the same model.

LoRA is here wherever it shares the mechanism. A run is observed through its gradients and, while an SFT adapter
gathers gradients for a reselection, through the candidates and their summed gradients too.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SIZES, adapted, tokens
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.func import functional_call, grad, jvp, vmap
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, SftAdamW, SftConfig, SftSelector, get_peft_model

TARGETS = ["q_proj", "down_proj"]
methods = pytest.mark.parametrize("method", ["sft", "lora"])


def language_model(method: str = "sft", precision: torch.dtype = torch.float64, names=("default",)) -> PeftModel:
    """A model of one block whose adapters change it."""
    kw = {"dtype": "auto", "num_tunable_weights": 150} if method == "sft" else {}
    sizes = {**SIZES, "num_hidden_layers": 1, "intermediate_size": 24, "initializer_range": 0.2}
    base = LlamaForCausalLM(LlamaConfig(**sizes)).to(precision)
    return adapted(base, *names, method=method, target_modules=TARGETS, **kw).to(precision)


def loss_of(model: nn.Module, ids: torch.Tensor, **kw) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, **kw).loss


def deltas_of(model: PeftModel) -> dict:
    return {name: delta for _, name, delta in model.active_deltas()} if hasattr(model, "active_deltas") else {}


def start_gathering(model: PeftModel) -> None:
    for delta in deltas_of(model).values():
        delta.start_gathering()


def observed(model: PeftModel) -> dict[str, torch.Tensor]:
    """Gradients, candidates and the candidates' summed gradients."""
    seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for name, delta in deltas_of(model).items():
        if delta.is_gathering:
            seen[f"{name}.candidates"], seen[f"{name}.sum"] = delta.candidates.clone(), delta.candidate_grad.clone()
    assert seen and all(tensor.any() for tensor in seen.values())
    return seen


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol=1e-9, atol=1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        loose = key.endswith(".sum")  # in float32
        tolerance = {"rtol": max(rtol, 1e-5 * loose), "atol": max(atol, 1e-7 * loose)}
        torch.testing.assert_close(tensor, theirs[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


# ---- Ways to run a model ----


def checkpointed(model, reentrant: bool):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def compiled(model, backend: str):
    torch.compiler.reset()
    model.graphs = 0

    def counting(graph, inputs):
        model.graphs += 1
        return lookup_backend(backend)(graph, inputs)

    return torch.compile(model, backend=counting)


WAYS = {
    "checkpointing": lambda model: checkpointed(model, False),
    "reentrant checkpointing": lambda model: checkpointed(model, True),
    "compiled": lambda model: compiled(model, "aot_eager"),
}


@methods
@pytest.mark.parametrize("way", WAYS)
def test_a_recomputed_or_compiled_model_gives_the_same(method, way):
    """Three backward passes: the first chooses the candidates, the next add to them; each is counted once."""
    plain = language_model(method).train()
    other = copy.deepcopy(plain)
    run = WAYS[way](other)
    batches = [tokens(3, 7) for _ in range(3)]
    for gathering in (False, True):
        for model in (plain, other):
            model.zero_grad()
            if gathering:
                start_gathering(model)
        for ids in batches:
            expected, found = loss_of(plain, ids), loss_of(run, ids)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            expected.backward()
            found.backward()
            assert_same(observed(other), observed(plain))
    if way == "compiled":
        assert other.graphs == 1 if method == "lora" else other.graphs > 1  # SFT's products are not traced


def products(method: str, layer: nn.Module, x: torch.Tensor, gy: torch.Tensor, change=lambda tensor: tensor):
    """`y = x (W + delta)^T` and its gradients by autograd in float64, of everything as `change` makes it."""

    def leaf(tensor):
        return change(tensor.detach().double()).requires_grad_()

    x, W = leaf(x), leaf(layer.get_base_layer().weight)
    if method == "lora":
        A, B = map(leaf, layer.factors("default"))
        leaves, total = {"x": x, "A": A, "B": B}, W + layer.scaling["default"] * B @ A
    else:
        leaves, total = {"x": x, "W": W}, W + leaf(layer.delta_weight("default"))
    y = F.linear(x, total)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), change(gy.double()))))}


@methods
def test_autocast_rounds_and_no_more(method):
    """Each adapted layer of a model, from the input and the output's gradient that the model gives it.

    In an entry of a result at most six roundings to bfloat16 come one after the other, each by up to 2**-8 of the
    number. So its error is below 7 * 2**-8 of what the entry is if no two numbers cancel: all made positive.
    """
    model, seen = language_model(method, torch.float32), {}
    layers = list(model.base_model.layers())
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, y: seen.update({layer: [args[0], y]}))
        layer.register_full_backward_hook(lambda layer, gx, gy: seen[layer].extend(gx + gy))
    model.enable_input_require_grads()  # the first layer has an input gradient too then
    start_gathering(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, tokens(4, 9))
    loss.backward()
    assert len(layers) == len(seen) == 2
    for layer, (x, y, gx, gy) in seen.items():
        assert y.dtype == gy.dtype == torch.bfloat16
        exact, size = products(method, layer, x, gy), products(method, layer, x, gy, torch.abs)
        ours = {"y": y, "x": gx}
        if method == "lora":
            ours["A"], ours["B"] = (p.grad for p in layer.factors("default"))
        else:
            delta = layer.sft_delta["default"]
            gW, scale = exact.pop("W").flatten(), size.pop("W").flatten()
            for name, gradient, at in (
                ("values", delta.values.grad, delta.indices.long()),
                ("candidates", delta.candidate_grad, delta.candidates.long()),
            ):
                ours[name], exact[name], size[name] = gradient, gW[at], scale[at]
            others = torch.ones_like(gW, dtype=torch.bool)
            others[delta.candidates.long()] = False
            most, least = gW.abs() + 7 * 2**-8 * scale, gW.abs() - 7 * 2**-8 * scale
            assert most[~others].min() >= least[others].max(), "these are not the positions of largest gradient"
        for name, tensor in ours.items():
            error = (tensor.double() - exact[name]).abs()
            assert (error <= 7 * 2**-8 * size[name]).all(), f"{name}: {(error / size[name]).nan_to_num().max()}"
            assert (error > 2**-12 * size[name]).any(), f"{name} was not computed under autocast"


def fix_candidates(model: PeftModel, seed: int) -> None:
    """Let every window have random candidates, drawn from the seed, instead of those of its first micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas_of(model).values():
        pool = torch.randperm(delta.dense_numel, generator=generator)[: delta.indices.numel()].sort().values.int()

        def start(*args, delta=delta, pool=pool):
            type(delta).start_gathering(delta, *args)
            delta.candidates = pool.clone()

        delta.start_gathering = start


def train(model, batches, accumulation=1, algorithm="rigl", max_norm=None, foreach=None, run=None, between=None):
    """A training of one update step per `accumulation` batches; what it leaves behind."""
    schedule = {"reselection_steps": 4, "selection_accumulation_steps": 2}
    config = SftConfig(selection_algorithm=algorithm, initial_reselection_rate=0.5, **schedule)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = SftAdamW(parameters, lr=0.01)
    steps = len(batches) // accumulation
    selector = SftSelector(model, optimizer, config, steps, accumulation)
    model.train()
    for number, batch in enumerate(batches):
        (loss_of(run or model, batch) / accumulation).backward()
        if between:
            between()
        if number % accumulation == accumulation - 1:
            if max_norm:
                torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=foreach)
            optimizer.step()
            optimizer.zero_grad()
            selector.step()
    selector.close()
    assert sum(entry["moved"] for entry in selector.history) > 10
    return result(model, optimizer)


def result(model, optimizer) -> dict[str, torch.Tensor]:
    left = {}
    for name, delta in deltas_of(model).items():
        left[f"{name}.indices"], left[f"{name}.values"] = delta.indices.clone(), delta.values.detach().clone()
        left |= {f"{name}.{key}": tensor.clone() for key, tensor in optimizer.state[delta.values].items()}
    return left


def test_accumulating_micro_batches_is_one_large_batch():
    """At fixed candidates, over two reselections. The moments of grown positions come from float32 sums.

    These may put two positions in another order that are almost equal, so this draw has none, and is always the same.
    """
    torch.manual_seed(0)
    model = language_model()
    twin = copy.deepcopy(model)
    batches = [tokens(3, 7) for _ in range(7 * 4)]
    fix_candidates(model, seed=0)
    fix_candidates(twin, seed=0)
    whole = [torch.cat(batches[n : n + 4]) for n in range(0, len(batches), 4)]
    assert_same(train(model, batches, accumulation=4), train(twin, whole), rtol=1e-4, atol=1e-6)


# ---- Scaling and clipping ----


def test_a_grad_scaler_that_overflows_in_a_window():
    """Real overflows: the loss is scaled until float32 gradients are infinite; two steps of the first window are lost.

    What remains is the unscaled run without these two steps."""
    model = language_model(precision=torch.float32)
    twin = copy.deepcopy(model)
    config = SftConfig(reselection_steps=7, selection_accumulation_steps=5)
    batches = [tokens(3, 7) for _ in range(15)]
    optimizer = SftAdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-8, growth_interval=4)
    selector = SftSelector(model, optimizer, config, 15, 1)
    lost = []
    for number, batch in enumerate(batches):
        scaler.scale(1024 * loss_of(model, batch)).backward()  # 2**137 and 2**129 are too much
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        selector.step()
        if scaler.get_scale() < before:
            lost.append(number)
    assert lost == [0, 1] and selector.discarded_updates == 2
    assert len(selector.history) == 2

    other = SftAdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    plain = SftSelector(twin, other, config, 15, 1)
    for number, batch in enumerate(batches):
        if number in lost:  # nothing is gathered in a step that is not taken
            plain.completed_steps += 1
            continue
        (1024 * loss_of(twin, batch)).backward()
        other.step()
        other.zero_grad()
        plain.step()
    assert_same(result(model, optimizer), result(twin, other), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_by_torch(foreach):
    """Clipped gradients reach the optimiser; the gathered ones are documented to be what they were."""
    model = language_model()
    twin = copy.deepcopy(model)
    batches = [tokens(3, 7) for _ in range(7)]
    norms = []

    def clip_by_hand():
        gradients = [p.grad for p in twin.parameters() if p.requires_grad]
        norms.append(math.sqrt(sum(each.square().sum().item() for each in gradients)))
        for each in gradients:
            each.mul_(min(1.0, 0.02 / (norms[-1] + 1e-6)))

    clipped = train(model, batches, max_norm=0.02, foreach=foreach)
    assert_same(clipped, train(twin, batches, between=clip_by_hand), rtol=1e-7)
    assert min(norms) > 0.02


# ---- torch's own optimisers, positions fixed ----


@pytest.mark.parametrize("setting", ["fused", "foreach", "plain"])
def test_torch_optimizers_train_the_values(setting):
    """Against a dense model whose weights have the same optimiser and a gradient at these positions only."""
    model = language_model()
    plain = copy.deepcopy(model).merge_and_unload()
    masks = {}
    for name, delta in deltas_of(model).items():
        weight = plain.get_submodule(name.partition(".sft_delta")[0]).weight.requires_grad_()
        masks[weight] = torch.zeros(weight.shape, dtype=torch.bool)
        masks[weight].view(-1)[delta.indices.long()] = True
    settings = {"lr": 0.01, "weight_decay": 0.0, "foreach": False}
    if setting != "plain":
        settings = {**settings, "foreach": None, setting: True}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    reference = torch.optim.AdamW(list(masks), lr=0.01, weight_decay=0.0)
    for _ in range(6):
        ids = tokens(3, 7)
        ours, theirs = loss_of(model, ids), loss_of(plain, ids)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # losses are float32
        for loss, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            loss.backward()
        for weight, mask in masks.items():
            weight.grad.mul_(mask)
        optimizer.step()
        reference.step()


# ---- Several adapters ----


def visit_the_other(model: PeftModel) -> None:
    model.set_adapter("b")
    loss_of(model, tokens(2, 5)).backward()
    model.set_adapter("a")


def use_mixed_rows(model: PeftModel) -> None:
    with torch.no_grad():
        model(input_ids=tokens(3, 5), adapter_names=["a", "__base__", "b"])


def merge_and_unmerge(model: PeftModel) -> None:
    model.merge_adapter()
    with torch.no_grad():
        loss_of(model, tokens(2, 5))
    model.unmerge_adapter()


def run_the_base(model: PeftModel) -> None:
    with model.disable_adapter(), torch.no_grad():
        loss_of(model, tokens(2, 5))


def delete_the_other(model: PeftModel) -> None:
    if "b" in model.peft_config:
        model.delete_adapter("b")
    else:
        model.add_adapter("b", model.peft_config["a"])


@pytest.mark.parametrize("visit", [visit_the_other, use_mixed_rows, merge_and_unmerge, run_the_base, delete_the_other])
def test_what_happens_between_micro_batches_leaves_no_trace(visit):
    model = language_model(names=("a", "b"))
    twin = copy.deepcopy(model)
    batches = [tokens(3, 7) for _ in range(14)]

    def between():
        with torch.random.fork_rng():
            model.train(False)
            visit(model)
            model.train()

    expected = train(twin, batches, accumulation=2)
    assert_same(train(model, batches, accumulation=2, between=between), expected, rtol=0, atol=0)


def test_a_mixed_batch_trains_each_adapter_on_its_rows():
    model = language_model(names=("a", "b"))
    twin = copy.deepcopy(model)
    ids = tokens(5, 7)
    rows = {"a": [0, 2, 4], "b": [1, 3]}
    names = ["a", "b", "a", "b", "a"]

    def gathered(model, run):
        seen = {}
        for name in rows:
            model.set_adapter(name)
            start_gathering(model)
        model.set_adapter("a")
        for _, layer in model.get_base_model().named_modules():
            if hasattr(layer, "sft_delta"):
                for delta in layer.sft_delta.values():
                    delta.values.requires_grad_()
        run()
        for key, delta in model.get_base_model().named_modules():
            if key.endswith(("sft_delta.a", "sft_delta.b")):
                seen[f"{key}.grad"], seen[f"{key}.candidates"] = delta.values.grad, delta.candidates
                seen[f"{key}.sum"] = delta.candidate_grad
        assert len(seen) == 12
        return seen

    def together():
        logits = model(input_ids=ids, adapter_names=names).logits
        (logits.logsumexp(-1) ** 2).sum().backward()

    def apart():
        for name, chosen in rows.items():
            twin.set_adapter(name)
            (twin(input_ids=ids[chosen]).logits.logsumexp(-1) ** 2).sum().backward()

    assert_same(gathered(model, together), gathered(twin, apart), rtol=1e-6, atol=1e-8)  # norms go through float32


# ---- Kinds of layers and data types ----


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))

    example = staticmethod(lambda: torch.randn(64, 3, 6, 6) + 1)
    targets = ("conv",)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))

    example = staticmethod(lambda: torch.randint(30, (64, 5)))
    targets = ("embed",)


class Rows(nn.Module):
    def __init__(self, make=nn.Linear):
        super().__init__()
        self.first, self.head = make(12, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))

    example = staticmethod(lambda: torch.randn(64, 12) + 1)
    targets = ("first",)


KINDS = {
    "Linear": Rows,
    "Conv1D": lambda: Rows(lambda i, o: Conv1D(o, i)),
    "Conv2d": Pictures,
    "Embedding": Words,
}


SMALL = {"sft": {"num_tunable_weights": 30, "dtype": "auto"}, "lora": {"r": 2}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_training_of_every_kind_of_layer(kind, dtype):
    base_dtype = torch.bfloat16 if dtype == "auto" else torch.float32
    net = KINDS[kind]().to(base_dtype)
    nn.init.normal_(net.head.weight)
    x = net.example()
    x = x.to(base_dtype) if x.is_floating_point() else x
    with torch.no_grad():
        y = net(x).mean(0).argmin().expand(64)  # learned for certain: far from it, and the inputs have a mean
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    schedule = {"reselection_steps": 10, "selection_accumulation_steps": 5}
    config = SftConfig(target_modules=list(net.targets), num_tunable_weights=40, dtype=dtype, **schedule)
    model = get_peft_model(net, config)
    ((_, delta),) = deltas_of(model).items()
    assert delta.values.dtype == (base_dtype if dtype == "auto" else getattr(torch, dtype))
    start = set(delta.indices.tolist())
    optimizer = SftAdamW([delta.values], lr=0.05, momentum_dtype=torch.float32)
    selector = SftSelector(model, optimizer, config, 40, 1)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert [entry["step"] for entry in selector.history] == [5, 15, 25, 35]
    assert len(set(delta.indices.tolist()) - start) >= 5
    assert torch.equal(delta.indices, delta.indices.unique())
    unloaded = model.unload()
    assert all(torch.equal(before[name], p) for name, p in unloaded.named_parameters())


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_gathers(kind, backend):
    """Compiled before there is anything to gather; the graph must not remember that."""
    net = KINDS[kind]().double()
    plain = adapted(net, method="sft", target_modules=list(net.targets), **SMALL["sft"])
    other, x = copy.deepcopy(plain), net.example().double()
    run = compiled(other, backend)
    run(x).sum().backward()
    for model in (plain, other):
        model.zero_grad()
        start_gathering(model)
    for _ in range(2):
        plain(x).square().sum().backward()
        run(x).square().sum().backward()
        assert_same(observed(other), observed(plain))
    for delta in deltas_of(other).values():
        delta.stop_gathering()
        run(x).sum().backward()
        assert delta.candidates is None and delta.candidate_grad is None
    assert other.graphs > 1


# ---- torch.func ----


@pytest.mark.parametrize("kind", KINDS)
@methods
def test_transforms_of_torch_func(method, kind):
    """Gradients of each row by vmap and grad, against one backward pass per row; a directional derivative by jvp."""
    net = KINDS[kind]().double()
    x = net.example()[:5]
    x = x.double() if x.is_floating_point() else x
    model = adapted(net, method=method, target_modules=list(net.targets), **SMALL[method]).double()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, rows):
        return functional_call(model, {**frozen, **values}, (rows,)).square().sum()

    each = vmap(grad(lambda values, row: loss(values, row[None])), in_dims=(None, 0))(trained, x)
    for n, row in enumerate(x):
        model.zero_grad()
        model(row[None]).square().sum().backward()
        for name in trained:
            torch.testing.assert_close(each[name][n], model.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    direction = {name: torch.randn_like(p) for name, p in trained.items()}
    _, slope = jvp(lambda values: loss(values, x), (trained,), (direction,))
    expected = sum((each[name].sum(0) * direction[name]).sum() for name in trained)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_differentiated_is_refused():
    model = adapted(Rows(), method="sft", target_modules=["first"])
    (delta,) = deltas_of(model).values()
    delta.start_gathering()
    with pytest.raises(RuntimeError, match="Gradients taken by torch.func cannot be gathered for a reselection"):
        vmap(lambda row: model(row[None]))(torch.randn(3, 12))
    (slope,) = torch.autograd.grad(model(torch.randn(3, 12)).square().sum(), delta.values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
