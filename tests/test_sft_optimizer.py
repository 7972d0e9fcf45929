"""SftAdamW and SftSM3 against float64 references, on fresh random numbers."""

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peft.tuners.sft import optimizer as optimizer_module
from peft.tuners.sft.optimizer import SftAdamW, SftSM3

SHAPES = [(7,), (3, 5), (2, 3, 4), (), (2, 3, 2, 2)]


def random_params(dtype=torch.float64, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def run(optimizer, params, grads):
    """Step once per entry of `grads`, a list of one gradient per parameter each; None stands for no gradient."""
    for step_grads in grads:
        for param, grad in zip(params, step_grads):
            param.grad = None if grad is None else grad.to(param.dtype)
        optimizer.step()


def random_grads(params, steps):
    return [[torch.randn(param.shape, dtype=torch.float64) for param in params] for _ in range(steps)]


def adamw_reference(start, grads, lr, betas, eps, weight_decay):
    """The formula, element by element in numpy; `None` gradients leave an element's age alone."""
    p, m, v, age = start.copy(), np.zeros_like(start), np.zeros_like(start), 1
    for g in grads:
        if g is None:
            continue
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p * (1 - lr * weight_decay)
        p = p - lr * m / (1 - betas[0] ** age) / ((np.sqrt(v) + eps) / math.sqrt(1 - betas[1] ** age))
        age += 1
    return p, m, v, age


class TestAdamW:
    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.8, 0.0)])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.3])
    def test_equals_the_formula(self, betas, weight_decay):
        params = random_params()
        start = [param.detach().numpy().copy() for param in params]
        grads = random_grads(params, steps=6)
        grads[2][1] = None
        optimizer = SftAdamW(params, lr=0.03, betas=betas, eps=1e-4, weight_decay=weight_decay)
        run(optimizer, params, grads)
        for i, param in enumerate(params):
            own = [None if step[i] is None else step[i].numpy() for step in grads]
            p, m, v, age = adamw_reference(start[i], own, 0.03, betas, 1e-4, weight_decay)
            np.testing.assert_allclose(param.detach().numpy(), p, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(optimizer.state[param]["exp_avg"], m, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(optimizer.state[param]["exp_avg_sq"], v, rtol=1e-12, atol=1e-14)
            assert (optimizer.state[param]["age"] == age).all()

    def test_equals_torch_where_every_age_is_the_same(self):
        params, grads = random_params(), None
        others = [torch.nn.Parameter(param.detach().clone()) for param in params]
        grads = random_grads(params, steps=5)
        run(SftAdamW(params, lr=0.01, eps=0.0, weight_decay=0.1), params, grads)
        run(torch.optim.AdamW(others, lr=0.01, eps=0.0, weight_decay=0.1), others, grads)
        for ours, theirs in zip(params, others):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)

    def test_groups_have_their_own_hyperparameters(self):
        params = random_params(shapes=[(4,), (4,)])
        start = [param.detach().numpy().copy() for param in params]
        grads = random_grads(params, steps=3)
        groups = [{"params": params[:1], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": params[1:], "weight_decay": 0.2}]
        run(SftAdamW(groups, lr=0.01), params, grads)
        for i, (lr, betas, decay) in enumerate([(0.1, (0.5, 0.6), 0.0), (0.01, (0.9, 0.999), 0.2)]):
            p = adamw_reference(start[i], [step[i].numpy() for step in grads], lr, betas, 1e-6, decay)[0]
            np.testing.assert_allclose(params[i].detach().numpy(), p, rtol=1e-12, atol=1e-14)

    def test_float32_bias_correction_has_float32_accuracy(self):
        # 1 - 0.999**age loses four of seven digits when computed as it is written.
        param = torch.nn.Parameter(torch.zeros(50))
        grad = torch.randn(50)
        optimizer = SftAdamW([param], lr=1.0, eps=0.0)
        run(optimizer, [param], [[grad]])
        torch.testing.assert_close(param.detach(), -grad.sign(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16])
    def test_bfloat16_parameters(self, momentum_dtype):
        (param,) = random_params(torch.bfloat16, [(200,)])
        start = param.detach().double().numpy()
        grads = [[g[0].bfloat16().double()] for g in random_grads([param], steps=3)]
        optimizer = SftAdamW([param], lr=0.01, momentum_dtype=momentum_dtype)
        run(optimizer, [param], grads)
        p, m = adamw_reference(start, [g[0].numpy() for g in grads], 0.01, (0.9, 0.999), 1e-6, 0.0)[:2]
        state = optimizer.state[param]
        assert state["age"].dtype == torch.float32
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (momentum_dtype or torch.bfloat16)
        assert param.dtype == torch.bfloat16
        precise = 1e-6 if momentum_dtype == torch.float32 else 2**-6
        np.testing.assert_allclose(state["exp_avg"].double(), m, rtol=precise, atol=precise * np.abs(m).max())
        np.testing.assert_allclose(param.detach().double(), p, rtol=2**-6, atol=2**-7)

    def test_chunks_change_nothing(self, monkeypatch):
        params = random_params()
        others = copy.deepcopy(params)
        grads = random_grads(params, steps=3)
        run(SftAdamW(params, lr=0.1), params, grads)
        monkeypatch.setattr(optimizer_module, "CHUNK_ELEMENTS", 10)
        run(SftAdamW(others, lr=0.1), others, grads)
        assert all(torch.equal(a, b) for a, b in zip(params, others))

    def test_reload_is_exact_and_keeps_dtypes(self):
        params = random_params(torch.bfloat16, [(9,), (2, 3)])
        optimizer = SftAdamW(params, lr=0.01, momentum_dtype=torch.float32)
        run(optimizer, params, random_grads(params, steps=2))
        optimizer.state[params[0]]["age"].fill_(301.0)
        saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
        copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = SftAdamW(copies, lr=0.5, momentum_dtype=torch.float32)
        resumed.load_state_dict(saved)
        assert resumed.state[copies[0]]["age"].dtype == torch.float32
        assert (resumed.state[copies[0]]["age"] == 301.0).all()
        assert resumed.param_groups[0]["lr"] == 0.01
        grads = random_grads(params, steps=2)
        run(optimizer, params, grads)
        run(resumed, copies, grads)
        for ours, theirs in zip(params, copies):
            assert torch.equal(ours, theirs)
            for name in ("age", "exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[ours][name], resumed.state[theirs][name])

    def test_refuses_the_state_of_another_optimizer(self):
        params = random_params()
        other = torch.optim.AdamW(params)
        run(other, params, random_grads(params, steps=1))
        with pytest.raises(ValueError, match="SftAdamW cannot load this state: it holds step"):
            SftAdamW(params).load_state_dict(other.state_dict())

    def test_closure(self):
        param = torch.nn.Parameter(torch.tensor([3.0]))
        optimizer = SftAdamW([param], lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 9.0
        assert param.item() == pytest.approx(2.9, abs=1e-5)

    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
    @pytest.mark.parametrize("count", [1, 5])
    def test_seeded_moments_are_unbiased_at_the_next_step(self, betas, count):
        """Mean and mean square, then a gradient that equals them: the corrected moments must be exactly these."""
        (param,) = random_params(shapes=[(6,)])
        optimizer = SftAdamW([param], betas=betas)
        run(optimizer, [param], random_grads([param], steps=4))
        slots = torch.tensor([1, 4])
        mean = torch.randn(2, dtype=torch.float64)
        optimizer.seed_elements(param, slots, mean, mean.square(), count)
        state = optimizer.state[param]
        assert state["age"].tolist() == [5.0, count + 1.0, 5.0, 5.0, count + 1.0, 5.0]
        age = state["age"][slots].clone()
        grad = torch.zeros(6, dtype=torch.float64)
        grad[slots] = mean
        run(optimizer, [param], [[grad]])
        corrected = [state[key][slots] / (1 - beta**age) for key, beta in zip(("exp_avg", "exp_avg_sq"), betas)]
        torch.testing.assert_close(corrected[0], mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(corrected[1], mean.square(), rtol=1e-12, atol=0)

    def test_seeding_before_the_first_step(self):
        (param,) = random_params(shapes=[(3,)])
        optimizer = SftAdamW([param], betas=(0.5, 0.5))
        optimizer.seed_elements(param, torch.tensor([2]), torch.tensor([8.0]), torch.tensor([16.0]), 2)
        state = optimizer.state[param]
        assert state["age"].tolist() == [1, 1, 3]
        assert state["exp_avg"].tolist() == [0, 0, 6]
        assert state["exp_avg_sq"].tolist() == [0, 0, 12]

    def test_permutation_moves_the_state(self):
        (param,) = random_params(shapes=[(8,)])
        optimizer = SftAdamW([param])
        run(optimizer, [param], random_grads([param], steps=1))
        before = {name: value.clone() for name, value in optimizer.state[param].items()}
        permutation = torch.randperm(8)
        optimizer.move_slots(param, permutation)
        for name, value in optimizer.state[param].items():
            assert torch.equal(value, before[name][permutation])

    @pytest.mark.parametrize(
        "setting, message",
        [
            ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
            ({"lr": math.nan}, "lr must be finite"),
            ({"eps": -1e-9}, "eps must be finite and not negative"),
            ({"weight_decay": math.inf}, "weight_decay must be finite"),
            ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
            ({"momentum_dtype": torch.int32}, "momentum_dtype must be a floating-point dtype or None, got torch.int32"),
        ],
    )
    def test_refuses(self, setting, message):
        with pytest.raises(ValueError, match=message):
            SftAdamW(random_params(), **setting)

    def test_refuses_in_a_group(self):
        with pytest.raises(ValueError, match="lr must be finite and not negative, got -2"):
            SftAdamW([{"params": random_params(), "lr": -2}])

    def test_refuses_sparse_gradients(self):
        param = torch.nn.Parameter(torch.zeros(3))
        param.grad = torch.ones(3).to_sparse()
        with pytest.raises(ValueError, match="dense real gradients"):
            SftAdamW([param]).step()


def sm3_reference(param, grads, lr, momentum, weight_decay, eps, row_cover_only=False, positions=None):
    """SM3 by loops over elements. `positions`: list of (i, j) of the trained elements; None: all, in N dimensions."""
    p, m = param.copy(), np.zeros_like(param)
    if positions is None:
        positions = list(np.ndindex(param.shape))
        elements = positions
    else:
        elements = [(n,) for n in range(len(positions))]
    dims = 1 if row_cover_only else max(1, len(positions[0]))
    covers = [{} for _ in range(dims)]
    for g in grads:
        raised = [{} for _ in range(dims)]
        for element, position in zip(elements, positions):
            place = position or (0,)
            nu = min(covers[d].get(place[d], 0.0) for d in range(dims)) + g[element] ** 2
            for d in range(dims):
                raised[d][place[d]] = max(raised[d].get(place[d], 0.0), nu)
            m[element] = momentum * m[element] + (1 - momentum) * g[element] / math.sqrt(nu + eps)
            p[element] = p[element] * (1 - lr * weight_decay) - lr * m[element]
        for cover, new in zip(covers, raised):
            for place, nu in new.items():
                cover[place] = max(cover.get(place, 0.0), nu)
    return p, covers


def random_delta(shape, k, dtype=torch.float64, index_dtype=torch.int64):
    """What SftSM3 needs to know of a sparse delta."""
    numel = math.prod(shape)
    indices = torch.randperm(numel)[:k].sort().values.to(index_dtype)
    values = torch.nn.Parameter(torch.randn(k, dtype=dtype))
    return SimpleNamespace(
        values=values, indices=indices, positions=indices.long, shape=torch.Size(shape), dense_numel=numel
    )


class TestSM3:
    @pytest.mark.parametrize("row_cover_only", [False, True])
    @pytest.mark.parametrize("momentum", [0.0, 0.7])
    def test_dense_parameters_equal_the_formula(self, momentum, row_cover_only):
        params = random_params()
        start = [param.detach().numpy().copy() for param in params]
        grads = random_grads(params, steps=4)
        optimizer = SftSM3(
            params, {}, lr=0.2, momentum=momentum, weight_decay=0.1, eps=1e-3, row_cover_only=row_cover_only
        )
        run(optimizer, params, grads)
        for i, param in enumerate(params):
            own = [step[i].numpy() for step in grads]
            p, covers = sm3_reference(start[i], own, 0.2, momentum, 0.1, 1e-3, row_cover_only)
            np.testing.assert_allclose(param.detach().numpy(), p, rtol=1e-12, atol=1e-14)
            names = {f"accumulator_{dim}" for dim in range(len(covers))} | ({"momentum_buffer"} if momentum else set())
            assert optimizer.state[param].keys() == names
            for dim, cover in enumerate(covers):
                expected = [cover[place] for place in range(len(cover))]
                np.testing.assert_allclose(optimizer.state[param][f"accumulator_{dim}"], expected, rtol=1e-12)

    @pytest.mark.parametrize("row_cover_only", [False, True])
    @pytest.mark.parametrize("shape", [(6, 9), (4, 3, 2)])
    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
    def test_deltas_equal_the_formula(self, shape, index_dtype, row_cover_only):
        delta = random_delta(shape, k=11, index_dtype=index_dtype)
        start = delta.values.detach().numpy().copy()
        grads = random_grads([delta.values], steps=4)
        optimizer = SftSM3(
            [delta.values],
            {delta.values: delta},
            lr=0.2,
            momentum=0.4,
            weight_decay=0.1,
            eps=1e-3,
            row_cover_only=row_cover_only,
        )
        run(optimizer, [delta.values], grads)
        columns = math.prod(shape[1:])
        positions = [divmod(int(flat), columns) for flat in delta.indices]
        own = [step[0].numpy() for step in grads]
        p, covers = sm3_reference(start, own, 0.2, 0.4, 0.1, 1e-3, row_cover_only, positions)
        np.testing.assert_allclose(delta.values.detach().numpy(), p, rtol=1e-12, atol=1e-14)
        for dim, (cover, size) in enumerate(zip(covers, (shape[0], columns))):
            expected = [cover.get(place, 0.0) for place in range(size)]
            np.testing.assert_allclose(optimizer.state[delta.values][f"accumulator_{dim}"], expected, rtol=1e-12)
        assert ("accumulator_1" in optimizer.state[delta.values]) is not row_cover_only

    def test_a_full_delta_is_the_dense_parameter(self):
        delta = random_delta((5, 4), k=20)
        dense = torch.nn.Parameter(delta.values.detach().reshape(5, 4).clone())
        optimizer = SftSM3([delta.values, dense], {delta.values: delta})
        for _ in range(3):
            grad = torch.randn(5, 4, dtype=torch.float64)
            run(optimizer, [delta.values, dense], [[grad.flatten(), grad]])
        assert torch.equal(delta.values.view(5, 4), dense)

    def test_bfloat16_values_are_computed_in_float32(self):
        delta = random_delta((6, 9), k=20, dtype=torch.bfloat16)
        start = delta.values.detach().double().numpy()
        grads = [[g[0].bfloat16().double()] for g in random_grads([delta.values], steps=3)]
        optimizer = SftSM3([delta.values], {delta.values: delta}, momentum=0.5)
        run(optimizer, [delta.values], grads)
        positions = [divmod(int(flat), 9) for flat in delta.indices]
        p, covers = sm3_reference(start, [g[0].numpy() for g in grads], 0.1, 0.5, 0.0, 1e-8, positions=positions)
        state = optimizer.state[delta.values]
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert delta.values.dtype == torch.bfloat16
        np.testing.assert_allclose(state["accumulator_0"], [covers[0].get(i, 0.0) for i in range(6)], rtol=1e-5)
        # Each of the three steps rounds to bfloat16, by up to 2**-8 of the number.
        np.testing.assert_allclose(delta.values.detach().double(), p, rtol=3 * 2**-8, atol=2**-8)

    @pytest.mark.parametrize("duplicate", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
    def test_copies_and_reloads_exactly(self, duplicate):
        delta = random_delta((6, 9), k=20, dtype=torch.bfloat16)
        optimizer = SftSM3([delta.values], {delta.values: delta}, momentum=0.5)
        run(optimizer, [delta.values], random_grads([delta.values], steps=2))
        twin = duplicate(optimizer)
        (twin_values,) = twin.param_groups[0]["params"]
        other = copy.deepcopy(delta)
        resumed = SftSM3([other.values], {other.values: other}, momentum=0.5)
        resumed.load_state_dict(duplicate(optimizer.state_dict()))
        assert {value.dtype for value in resumed.state[other.values].values()} == {torch.float32}
        grads = random_grads([delta.values], steps=2)
        for each, values in ((optimizer, delta.values), (twin, twin_values), (resumed, other.values)):
            run(each, [values], grads)
        assert torch.equal(delta.values, twin_values)
        assert torch.equal(delta.values, other.values)

    def test_moves_touch_only_what_belongs_to_elements(self):
        delta = random_delta((20, 9), k=20)  # as many elements as rows
        optimizer = SftSM3([delta.values], {delta.values: delta}, momentum=0.5)
        run(optimizer, [delta.values], random_grads([delta.values], steps=2))
        before = {name: value.clone() for name, value in optimizer.state[delta.values].items()}
        source = torch.randperm(20)
        source[[3, 5]] = -1
        optimizer.move_slots(delta.values, source)
        before["momentum_buffer"] = before["momentum_buffer"][source]
        before["momentum_buffer"][[3, 5]] = 0
        for name, value in optimizer.state[delta.values].items():
            assert torch.equal(value, before[name])

    @pytest.mark.parametrize(
        "setting, message",
        [
            ({"lr": -0.1}, "lr must be finite and not negative, got -0.1"),
            ({"eps": 0.0}, "eps must be positive"),
            ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
            ({"weight_decay": -1}, "weight_decay must be finite and not negative, got -1"),
        ],
    )
    def test_refuses(self, setting, message):
        with pytest.raises(ValueError, match=message):
            SftSM3(random_params(), {}, **setting)

    def test_refuses_a_delta_of_another_parameter(self):
        delta = random_delta((6, 9), k=20)
        (param,) = random_params(shapes=[(7,)])
        with pytest.raises(ValueError, match=r"indices of shape \(20,\) cannot belong to values of shape \(7,\)"):
            SftSM3([param], {param: delta})


@pytest.mark.parametrize("make", [SftAdamW, lambda params, lr: SftSM3(params, {}, lr=lr)])
def test_runs_under_accelerate_and_a_scheduler(make):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, make(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 0.5**step)
    before = model.weight.detach().clone()
    for _ in range(2):
        accelerator.backward(model(torch.randn(4, 3)).square().sum())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert not torch.equal(before, model.weight)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize("make", [SftAdamW, lambda params, lr: SftSM3(params, {}, lr=lr, momentum=0.5)])
def test_a_group_of_all_kinds_of_parameters_is_each_alone(make):
    kinds = [torch.bfloat16, torch.float32, torch.float64, torch.float16]
    params = [torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(dtype)) for dtype in kinds]
    params.append(torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)))
    params.append(torch.nn.Parameter(torch.randn(6, 4).T))
    others = copy.deepcopy(params)
    together, alone = make(params, lr=0.1), [make([param], lr=0.1) for param in others]
    for _ in range(3):
        for param, other in zip(params, others):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        for optimizer in (together, *alone):
            optimizer.step()
    for param, other in zip(params, others):
        assert torch.equal(param, other) and param.stride() == other.stride()
