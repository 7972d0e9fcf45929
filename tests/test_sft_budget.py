"""A global budget against plain simulations, and that nothing breaks when a delta changes its size."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from sft_runs import assert_same, snapshot
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import (
    PeftModel,
    SftAdamW,
    SftConfig,
    SftModel,
    SftSelector,
    SftSM3,
    SftTrainer,
    get_peft_model,
    select_static,
    set_peft_model_state_dict,
)
from peft.tuners.sft import budget

BETAS = (0.9, 0.99)
LAYERS = ("first", "second", "third")


class Net(nn.Module):
    """Three layers whose gradients are of different sizes, so that they compete unequally."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.second = nn.Linear(9, 8)
        self.third = nn.Linear(8, 5)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def make(algorithm="rigl", total=30, base=None, **settings):
    settings = {"reselection_steps": 5, "selection_accumulation_steps": 3, "density": 0.2, **settings}
    config = SftConfig(
        selection_algorithm=algorithm, budget="global", target_modules=list(LAYERS), dtype="auto", **settings
    )
    model = SftModel((base or Net()).double(), config, "default")
    return (model, *drive(model, config, total))


def drive(model, config, total=30):
    params = [param for param in model.parameters() if param.requires_grad]
    if config.selection_algorithm == "sm3":
        deltas = {delta.values: delta for _, _, delta in model.active_deltas()}
        optimizer = SftSM3(params, deltas, lr=0.05, momentum=0.3)
    else:
        optimizer = SftAdamW(params, lr=0.05, betas=BETAS)
    return optimizer, SftSelector(model, optimizer, config, total, 1)


def random_batches(steps):
    return [(torch.randn(8, 7, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)) for _ in range(steps)]


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def train(model, optimizer, selector, batches, zero_first=True):
    for batch in batches:
        loss = loss_of(model, batch)  # the graph of the step before is alive until here
        loss.backward()
        optimizer.step()
        if zero_first:
            optimizer.zero_grad()
        selector.step()
        if not zero_first:
            optimizer.zero_grad()


def sizes(model):
    return {name.split(".")[0]: delta.indices.numel() for _, name, delta in model.active_deltas()}


# ---- The whole algorithm ----


class Simulation:
    """By the book: one dictionary {(layer, position): entry} for the whole model, dense gradients, sorting."""

    def __init__(self, model, config, total):
        self.net, self.config, self.total, self.t = Net().double(), config, total, 0
        self.active, self.gathered = {}, None
        for name in LAYERS:
            layer = getattr(model.model, name)
            getattr(self.net, name).load_state_dict(layer.base_layer.state_dict())
            for i in layer.sft_delta["default"].indices.tolist():
                self.active[name, i] = self.fresh()
        self.base = {name: getattr(self.net, name).weight.detach().clone() for name in LAYERS}
        self.rows = {name: torch.zeros(w.shape[0], dtype=torch.float64) for name, w in self.base.items()}
        self.columns = {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in self.base.items()}

    @staticmethod
    def fresh():
        return {"value": 0.0, "m": 0.0, "v": 0.0, "age": 1}

    def gradients(self, batch):
        with torch.no_grad():
            for name, weight in self.base.items():
                getattr(self.net, name).weight.copy_(weight)
            for (name, i), entry in self.active.items():
                getattr(self.net, name).weight.view(-1)[i] += entry["value"]
        self.net.zero_grad()
        loss_of(self.net, batch).backward()
        return {name: getattr(self.net, name).weight.grad.flatten().clone() for name in LAYERS}

    def offered(self, grads):
        """0.6 candidates per position that a layer has, and 0.6 per position of an even share."""
        room = sum(w.numel() for w in self.base.values())
        result = {}
        for name, grad in grads.items():
            k = sum(layer == name for layer, _ in self.active)
            count = min(grad.numel(), max(1, int(0.6 * (k + len(self.active) / room * grad.numel()))))
            result |= {(name, i): [] for i in grad.abs().topk(count).indices.tolist()}
        return result

    def step(self, batch):
        grads = self.gradients(batch)
        gathers = self.config.selection_algorithm == "rigl"
        if gathers and self.t % self.config.reselection_steps < self.config.selection_accumulation_steps:
            self.gathered = self.offered(grads) if self.gathered is None else self.gathered
            for (name, i), seen in self.gathered.items():
                seen.append(grads[name][i].item())
        self.adam(grads) if gathers else self.sm3(grads)
        self.t += 1
        if self.t % self.config.reselection_steps == self.config.selection_accumulation_steps:
            self.reselect()

    def adam(self, grads):
        for (name, i), e in self.active.items():
            g, n = grads[name][i].item(), e["age"]
            e["m"] = BETAS[0] * e["m"] + (1 - BETAS[0]) * g
            e["v"] = BETAS[1] * e["v"] + (1 - BETAS[1]) * g * g
            denominator = (e["v"] ** 0.5 + 1e-6) / (1 - BETAS[1] ** n) ** 0.5
            e["value"] -= 0.05 * e["m"] / (1 - BETAS[0] ** n) / denominator
            e["age"] += 1

    def sm3(self, grads):
        old = copy.deepcopy((self.rows, self.columns))
        for (name, position), e in self.active.items():
            i, j = divmod(position, len(self.columns[name]))
            g = grads[name][position].item()
            nu = min(old[0][name][i].item(), old[1][name][j].item()) + g * g
            self.rows[name][i] = max(self.rows[name][i].item(), nu)
            self.columns[name][j] = max(self.columns[name][j].item(), nu)
            e["m"] = 0.3 * e["m"] + 0.7 * g / (nu + 1e-8) ** 0.5
            e["value"] -= 0.05 * e["m"]

    def reselect(self):
        rate, progress = self.config.initial_reselection_rate, self.t / self.total
        if self.config.reselection_rate_policy == "cosine":
            share = rate * (1 + math.cos(math.pi * progress)) / 2
        else:
            share = 1.0 if self.t == self.config.selection_accumulation_steps else rate * (1 - progress)
        count = int(len(self.active) * share)
        smallest = sorted(self.active, key=lambda key: abs(self.active[key]["value"]))[:count]
        if self.config.selection_algorithm == "rigl":
            kept = set(self.active) - set(smallest)
            ranked = sorted(self.gathered.items(), key=lambda item: -abs(sum(item[1])))
            chosen = [key for key, _ in ranked if key not in kept][:count]
            grown = {}
            for key in chosen:
                if key not in self.active:
                    g, n = self.gathered[key], len(self.gathered[key])
                    m, v = sum(g) / n * (1 - BETAS[0] ** n), sum(x * x for x in g) / n * (1 - BETAS[1] ** n)
                    grown[key] = {"value": 0.0, "m": m, "v": v, "age": n + 1}
            smallest = [key for key in smallest if key not in chosen][: len(grown)]
        else:
            products = {
                (name, i): x
                for name in LAYERS
                for i, x in enumerate(torch.outer(self.rows[name], self.columns[name]).flatten().tolist())
                if (name, i) not in self.active
            }
            grown = {key: self.fresh() for key in sorted(products, key=lambda key: -products[key])[:count]}
        for key in smallest:
            del self.active[key]
        self.active |= grown
        self.gathered = None


@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
@pytest.mark.parametrize("zero_first", [True, False])
def test_equals_the_simulation(algorithm, zero_first):
    # In a linear schedule everything is exchanged first, and then many SM3 products are tied at 0.
    policy = "linear" if algorithm == "rigl" else "cosine"
    model, optimizer, selector = make(
        algorithm, initial_reselection_rate=0.4, reselection_rate_policy=policy, density=0.3
    )
    simulation = Simulation(model, selector.config, 30)
    start = sizes(model)
    seen = []
    for batch in random_batches(20):
        train(model, optimizer, selector, [batch], zero_first)
        simulation.step(batch)
        seen.append(sizes(model))
        for _, name, delta in model.active_deltas():
            layer = name.split(".")[0]
            expected = {i: e for (other, i), e in sorted(simulation.active.items()) if other == layer}
            assert delta.indices.tolist() == list(expected)
            values = torch.tensor([e["value"] for e in expected.values()], dtype=torch.float64)
            torch.testing.assert_close(delta.values.detach(), values, rtol=1e-5, atol=1e-7)
    assert len(selector.history) == 4 and all(entry["moved"] for entry in selector.history)
    assert any(size != start for size in seen)
    assert all(sum(size.values()) == sum(start.values()) for size in seen)
    assert model.peft_config["default"].num_deltas == sizes(model)
    assert {entry["name"].split(".")[0]: entry["total"] for entry in selector.last_report} == sizes(model)


@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
@pytest.mark.parametrize("stop", [1, 4, 6, 7, 9])
def test_resuming_is_exact(algorithm, stop):
    base, batches = Net().double(), random_batches(16)
    model, optimizer, selector = make(algorithm, base=copy.deepcopy(base))
    config = copy.deepcopy(model.peft_config["default"])
    train(model, optimizer, selector, batches[:stop])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), selector.state_dict()))
    moved = sizes(model) != config.num_deltas
    train(model, optimizer, selector, batches[stop:])

    other = SftModel(copy.deepcopy(base), config, "default")  # of the sizes that the unbroken run started with
    assert (sizes(other) != {n: saved[0][f"model.{n}.sft_delta.default.values"].numel() for n in LAYERS}) == moved
    other.load_state_dict(saved[0])
    resumed = drive(other, config)
    resumed[0].load_state_dict(saved[1])
    resumed[1].load_state_dict(saved[2])
    assert other.peft_config["default"].num_deltas == sizes(other)
    train(other, *resumed, batches[stop:])
    assert_same(snapshot(model, optimizer), snapshot(other, resumed[0]))
    assert resumed[1].last_report == selector.last_report


@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_a_layer_can_lose_everything_and_come_back(algorithm):
    model, optimizer, selector = make(algorithm, initial_reselection_rate=1.0, total=100)
    third = model.model.third.sft_delta["default"]
    train(model, optimizer, selector, random_batches(4))  # so that there is a state to resize, between two windows
    state = optimizer.state[third.values]
    source = third.exchange(torch.arange(third.indices.numel()), third.indices[:0].long())
    optimizer.move_slots(third.values, source)
    assert sizes(model)["third"] == 0 and third.values.requires_grad and not third.values.numel()
    total = sum(sizes(model).values())
    if algorithm == "sm3":  # an accumulator remembers where gradients were large
        state["accumulator_0"] += 1e6
        state["accumulator_1"] += 1e6
    train(model, optimizer, selector, random_batches(6))
    assert sizes(model)["third"] > 0 and sum(sizes(model).values()) == total
    loss_of(model, random_batches(1)[0]).backward()
    assert third.values.grad.shape == third.values.shape and third.values.grad.any()


def test_a_layer_without_gradients_offers_nothing():
    model, optimizer, selector = make()
    before = sizes(model)
    frozen = model.model.third.sft_delta["default"].indices.tolist()
    for batch in random_batches(3):
        model.model.second(torch.tanh(model.model.first(batch[0]))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
    third = model.model.third.sft_delta["default"]
    assert {entry["name"].split(".")[0]: entry["moved"] for entry in selector.last_report}["third"] == 0
    assert set(third.indices.tolist()) < set(frozen)  # its values are all 0: it may lose positions to the others
    assert sum(sizes(model).values()) == sum(before.values())
    train(model, optimizer, selector, random_batches(8))
    assert sum(sizes(model).values()) == sum(before.values())


# ---- Files and the Trainer ----


def adapt(base_model, algorithm="rigl", **settings):
    config = SftConfig(
        task_type="CAUSAL_LM",
        density=0.2,
        selection_algorithm=algorithm,
        budget="global",
        **settings,
    )
    return get_peft_model(copy.deepcopy(base_model), config)


@pytest.fixture
def base_model():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def data():
    rows = torch.randint(32, (40, 6))
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **settings):
    settings = {"save_steps": 1, **settings}
    return TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=3, learning_rate=0.02, report_to=[], use_cpu=True,
        disable_tqdm=True, **settings,
    )  # fmt: skip


def adapter_state(model):
    return {name: tensor.clone() for name, tensor in model.named_parameters() if "sft_delta" in name}


@pytest.mark.parametrize("algorithm", ["rigl", "sm3", "static"])
def test_the_trainer_resumes_and_the_file_loads(algorithm, base_model, data, tmp_path):
    settings = {} if algorithm == "static" else {"reselection_steps": 4, "selection_accumulation_steps": 2}
    model = adapt(base_model, algorithm, **settings)
    start = dict(model.peft_config["default"].num_deltas)
    others = {step: copy.deepcopy(model) for step in (1, 2, 5)}
    trainer = SftTrainer(Trainer)(model=model, args=arguments(tmp_path / "a"), train_dataset=data)
    trainer.train()
    expected = adapter_state(model)
    final = model.peft_config["default"].num_deltas
    assert final != start and sum(final.values()) == sum(start.values())
    for step, other in others.items():
        args = arguments(tmp_path / "b", save_strategy="no")
        resumed = SftTrainer(Trainer)(model=other, args=args, train_dataset=data)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_same(expected, adapter_state(other))
        assert other.peft_config["default"].num_deltas == final
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))  # into the parameters of its optimiser
    assert_same(expected, adapter_state(model))

    ids = torch.randint(32, (2, 6))
    for low_cpu_mem_usage in (False, True):
        folder = tmp_path / "a" / "checkpoint-10"
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(base_model), folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
        )
        assert loaded.peft_config["default"].num_deltas == final
        assert_same(expected, adapter_state(loaded))
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("how", ["load_adapter", "set_peft_model_state_dict", "load_state_dict"])
def test_the_configuration_knows_the_budget_that_was_loaded(how, base_model, tmp_path):
    moved = adapt(base_model)
    total = sum(moved.peft_config["default"].num_deltas.values())
    (_, _, first), (_, _, second), *_ = moved.active_deltas()
    free = [n for n in range(second.choices) if n not in second.indices.tolist()][:3]
    first.exchange(torch.arange(3), torch.tensor([], dtype=torch.int64))
    second.exchange(torch.tensor([], dtype=torch.int64), torch.tensor(free))
    now = moved.peft_config["default"].num_deltas
    assert sum(now.values()) == total
    moved.save_pretrained(tmp_path)
    assert SftConfig.from_pretrained(tmp_path).num_deltas == now

    start = adapt(base_model).peft_config["default"].num_deltas
    model, given = adapt(base_model), dict(start)
    model.add_adapter("given", SftConfig(task_type="CAUSAL_LM", budget="global", num_deltas=given))
    untouched = copy.deepcopy(model)
    if how == "load_adapter":
        model.load_adapter(tmp_path, "default")
    elif how == "set_peft_model_state_dict":
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"), "given")
    else:
        model.load_state_dict(moved.state_dict(), strict=False)
    name, other = ("given", "default") if how == "set_peft_model_state_dict" else ("default", "given")
    assert now != start
    assert model.peft_config[name].num_deltas == now and model.peft_config[other].num_deltas == start
    assert given == start and all(config.num_deltas == start for config in untouched.peft_config.values())


def test_a_rigid_adapter_does_not_take_another_size():
    def adapter(k, **settings):
        config = SftConfig(target_modules=list(LAYERS), num_deltas={"first": k, "second": 3, "third": 3}, **settings)
        return SftModel(Net(), config, "default")

    with pytest.raises(RuntimeError, match="size mismatch"):
        adapter(5).load_state_dict(adapter(4).state_dict())
    elastic = adapter(5, budget="global")
    elastic.load_state_dict(adapter(4, budget="global").state_dict())
    assert sizes(elastic)["first"] == 4


# ---- Static ----


@pytest.mark.parametrize("criterion", ["gradient", "fisher", "magnitude"])
def test_static_positions_are_the_best_of_all_layers(criterion):
    config = SftConfig(
        selection_algorithm="static",
        static_criterion=criterion,
        budget="global",
        target_modules=list(LAYERS),
        density=0.2,
        dtype="auto",
    )
    base, batches = Net().double(), random_batches(3)
    net = copy.deepcopy(base)
    scores = {name: torch.zeros_like(getattr(net, name).weight) for name in LAYERS}
    for batch in batches:
        net.zero_grad()
        loss_of(net, batch).backward()
        for name, score in scores.items():
            grad = getattr(net, name).weight.grad
            score += grad**2 if criterion == "fisher" else grad
    if criterion == "magnitude":
        scores = {name: getattr(net, name).weight.detach() for name in LAYERS}
    model = SftModel(base, config, "default")
    total = sum(sizes(model).values())
    sized = {name: score.abs().flatten().tolist() for name, score in scores.items()}
    ranked = sorted((-size, name, i) for name, layer in sized.items() for i, size in enumerate(layer))
    expected = {name: sorted(i for _, other, i in ranked[:total] if other == name) for name in LAYERS}
    select_static(model, batches, loss_of, workspace_bytes=0, progress=False)
    assert {name.split(".")[0]: delta.indices.tolist() for _, name, delta in model.active_deltas()} == expected
    assert model.peft_config["default"].num_deltas == {name: len(found) for name, found in expected.items()}


# ---- The parts ----


def test_best_anywhere_is_the_best_of_all():
    for _ in range(50):
        scores = [torch.randint(9, (n,)).double() * scale for n, scale in ((30, 1.0), (0, 1.0), (12, 3.0), (50, 0.1))]
        count = int(torch.randint(1, 92, ()))

        def offer(layer, n, scores=scores):
            positions = budget.largest(scores[layer], n).nonzero().squeeze(1)
            return positions, scores[layer][positions]

        found = budget.best_anywhere(offer, [score.numel() for score in scores], count)
        best = torch.cat(scores).sort(descending=True).values[:count]
        taken = torch.cat([score[positions] for score, positions in zip(scores, found)])
        assert torch.equal(taken.sort(descending=True).values, best)
        assert all(positions.unique().numel() == positions.numel() for positions in found)


def test_candidates_fit_into_24_bytes_per_trained_value():
    rooms = torch.randint(1000, 100000, (40,)).tolist()
    active = [int(room * share) for room, share in zip(rooms, torch.rand(40).pow(4).tolist())]
    active[3] = 0
    counts = budget.candidate_counts(active, rooms)
    assert 20 * sum(counts) <= 24 * sum(active)
    assert all(0 < count <= room for count, room in zip(counts, rooms))
    assert budget.candidate_counts([0, 10], [1, 10]) == [1, 10]


def test_the_graph_of_an_older_step_may_be_alive():
    """It holds on to the parameter's gradient accumulator, which remembers the size."""
    model, optimizer, selector = make()
    graphs, seen = [], [sizes(model)]
    for batch in random_batches(12):
        loss = loss_of(model, batch)
        graphs.append(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
        seen.append(sizes(model))
    assert any(one != seen[0] for one in seen)


# ---- What is refused ----


def test_refuses_what_cannot_work(base_model, data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="budget must be 'per_layer' or 'global', got 'local'"):
        SftConfig(budget="local")
    with pytest.raises(ValueError, match="granularity='row'; use budget='per_layer'"):
        SftConfig(budget="global", granularity="row")
    config = SftConfig(target_modules=list(LAYERS), density=0.2)
    model = SftModel(Net(), config, "default")
    optimizer = SftAdamW([param for param in model.parameters() if param.requires_grad])
    with pytest.raises(ValueError, match="first.sft_delta.default was made with budget='per_layer'"):
        SftSelector(model, optimizer, SftConfig(budget="global"), 9, 1)
    model, optimizer, selector = make()
    monkeypatch.setattr("peft.tuners.sft.selector.find_group", lambda *args: "two processes that share a batch")
    with pytest.raises(ValueError, match="changes the sizes of parameters .*DistributedDataParallel"):
        SftSelector(model, optimizer, selector.config, 9, 1)


def test_the_trainer_refuses_data_parallelism(base_model, data, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="there are 2 processes"):
        SftTrainer(Trainer)(model=adapt(base_model), args=args, train_dataset=data)


# Names of layers


def counts(model) -> dict[str, int]:
    return {name.rpartition(".sft_delta.")[0]: delta.values.numel() for _, name, delta in model.active_deltas()}


def nested() -> nn.Module:
    """With linear layers `lin`, `block.lin` and `a.block.lin`."""
    linears = [nn.Linear(6, 6) for _ in range(3)]
    blocks = {"block": nn.ModuleDict({"lin": linears[1]})}
    return nn.ModuleDict(
        {"lin": linears[0], **blocks, "a": nn.ModuleDict({"block": nn.ModuleDict({"lin": linears[2]})})}
    )


@pytest.mark.parametrize(
    "exact", [{"lin": 3}, {"block.lin": 2}, {"lin": 3, "a.block.lin": 5}, {"block.lin": 1, "lin": 7}], ids=" ".join
)
def test_num_deltas_are_whole_names(exact, tmp_path):
    """Also where other modules' names end like them, and after a round trip."""
    model = get_peft_model(nested(), SftConfig(num_deltas=exact))
    assert counts(model) == model.peft_config["default"].num_deltas == exact
    model.save_pretrained(tmp_path)
    assert counts(PeftModel.from_pretrained(nested(), tmp_path)) == exact


def test_num_deltas_beside_numbers_of_layers(tmp_path):
    def base() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList([nested(), nested()])})

    exact = {"layers.1.lin": 3}
    model = get_peft_model(base(), SftConfig(num_deltas=exact, layers_to_transform=1))
    assert counts(model) == exact
    model.save_pretrained(tmp_path)
    assert counts(PeftModel.from_pretrained(base(), tmp_path)) == exact
    with pytest.raises(ValueError, match=r"1 names are no targets \(\['layers.1.lin'\]\)"):
        get_peft_model(base(), SftConfig(num_deltas={**exact, "layers.0.lin": 1}, layers_to_transform=0))
    with pytest.raises(ValueError, match=r"1 names are no targets \(\['in'\]\)|not found in the base model"):
        get_peft_model(nested(), SftConfig(num_deltas={"in": 1}))
