"""SftSelector against plain simulations of the algorithm, with dictionaries, sorting and dense gradients."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from sft_runs import assert_same, snapshot
from torch import nn

from peft.tuners.sft.config import SftConfig
from peft.tuners.sft.model import SftModel
from peft.tuners.sft.optimizer import SftAdamW, SftSM3
from peft.tuners.sft.selector import SftSelector, largest, largest_products
from peft.utils.warning import PeftWarning

BETAS = (0.9, 0.99)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.second = nn.Linear(9, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def make(algorithm="rigl", total=30, accumulation=1, dtype=torch.float64, lr=0.05, **settings):
    """A fresh adapted model, its optimiser and its selector."""
    settings = {"reselection_steps": 6, "selection_accumulation_steps": 3, "density": 0.3, **settings}
    config = SftConfig(
        selection_algorithm=algorithm,
        target_modules=["first", "second"],
        dtype="auto",
        **settings,
    )
    model = SftModel(Net().to(dtype), config, "default")
    return (model, *drive(model, config, total, accumulation, lr))


def drive(model, config, total, accumulation=1, lr=0.05, completed=0, grad_scale=None):
    params = [param for param in model.parameters() if param.requires_grad]
    if config.selection_algorithm == "sm3":
        deltas = {delta.values: delta for _, _, delta in model.active_deltas()}
        optimizer = SftSM3(params, deltas, lr=lr, momentum=0.3)
    else:
        optimizer = SftAdamW(params, lr=lr, betas=BETAS)
    return optimizer, SftSelector(model, optimizer, config, total, accumulation, completed, grad_scale=grad_scale)


def random_batches(steps, accumulation=1, rows=8, dtype=torch.float64):
    """[update step][micro-batch] -> (inputs, targets)"""
    return [
        [(torch.randn(rows, 7, dtype=dtype), torch.randn(rows, 5, dtype=dtype)) for _ in range(accumulation)]
        for _ in range(steps)
    ]


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def train(model, optimizer, selector, batches, zero_first=True, clip=None):
    for micro_batches in batches:
        for batch in micro_batches:
            (loss_of(model, batch) / len(micro_batches)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if zero_first:
            optimizer.zero_grad()
        selector.step()
        if not zero_first:
            optimizer.zero_grad()


# ---- The whole algorithm ----


class Simulation:
    """Sparse fine-tuning of `Net` by the book: a dict per layer from position to value and optimiser state."""

    def __init__(self, model, config, total, lr, clip=None):
        self.net = copy.deepcopy(Net().to(torch.float64))
        for name in ("first", "second"):
            base = getattr(model.model, name).base_layer
            getattr(self.net, name).load_state_dict(base.state_dict())
        self.base = {name: getattr(self.net, name).weight.detach().clone() for name in ("first", "second")}
        self.config, self.total, self.lr, self.clip, self.t = config, total, lr, clip, 0
        self.is_clear = True  # no choice has hung on how the gathered gradients, which are float32, were rounded
        self.active = {}
        self.gathered = {name: None for name in self.base}
        self.covers = {name: (torch.zeros(w.shape[0]), torch.zeros(w.shape[1])) for name, w in self.base.items()}
        for name in self.base:
            indices = getattr(model.model, name).sft_delta["default"].indices.tolist()
            self.active[name] = {i: {"value": 0.0, "m": 0.0, "v": 0.0, "age": 1} for i in indices}

    def gradients(self, batch, parts):
        with torch.no_grad():
            for name, weight in self.base.items():
                effective = weight.clone()
                for position, entry in self.active[name].items():
                    effective.view(-1)[position] += entry["value"]
                getattr(self.net, name).weight.copy_(effective)
        self.net.zero_grad()
        (loss_of(self.net, batch) / parts).backward()
        return {name: getattr(self.net, name).weight.grad.flatten().clone() for name in self.base}

    def step(self, micro_batches):
        gathering = (
            self.config.selection_algorithm == "rigl"
            and self.t % self.config.reselection_steps < self.config.selection_accumulation_steps
        )
        summed = {name: torch.zeros(w.numel(), dtype=torch.float64) for name, w in self.base.items()}
        rounded = {name: torch.zeros(w.numel()) for name, w in self.base.items()}  # gradients are gathered in float32
        for batch in micro_batches:
            for name, grad in self.gradients(batch, len(micro_batches)).items():
                if gathering and self.gathered[name] is None:
                    candidates = grad.abs().topk(len(self.active[name])).indices.tolist()
                    self.gathered[name] = {c: [] for c in candidates}
                summed[name] += grad
                rounded[name] += grad.float()
        factor = 1.0
        if self.clip is not None:
            trained = [grad[position].item() for name, grad in summed.items() for position in self.active[name]]
            factor = min(1.0, self.clip / (math.hypot(*trained) + 1e-6))
        for name, grad in summed.items():
            if gathering:
                for candidate, seen in self.gathered[name].items():
                    seen.append((rounded[name][candidate] * factor).numpy()[()])  # so that the sum is in float32 too
            self.update(name, grad * factor)
        self.t += 1
        phase = self.t % self.config.reselection_steps
        if phase == self.config.selection_accumulation_steps and self.t <= self.total:
            for name in self.base:
                self.reselect(name)

    def update(self, name, grad):
        if self.config.selection_algorithm == "sm3":
            return self.update_sm3(name, grad)
        for position, e in self.active[name].items():
            g, n = grad[position].item(), e["age"]
            e["m"] = BETAS[0] * e["m"] + (1 - BETAS[0]) * g
            e["v"] = BETAS[1] * e["v"] + (1 - BETAS[1]) * g * g
            denominator = (math.sqrt(e["v"]) + 1e-6) / math.sqrt(1 - BETAS[1] ** n)
            e["value"] -= self.lr * e["m"] / (1 - BETAS[0] ** n) / denominator
            e["age"] += 1

    def update_sm3(self, name, grad):
        rows, columns = (cover.clone() for cover in self.covers[name])
        for position, e in self.active[name].items():
            i, j = divmod(position, len(columns))
            g = grad[position].item()
            nu = min(self.covers[name][0][i].item(), self.covers[name][1][j].item()) + g * g
            rows[i], columns[j] = max(rows[i].item(), nu), max(columns[j].item(), nu)
            e["m"] = 0.3 * e["m"] + 0.7 * g / math.sqrt(nu + 1e-8)
            e["value"] -= self.lr * e["m"]
        self.covers[name] = (rows, columns)

    def share(self):
        rate, progress = self.config.initial_reselection_rate, self.t / self.total
        if self.config.reselection_rate_policy == "cosine":
            return rate * (1 + math.cos(math.pi * progress)) / 2
        return 1.0 if self.t == self.config.selection_accumulation_steps else rate * (1 - progress)

    def reselect(self, name):
        active = self.active[name]
        m = math.floor(len(active) * self.share())
        by_size = sorted(active, key=lambda position: (abs(active[position]["value"]), position))
        dropped = by_size[:m]
        if self.config.selection_algorithm == "sm3":
            rows, columns = self.covers[name]
            rows, columns = rows.tolist(), columns.tolist()
            promise = {i: rows[i // len(columns)] * columns[i % len(columns)] for i in self.inactive(name)}
        else:
            seen = self.gathered[name]
            promise = {c: abs(float(sum(seen[c]))) for c in seen if c not in active or c in dropped}
        grown = sorted(promise, key=lambda position: (-promise[position], position))[:m]
        self.is_clear &= told_apart(abs(entry["value"]) for entry in active.values()) and told_apart(promise.values())
        new = [position for position in grown if position not in active]
        for position in [position for position in dropped if position not in grown][: len(new)]:
            del active[position]
        for position in new:
            entry = active[position] = {"value": 0.0, "m": 0.0, "v": 0.0, "age": 1}
            if self.config.selection_algorithm == "rigl":
                n = len(seen[position])
                entry["m"] = float(sum(seen[position])) / n * (1 - BETAS[0] ** n)
                entry["v"] = float(sum(g * g for g in seen[position])) / n * (1 - BETAS[1] ** n)
                entry["age"] = n + 1
        self.gathered[name] = None

    def inactive(self, name):
        return [i for i in range(self.base[name].numel()) if i not in self.active[name]]


def told_apart(numbers) -> bool:
    """None of them is nearly another one."""
    ordered = sorted(numbers)
    return all(low == high or high - low > 1e-6 * ordered[-1] for low, high in zip(ordered, ordered[1:]))


@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
@pytest.mark.parametrize("policy", ["linear", "cosine"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_the_simulation(algorithm, policy, accumulation, density, clip):
    """Of runs that can be told: of two numbers that rounding puts in order, either may be the larger one."""
    assert any(equals_the_simulation(algorithm, policy, accumulation, density, clip) for _ in range(20))


def equals_the_simulation(algorithm, policy, accumulation, density, clip) -> bool:
    """False: the draw says nothing. An assertion fails if it says that they are not equal."""
    total = 22
    model, optimizer, selector = make(
        algorithm,
        total,
        accumulation,
        density=density,
        reselection_rate_policy=policy,
        initial_reselection_rate=0.6,
        reselection_steps=7,
        selection_accumulation_steps=4,
    )
    simulation = Simulation(model, selector.config, total, 0.05, clip)
    for number, micro_batches in enumerate(random_batches(total, accumulation)):
        train(model, optimizer, selector, [micro_batches], zero_first=number % 2 == 0, clip=clip)
        simulation.step(micro_batches)
        if not simulation.is_clear:
            return False
        for name in ("first", "second"):
            delta = getattr(model.model, name).sft_delta["default"]
            expected = simulation.active[name]
            assert delta.indices.tolist() == sorted(expected), f"after update step {number + 1}"
            entries = [expected[position] for position in sorted(expected)]
            compare(delta.values.detach(), entries, "value")
            state = optimizer.state[delta.values]
            if algorithm == "rigl":
                for key, entry in (("exp_avg", "m"), ("exp_avg_sq", "v"), ("age", "age")):
                    compare(state[key], entries, entry)
            else:
                compare(state["momentum_buffer"], entries, "m")
    assert sum(entry["moved"] for entry in selector.history) > 3
    return True


def compare(tensor, entries, key):
    expected = torch.tensor([entry[key] for entry in entries], dtype=torch.float64)
    # The gathered gradients are float32.
    torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)


# ---- Schedule and statistics ----


@pytest.mark.parametrize("total, expected", [(20, [3, 9, 15]), (15, [3, 9]), (14, [3, 9])])
def test_windows_and_reselections(total, expected):
    # 15 of 15: the linear share has reached 0, so there is nothing to gather for either.
    model, optimizer, selector = make(total=total)
    gathering = []
    for step, micro_batches in enumerate(random_batches(total + 12), start=1):
        if next(iter(selector.deltas.values())).is_gathering:
            gathering.append(step)
        train(model, optimizer, selector, [micro_batches])
    assert [entry["step"] for entry in selector.history] == expected
    assert gathering == [step for last in expected for step in range(last - 2, last + 1)]
    shares = [1.0] + [0.2 * (1 - step / total) for step in expected[1:]]
    assert [entry["share"] for entry in selector.history] == pytest.approx(shares)


def test_reports_what_moved():
    model, optimizer, selector = make()
    before = {name: set(delta.indices.tolist()) for name, delta in selector.deltas.items()}
    train(model, optimizer, selector, random_batches(3))
    for entry in selector.last_report:
        delta = selector.deltas[entry["name"]]
        assert entry["moved"] == len(set(delta.indices.tolist()) - before[entry["name"]]) > 0
        assert entry["total"] == delta.indices.numel()
    moved, total = (sum(entry[key] for entry in selector.last_report) for key in ("moved", "total"))
    layers = {entry["name"]: entry["moved"] for entry in selector.last_report}
    assert selector.history == [{"step": 3, "share": 1.0, "moved": moved, "total": total, "layers": layers}]


def test_micro_batches_give_what_one_batch_gives():
    model, optimizer, selector = make()
    batches = random_batches(2, accumulation=4)
    twin = copy.deepcopy(model)
    other_optimizer, other = drive(twin, selector.config, 30)
    train(model, optimizer, selector, batches[:1])
    train(twin, other_optimizer, other, batches[:1])
    # Same candidates from here on.
    whole = [(torch.cat([x for x, _ in batches[1]]), torch.cat([y for _, y in batches[1]]))]
    train(model, optimizer, selector, batches[1:])
    train(twin, other_optimizer, other, [whole])
    ours, theirs = selector.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) == 9
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)  # in float32, and may cancel


def test_active_candidates_have_the_gradient_that_the_optimizer_sees():
    model, optimizer, selector = make(density=1.0, num_tunable_weights=7 * 9 + 9 * 5)
    for micro_batches in random_batches(2, accumulation=3):
        for batch in micro_batches:
            (loss_of(model, batch) / 3).backward()
        seen = {name: delta.values.grad.clone() for name, delta in selector.deltas.items()}
        optimizer.step()
        before = {key: value.clone() for key, value in selector.state_dict().items()}
        selector.step()
        after = selector.state_dict()
        for name, grad in seen.items():
            added = after[f"{name}.total"] - before.get(f"{name}.total", 0.0)
            torch.testing.assert_close(added.double(), grad, rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()


def test_an_unused_layer_is_left_alone():
    model, optimizer, selector = make()
    delta = selector.deltas["second.sft_delta.default"]
    before = delta.indices.clone()
    for _ in range(3):
        model.model.first(torch.randn(4, 7, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
    moved = {entry["name"]: entry["moved"] for entry in selector.last_report}
    assert moved["second.sft_delta.default"] == 0 and moved["first.sft_delta.default"] > 0
    assert torch.equal(delta.indices, before)


# ---- Clipped, scaled and overflowing gradients ----


def test_clipping_is_what_a_smaller_loss_is():
    model, optimizer, selector = make()
    twin = copy.deepcopy(model)
    other_optimizer, other = drive(twin, selector.config, 30)
    factors = []
    for number, micro_batches in enumerate(random_batches(12, accumulation=2)):
        weight = 1 + number % 3  # so that the factors differ
        for batch in micro_batches:
            (weight * loss_of(model, batch) / 2).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        factors.append(0.05 / (norm.item() + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
        for batch in micro_batches:
            (factors[-1] * weight * loss_of(twin, batch) / 2).backward()
        other_optimizer.step()
        other_optimizer.zero_grad()
        other.step()
    assert max(factors) < 0.7 and max(factors) > 1.2 * min(factors)
    assert selector.history == other.history and len(other.history) == 2
    ours, theirs = snapshot(model, optimizer), snapshot(twin, other_optimizer)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-8)


def test_what_nobody_changes_is_gathered_bit_for_bit():
    model, optimizer, selector = make(dtype=torch.float32)
    (micro_batches,) = random_batches(1, accumulation=3, dtype=torch.float32)
    for batch in micro_batches:
        loss_of(model, batch).backward()
    gathered = {name: delta.candidate_grad for name, delta in selector.deltas.items()}
    optimizer.step()
    selector.step()
    for name, gradient in gathered.items():
        assert torch.equal(selector.state_dict()[f"{name}.total"], gradient)


def test_clipping_by_value_counts_with_its_mean_effect():
    model, optimizer, selector = make()
    loss_of(model, random_batches(1)[0][0]).backward()
    gathered = {name: delta.candidate_grad for name, delta in selector.deltas.items()}
    before = sum(delta.values.grad.abs().sum().item() for delta in selector.deltas.values())
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    after = sum(delta.values.grad.abs().sum().item() for delta in selector.deltas.values())
    optimizer.step()
    optimizer.zero_grad()
    selector.step()
    assert after < 0.7 * before
    for name, gradient in gathered.items():
        torch.testing.assert_close(selector.state_dict()[f"{name}.total"], gradient * (after / before))


@pytest.mark.parametrize("scaled", [False, True])
def test_trained_values_without_gradients_tell_no_scale(scaled):
    model, _, selector = make(num_deltas={"first": 9, "second": 5})
    selector.close()
    for _, _, delta in model.active_deltas():
        delta.choose(torch.arange(delta.shape[0]) * delta.shape[1])  # the first column of each weight
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    optimizer, selector = drive(model, selector.config, 30, grad_scale=scaler.get_scale)
    x = torch.randn(8, 7, dtype=torch.float64)
    x[:, 0] = 0.0
    inner = model.model.first.base_layer
    with torch.no_grad():
        inner.weight[0], inner.bias[0] = 0.0, 0.0  # its output is tanh(0)
    scaler.scale(model(x).square().mean()).backward()
    gathered = {name: delta.candidate_grad for name, delta in selector.deltas.items()}
    assert all(not delta.values.grad.any() for delta in selector.deltas.values())
    scaler.step(optimizer)
    selector.step()
    for name, gradient in gathered.items():
        assert gradient.any()
        assert torch.equal(selector.state_dict()[f"{name}.total"], gradient / (4.0 if scaled else 1.0))


def train_scaled(model, optimizer, selector, scaler, batches, overflow=()):
    for number, (batch,) in enumerate(batches):
        scaler.scale(loss_of(model, batch)).backward()
        if number in overflow:
            delta = next(iter(selector.deltas.values()))
            delta.values.grad[0] = math.inf
            delta.candidate_grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        selector.step()


def test_grad_scaler_changes_nothing():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)  # doubles after every step
    model, optimizer, selector = make()
    twin = copy.deepcopy(model)
    other_optimizer, other = drive(twin, selector.config, 30)
    batches = random_batches(16)
    train(model, optimizer, selector, batches)
    train_scaled(twin, other_optimizer, other, scaler, batches)
    assert len(other.history) == 3
    ours, theirs = snapshot(model, optimizer), snapshot(twin, other_optimizer)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-12, atol=0.0)


def test_an_optimizer_wrapped_by_accelerate():
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import GradientState

    GradientState._reset_state()  # a Trainer that was stopped between micro-batches has left that no step is due
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    model, optimizer, selector = make()
    twin = copy.deepcopy(model)
    other_optimizer = SftAdamW([p for p in twin.parameters() if p.requires_grad], lr=0.05, betas=BETAS)
    wrapped = AcceleratedOptimizer(other_optimizer, scaler=scaler)
    other = SftSelector(twin, wrapped, selector.config, 30, 1)
    batches = random_batches(8)
    train(model, optimizer, selector, batches)
    for (batch,) in batches:
        scaler.scale(loss_of(twin, batch)).backward()
        wrapped.step()
        wrapped.zero_grad()
        other.step()
    ours, theirs = snapshot(model, optimizer), snapshot(twin, other_optimizer)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-12, atol=0.0)


def test_an_update_that_overflows_does_not_count():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, optimizer, selector = make()
    batches = random_batches(3)
    train_scaled(model, optimizer, selector, scaler, batches[:1], overflow=[0])
    assert selector.completed_steps == 1 and selector.discarded_updates == 1
    # Candidates that were chosen by an overflow are chosen again.
    assert selector.state_dict().keys() == {"completed_steps"}
    train_scaled(model, optimizer, selector, scaler, batches[1:2])
    state = selector.state_dict()
    name = next(iter(selector.deltas))
    train_scaled(model, optimizer, selector, scaler, batches[2:], overflow=[0])
    assert state[f"{name}.updates"] == 1 and selector.discarded_updates == 2
    for name, delta in selector.deltas.items():
        # Seeded from the one update step that counted.
        position = {int(c): n for n, c in enumerate(state[f"{name}.candidates"])}
        grown = [n for n, i in enumerate(delta.indices.tolist()) if optimizer.state[delta.values]["age"][n] == 2.0]
        fresh = [n for n in grown if delta.values[n] == 0.0]
        assert fresh
        mean = state[f"{name}.total"][[position[delta.indices[n].item()] for n in fresh]]
        expected = mean.double() * (1 - BETAS[0])
        torch.testing.assert_close(optimizer.state[delta.values]["exp_avg"][fresh], expected, rtol=1e-6, atol=0.0)


def test_a_window_without_optimizer_steps_is_reported():
    model, optimizer, selector = make()
    before = snapshot(model, optimizer)
    with pytest.warns(PeftWarning, match=r"No position was reselected after update step 3: the optimizer took no step"):
        for (batch,) in random_batches(3):
            loss_of(model, batch).backward()
            selector.step()
    for _, name, delta in model.active_deltas():
        assert torch.equal(delta.indices, before[f"{name}.indices"])


# ---- Stopping and resuming ----


@pytest.mark.parametrize("stop", [0, 2, 3, 6, 8, 9, 11])
@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_resuming_is_exact(algorithm, stop, tmp_path):
    model, optimizer, selector = make(algorithm, total=20, dtype=torch.float32)
    batches = random_batches(20, accumulation=2, dtype=torch.float32)
    train(model, optimizer, selector, batches[:stop], clip=0.05)
    twin = copy.deepcopy(model)
    for _, _, delta in twin.active_deltas():
        delta.stop_gathering()  # a model that has been loaded does not gather
    other_optimizer, other = drive(twin, selector.config, 20, accumulation=2)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    save_file(selector.state_dict(), tmp_path / "selector.safetensors")
    other.load_state_dict(load_file(tmp_path / "selector.safetensors"))
    assert other.completed_steps == stop
    train(model, optimizer, selector, batches[stop:], clip=0.05)
    train(twin, other_optimizer, other, batches[stop:], clip=0.05)
    assert_same(snapshot(model, optimizer), snapshot(twin, other_optimizer))
    assert selector.last_report == other.last_report


def test_completed_steps_open_the_window_that_is_due():
    model, _, selector = make()
    selector.close()
    for completed, gathers in ((0, True), (2, True), (3, False), (5, False), (6, True), (9, False)):
        _, late = drive(model, selector.config, 30, completed=completed)
        assert {delta.is_gathering for delta in late.deltas.values()} == {gathers}
        late.close()
    assert not any(delta.is_gathering for delta in selector.deltas.values())


def test_a_closed_selector_leaves_the_optimizer():
    model, optimizer, selector = make()
    selector.close()
    train(model, optimizer, SftSelector(model, optimizer, selector.config, 30, 1), random_batches(1))
    assert selector._taken is None
    assert selector.state_dict().keys() == {"completed_steps"}


def test_load_refuses_what_does_not_fit():
    model, optimizer, selector = make()
    train(model, optimizer, selector, random_batches(1))
    state = selector.state_dict()
    with pytest.raises(ValueError, match="'completed_steps' is missing"):
        selector.load_state_dict({})
    with pytest.raises(ValueError, match=r"1 deltas that this model has not, such as \['third'\]"):
        selector.load_state_dict({**state, "third.total": torch.zeros(3)})
    name = next(iter(selector.deltas))
    with pytest.raises(ValueError, match=f"lacks total, updates of {name}"):
        lacking = (f"{name}.total", f"{name}.updates")
        selector.load_state_dict({key: tensor for key, tensor in state.items() if key not in lacking})
    with pytest.raises(ValueError, match=rf"{name}.squares has shape \(2,\), but the delta"):
        selector.load_state_dict({**state, f"{name}.squares": torch.zeros(2)})
    with pytest.raises(ValueError, match="reselection_steps=6, selection_accumulation_steps=3, total_update_steps=30"):
        selector.load_state_dict({**state, "completed_steps": torch.tensor(4)})


def test_a_run_may_go_on_under_another_schedule():
    """From the step of the state on; a window of gradients that the new schedule has no use for is refused (above)."""
    model, optimizer, selector = make()
    train(model, optimizer, selector, random_batches(4))
    config = SftConfig(target_modules=["first", "second"], reselection_steps=4, selection_accumulation_steps=1)
    selector.close()
    other_optimizer, other = drive(model, config, 14)
    other.load_state_dict(selector.state_dict())
    train(model, other_optimizer, other, random_batches(10))
    assert [entry["step"] for entry in selector.history] == [3]
    assert [entry["step"] for entry in other.history] == [5, 9, 13]
    assert [entry["share"] for entry in other.history] == pytest.approx([0.2 * (1 - t / 14) for t in (5, 9, 13)])


# ---- Refusals ----


def test_refuses_the_wrong_optimizer():
    model, optimizer, selector = make()
    params = [param for param in model.parameters() if param.requires_grad]
    with pytest.raises(TypeError, match="selection_algorithm='rigl' needs the optimizer SftAdamW, got AdamW"):
        SftSelector(model, torch.optim.AdamW(params), selector.config, 30, 1)
    with pytest.raises(ValueError, match="second.sft_delta.default.values is not among the parameters"):
        SftSelector(model, SftAdamW(params[:1]), selector.config, 30, 1)
    config = SftConfig(selection_algorithm="sm3", target_modules=["first"])
    with pytest.raises(TypeError, match="selection_algorithm='sm3' needs the optimizer SftSM3, got SftAdamW"):
        SftSelector(model, optimizer, config, 30, 1)
    deltas = {delta.values: delta for delta in selector.deltas.values()}
    with pytest.raises(ValueError, match="row_cover_only=True"):
        SftSelector(model, SftSM3(params, deltas, row_cover_only=True), config, 30, 1)
    with pytest.raises(ValueError, match="first.sft_delta.default is not in the `deltas`"):
        SftSelector(model, SftSM3(params, {}), config, 30, 1)


def test_refuses_models_without_deltas_and_bad_counts():
    model, optimizer, selector = make()
    with pytest.raises(ValueError, match="Net has no active SFT adapter"):
        SftSelector(Net(), optimizer, selector.config, 30, 1)
    for name, arguments in (
        ("total_update_steps must be at least 1, got 0", (0, 1)),
        ("grad_accumulation_steps must be at least 1, got 0", (30, 0)),
        ("completed_steps must be at least 0, got -1", (30, 1, -1)),
    ):
        with pytest.raises(ValueError, match=name):
            SftSelector(model, optimizer, selector.config, *arguments)


def test_refuses_a_configuration_of_another_adapter():
    model, optimizer, selector = make()
    made = selector.config
    for fields, text in (
        ({"density": 0.125}, "density=0.125, but the adapter was made with"),
        ({"num_tunable_weights": 3}, "num_tunable_weights=3, but"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16', but the adapter was made with 'auto'"),
        ({"granularity": "row"}, "granularity='row', but the adapter was made with 'element'"),
    ):
        with pytest.raises(ValueError, match=f"sft_config has {text}"):
            SftSelector(model, optimizer, SftConfig(**fields), 30, 1)
    again = SftConfig(num_tunable_weights=made.num_tunable_weights, reselection_steps=7)  # another schedule
    assert SftSelector(model, optimizer, again, 30, 1).config is again


def test_is_neither_copied_nor_pickled():
    _, _, selector = make()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make one for their copies"):
            attempt(selector)


# ---- Ranking ----


def test_largest_takes_the_first_of_equal_scores():
    for _ in range(50):
        scores = torch.randint(4, (12,)).float()
        count = int(torch.randint(13, ()))
        order = sorted(range(12), key=lambda n: (-scores[n].item(), n))[:count]
        assert largest(scores, count).nonzero().squeeze(1).tolist() == sorted(order)


def brute_force_products(rows, columns, active, count):
    products = (rows.double()[:, None] * columns.double()).flatten()
    inactive = sorted(set(range(products.numel())) - set(active.tolist()))
    return sorted(sorted(inactive, key=lambda n: (-products[n].item(), n))[:count])


@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "equal", "wide"])
@pytest.mark.parametrize("shape", [(1, 13), (13, 1), (1, 1), (9, 14), (20, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_products_equal_brute_force(kind, shape, dtype):
    numel = math.prod(shape)
    for _ in range(8):
        rows, columns = (torch.rand(size, dtype=dtype) for size in shape)
        if kind == "ties":
            rows, columns = (rows * 4).floor() + 1, (columns * 4).floor() + 1
        elif kind == "zeros":
            rows, columns = rows * (torch.rand(shape[0]) < 0.3), columns * (torch.rand(shape[1]) < 0.3)
        elif kind == "equal":
            rows, columns = torch.ones_like(rows), torch.ones_like(columns)
        elif kind == "wide":  # down to subnormal numbers
            rows, columns = (10 ** (-44 * factor) for factor in (rows, columns))
        active = torch.randperm(numel)[: torch.randint(numel + 1, ())].sort().values
        for count in {0, 1, (numel - len(active)) // 2, numel - len(active)}:
            if count <= numel - len(active):
                found = largest_products(rows, columns, active, count)
                assert found.tolist() == brute_force_products(rows, columns, active, count)


def test_largest_products_never_lists_the_matrix():
    """2**36 products: nothing of that size would fit."""
    size = 2**18
    rows, columns = torch.rand(size), torch.rand(size)
    active = torch.randint(size * size, (1000,)).unique()
    active = active[rows[active // size] * columns[active % size] < 0.9]  # far from the best 500, which are above 0.99
    found = largest_products(rows, columns, active, 500)
    assert len(found.unique()) == 500 and not torch.isin(found, active).any()
    best_rows, best_columns = rows.topk(2000), columns.topk(2000)
    products = (best_rows.values.double()[:, None] * best_columns.values.double()).flatten()
    expected = products.topk(500).values  # the best 500 have factors among the best 500
    product = rows.double()[found // size] * columns.double()[found % size]
    torch.testing.assert_close(product.sort(descending=True).values, expected, rtol=0, atol=0)
    zeros = largest_products(torch.zeros(size), torch.zeros(size), active, 500)
    first = torch.arange(500 + len(active))
    assert torch.equal(zeros, first[~torch.isin(first, active)][:500])


def test_nothing_is_warned_about_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for algorithm in ("rigl", "sm3"):
            model, optimizer, selector = make(algorithm)
            train(model, optimizer, selector, random_batches(12))
