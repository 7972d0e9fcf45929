"""The optimisers of sparse fine-tuning: `SftAdamW` and `SftSM3` (arXiv 2401.16405, sections 3.2 and 3.3).

Both train ordinary parameters too (`modules_to_save`), and differ from their textbook namesakes only where the trained
positions of a weight may be exchanged while training: AdamW counts the gradients of every element by itself, so that
a position that starts late has its own bias correction; SM3 keeps its accumulators over the rows and columns of the
weight, not over the list of trained values, so that they stay meaningful when the list changes.

Left out: fused, capturable and differentiable variants, AMSGrad, sparse and complex gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import SparseDelta

CHUNK_ELEMENTS = 2**24
"""Elements updated in one go. It bounds the temporaries (four tensors of this size) on models with large deltas."""


class SftOptimizer(torch.optim.Optimizer):
    """What the two have in common: state per element that outlives an exchange of positions, and exact reloading."""

    element_state: tuple[str, ...]
    """The state entries that hold one number per element of the parameter."""

    initial_state: dict[str, float] = {}
    """What these entries start at, where it is not 0."""

    known_state: tuple[str, ...]
    """Prefixes of every state entry, to recognise the state of a foreign optimiser."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer`; raises ValueError if a hyperparameter of the group is out of its range."""
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps"):
            if not 0.0 <= group[name] < math.inf:
                raise ValueError(f"{type(self).__name__}: {name} must be finite and not negative, got {group[name]!r}")

    def state_of(self, param: nn.Parameter) -> dict[str, Tensor]:
        """The state of `param`, created on first use."""
        state = self.state[param]
        if not state:
            self._init_state(param, state)
        return state

    def _init_state(self, param: nn.Parameter, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on every parameter that has a gradient, and return the loss that `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None and param.numel()]
            if any(param.grad.is_sparse or param.is_complex() for param in params):
                raise ValueError(f"{type(self).__name__} takes dense real gradients only")
            self._step_group(params, group)
        return loss

    def _step_group(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def move_slots(self, param: nn.Parameter, source: Tensor) -> None:
        """Move the state along with the values of a delta, (k,) or (g, s), whose slots have changed places.

        Args:
            source: One int64 per slot of today: the slot that it was before, or -1 for one that starts afresh.
        """
        state = self.state[param]
        kept = source >= 0
        for name in self.element_state:
            if name in state:
                old, start = state[name], self.initial_state.get(name, 0.0)
                state[name] = old.new_full((source.numel(), *old.shape[1:]), start)
                state[name][kept] = old[source[kept]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned, every state in the dtype in which it was saved.

        torch casts floating-point state to the dtype of its parameter, which rounds an age of 301 to 300 in bfloat16.

        Raises:
            ValueError: The state is that of another kind of optimiser.
        """
        saved_state = state_dict["state"]
        for entry in saved_state.values():
            foreign = sorted(name for name in entry if not name.startswith(self.known_state))
            if foreign:
                raise ValueError(
                    f"{type(self).__name__} cannot load this state: it holds {', '.join(foreign)}, which another "
                    f"optimiser keeps. Resume with the optimiser that saved it, or start without its state."
                )
        super().load_state_dict(state_dict)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"]):
            for param, key in zip(group["params"], saved_group["params"]):
                for name, value in saved_state.get(key, {}).items():
                    self.state[param][name] = value.to(param.device)


class SftAdamW(SftOptimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101) and an age for every element.

    State per parameter, each of the parameter's shape: `exp_avg`, `exp_avg_sq` in `momentum_dtype`, and `age`, the
    number of gradients that the moments will hold after the coming step, in float32 or wider.

    Args:
        params, lr, betas, weight_decay: As in torch's AdamW.
        eps: Added to the root of the second moment, before its bias correction.
        momentum_dtype: dtype in which the moments are stored; None: the parameter's. The arithmetic is in float32 or
            wider in any case.

    Raises:
        ValueError: A hyperparameter is out of its range.
    """

    element_state = ("age", "exp_avg", "exp_avg_sq")
    initial_state = {"age": 1.0}
    known_state = element_state

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        momentum_dtype: torch.dtype | None = None,
    ) -> None:
        if momentum_dtype is not None and not momentum_dtype.is_floating_point:
            raise ValueError(f"SftAdamW: momentum_dtype must be a floating-point dtype or None, got {momentum_dtype}")
        self.momentum_dtype = momentum_dtype
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "momentum_dtype": self.momentum_dtype}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"SftAdamW: betas must be two numbers in [0, 1), got {group['betas']!r}")

    def _init_state(self, param: nn.Parameter, state: dict[str, Tensor]) -> None:
        state["age"] = torch.ones_like(param, dtype=_working_dtype(param))
        state["exp_avg"] = torch.zeros_like(param, dtype=self.momentum_dtype)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=self.momentum_dtype)

    def _step_group(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        for chunk in _chunks(params):
            self._step_chunk(chunk, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})

    def _step_chunk(
        self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        dtypes = [_working_dtype(param) for param in params]
        states = [self.state_of(param) for param in params]
        grads = _cast([param.grad for param in params], dtypes)
        ages = [state["age"] for state in states]
        exp_avgs = _cast([state["exp_avg"] for state in states], dtypes)
        exp_avg_sqs = _cast([state["exp_avg_sq"] for state in states], dtypes)
        beta1, beta2 = betas

        torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - beta2)

        # exp_avg / (1 - beta1**age) / ((sqrt(exp_avg_sq) + eps) / sqrt(1 - beta2**age))
        updates = _one_minus_power(beta2, ages)
        torch._foreach_sqrt_(updates)
        torch._foreach_mul_(updates, exp_avgs)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(denominators, eps)
        torch._foreach_mul_(denominators, _one_minus_power(beta1, ages))
        torch._foreach_div_(updates, denominators)

        wide = _cast(params, dtypes)
        torch._foreach_mul_(wide, 1.0 - lr * weight_decay)
        torch._foreach_add_(wide, updates, alpha=-lr)
        torch._foreach_add_(ages, 1.0)
        _store(wide, params)
        _store(exp_avgs, [state["exp_avg"] for state in states])
        _store(exp_avg_sqs, [state["exp_avg_sq"] for state in states])

    @torch.no_grad()
    def seed_elements(
        self, param: nn.Parameter, slots: Tensor, mean_grad: Tensor, mean_square_grad: Tensor, count: int
    ) -> None:
        """Give newly trained elements the moments that fit what is known of their gradients.

        Moments that had been fed `count` gradients equal to the mean would now be the mean times (1 - beta**count).
        After the coming step they hold count + 1, which is what the bias correction of that step divides by: the
        corrected moments are then weighted means, exactly.

        Args:
            param: The values of a delta, (k,) or (g, s).
            slots: (m,) int64, the slots to seed.
            mean_grad, mean_square_grad: (m,) or (m, s), means of the gradient and of its square over `count` steps.
        """
        beta1, beta2 = next(group["betas"] for group in self.param_groups if any(p is param for p in group["params"]))
        state = self.state_of(param)
        state["age"][slots] = count + 1.0
        for name, mean, beta in (("exp_avg", mean_grad, beta1), ("exp_avg_sq", mean_square_grad, beta2)):
            state[name][slots] = (mean * (1.0 - beta**count)).to(state[name].dtype)


class SftSM3(SftOptimizer):
    """SM3 (arXiv 1901.11150) whose accumulators cover the rows and columns of the weights that the deltas belong to.

    With g the gradient of the weight's element (i, j): nu = min(row[i], col[j]) + g**2; each accumulator becomes the
    largest of itself and the nu of its entries; the update is g / sqrt(nu + eps). State per parameter, float32 or
    wider: `accumulator_0` (rows,), `accumulator_1` (columns,), one more for every further dimension of a parameter
    that is not a delta, and `momentum_buffer`, of the parameter's shape, if there is momentum.

    Args:
        params: Parameters or groups of them.
        deltas: Maps the `values` parameter of each sparse delta to that delta. A parameter that is not in it is dense
            and is covered along each of its own dimensions. A weight of more than two dimensions counts as a matrix
            of its first dimension by all the others.
        momentum: Decay rate mu of the running mean of the updates, m = mu * m + (1 - mu) * update.
        weight_decay: Decay rate per unit of learning rate `lr`, decoupled.
        eps: Added to nu.
        row_cover_only: Keep accumulators of the first dimension alone: nu = row[i] + g**2.

    Raises:
        ValueError: A hyperparameter is out of its range, or a delta does not belong to its parameter.
    """

    element_state = ("momentum_buffer",)
    known_state = ("accumulator_", "momentum_buffer")

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        deltas: dict[nn.Parameter, SparseDelta],
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        row_cover_only: bool = False,
    ) -> None:
        for values, delta in deltas.items():
            if values.shape[:1] != delta.indices.shape:
                raise ValueError(
                    f"SftSM3: a delta with indices of shape {tuple(delta.indices.shape)} cannot belong to values of "
                    f"shape {tuple(values.shape)}; map delta.values to delta"
                )
        self.deltas = dict(deltas)
        self.row_cover_only = row_cover_only
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "deltas": self.deltas, "row_cover_only": self.row_cover_only}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["eps"]:
            raise ValueError("SftSM3: eps must be positive; without it an element that never had a gradient is 0 / 0")
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"SftSM3: momentum must be in [0, 1), got {group['momentum']!r}")

    def _covered_shape(self, param: nn.Parameter) -> tuple[int, ...]:
        """Sizes of the dimensions that have accumulators, for the matrix of a delta or for the parameter itself."""
        if param in self.deltas:
            shape = matrix_shape(self.deltas[param])
        else:
            shape = tuple(param.shape) or (1,)
        return shape[:1] if self.row_cover_only else shape

    def _init_state(self, param: nn.Parameter, state: dict[str, Tensor]) -> None:
        for dim, size in enumerate(self._covered_shape(param)):
            state[f"accumulator_{dim}"] = torch.zeros(size, dtype=_working_dtype(param), device=param.device)

    def accumulators(self, param: nn.Parameter) -> list[Tensor]:
        """The accumulators of a parameter, first dimension first."""
        state = self.state_of(param)
        return [state[f"accumulator_{dim}"] for dim in range(len(self._covered_shape(param)))]

    def _step_group(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        for param in params:
            grad = param.grad.to(_working_dtype(param))
            if param in self.deltas:
                nu = self._cover_delta(self.deltas[param], self.accumulators(param), grad)
            else:
                nu = _cover_dense(self.accumulators(param), grad)
            update = grad.div(nu.add_(group["eps"]).sqrt_())
            if group["momentum"]:
                update = self._average(param, update, group["momentum"])
            wide = param.detach().to(update.dtype)
            wide.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
            _store([wide], [param])

    def _cover_delta(self, delta: SparseDelta, accumulators: list[Tensor], grad: Tensor) -> Tensor:
        positions = matrix_positions(delta)[: len(accumulators)]
        nu = accumulators[0][positions[0]]
        for accumulator, position in zip(accumulators[1:], positions[1:]):
            nu = torch.minimum(nu, accumulator[position])
        nu = torch.addcmul(nu, grad, grad)
        for accumulator, position in zip(accumulators, positions):
            accumulator.scatter_reduce_(0, position.flatten(), nu.flatten(), "amax", include_self=True)
        return nu

    def _average(self, param: nn.Parameter, update: Tensor, momentum: float) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(update)
        return state["momentum_buffer"].lerp_(update, 1.0 - momentum)


def matrix_shape(delta: SparseDelta) -> tuple[int, int]:
    """(rows, columns) of the delta's weight seen as a matrix: the first dimension by all the others."""
    rows = delta.shape[0]
    return rows, delta.dense_numel // rows


def matrix_positions(delta: SparseDelta) -> tuple[Tensor, Tensor]:
    """Row and column, int64 in the shape of the values, of every trained number."""
    flat = delta.positions()
    columns = matrix_shape(delta)[1]
    return flat.div(columns, rounding_mode="floor"), flat.remainder(columns)


def _cover_dense(accumulators: list[Tensor], grad: Tensor) -> Tensor:
    """nu of a dense gradient of any shape, and the accumulators raised to it in place."""
    dims = range(grad.dim() or 1)
    covered = grad.reshape(grad.shape or (1,))
    nu = accumulators[0].view(-1, *(1 for _ in dims[1:]))
    for dim, accumulator in enumerate(accumulators[1:], start=1):
        nu = torch.minimum(nu, accumulator.view([-1 if other == dim else 1 for other in dims]))
    nu = torch.addcmul(nu, covered, covered)
    for dim, accumulator in enumerate(accumulators):
        others = [other for other in dims if other != dim]
        torch.maximum(accumulator, nu.amax(others) if others else nu, out=accumulator)
    return nu.view(grad.shape)


def _working_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _chunks(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    size = 0
    for param in params:
        if chunk and size + param.numel() > CHUNK_ELEMENTS:
            yield chunk
            chunk, size = [], 0
        chunk.append(param)
        size += param.numel()
    if chunk:
        yield chunk


def _cast(tensors: Iterable[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [tensor.detach().to(dtype) for tensor, dtype in zip(tensors, dtypes)]


def _store(computed: list[Tensor], targets: list[Tensor]) -> None:
    """Round what was computed in a wider copy back into the tensor it came from; a no-op where there was no copy."""
    for source, target in zip(computed, targets):
        if source.dtype != target.dtype:
            target.copy_(source)


def _one_minus_power(beta: float, ages: list[Tensor]) -> list[Tensor]:
    """1 - beta**age. In float32 the plain formula loses four digits at beta = 0.999, the one through expm1 none."""
    powers = torch._foreach_mul(ages, math.log(beta) if beta > 0.0 else -math.inf)
    torch._foreach_expm1_(powers)
    torch._foreach_neg_(powers)
    return powers
