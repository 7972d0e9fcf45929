"""Which positions of each weight are trained: `SftSelector`, the drop-and-grow half of sparse fine-tuning.

Every `reselection_steps` update steps the positions whose values are nearest to zero are given up for positions that
promise more: by gradients gathered beforehand ("rigl": accumulated gradients, SpIEL-AG) or by the optimiser's row and
column accumulators ("sm3": moment approximation, SpIEL-MA). arXiv 2401.16405, section 3, algorithm 1. With "static"
selection nothing moves (`static.py` chooses before training); the selector sees to it that this was done.

A position is a slot of one number; in a structured delta (`structured`) a slot is a group of s numbers, ranked by the
L2 norm of its values or gradients where a position is ranked by their absolute value. Statistics and optimiser state
stay per number.

Letters: k trained slots of a weight, m of them exchanged, c candidates (as many as k, but under a global budget see
`candidate_counts`), t completed update steps, T their total number, R rows and C columns of a weight seen as a matrix.

Gradients are gathered in the backward pass, but what counts is what the optimiser sees: unscaled and clipped. Both
multiply all gradients by one factor, which is measured on the trained values when the optimiser steps (`_Shrinkage`).
Left out: clipping by value, which has no such factor; the candidates are then scaled by the mean effect.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...utils.warning import warn
from .budget import best_anywhere, candidate_counts, exchange, exchange_anywhere, find, largest, smallest_anywhere
from .optimizer import SftAdamW, SftOptimizer, SftSM3
from .parallel import Ranks, check_whole, find_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .config import SftConfig
    from .layer import SparseDelta

OPTIMIZERS = {"rigl": SftAdamW, "sm3": SftSM3, "static": torch.optim.Optimizer}
"""The optimiser that each selection algorithm needs."""


@dataclass
class _Statistics:
    """What a gathering window knows so far about the candidates of one delta."""

    total: Tensor  # (c,) or (c, s) float32, sum of the gradients of the update steps
    squares: Tensor  # likewise, sum of their squares
    updates: int  # number of update steps in the sums

    def add(self, grad: Tensor) -> None:
        self.total.add_(grad)
        self.squares.addcmul_(grad, grad)
        self.updates += 1


class _Shrinkage:
    """By which factor the gradients of the trained values were changed between the backward passes and the optimiser.

    With g the gradient as the backward passes of an update step gave it and h as the optimiser finds it, summed over
    all values: sum |h| / sum g sign(h). That is f if h = f g, and exactly 1 if h = g. The sum below is linear in g, so
    that its mean over the processes is that of their mean gradient, which no process needs to know (h all of them do).

    Args:
        deltas: Whose values are watched from now on, until `close`.
    """

    def __init__(self, deltas: Iterable[SparseDelta]) -> None:
        self._gradients: dict[nn.Parameter, Tensor] = {}  # g of the current update step, of the shapes of the values
        self._hooks = [d.values.register_hook(functools.partial(self._add, d.values)) for d in deltas]

    def _add(self, values: nn.Parameter, gradient: Tensor) -> None:
        known = self._gradients.get(values)
        # A copy: autograd may make the tensor itself the `.grad` that is then clipped in place.
        self._gradients[values] = gradient.detach().clone() if known is None else known + gradient.detach()

    @torch.no_grad()
    def sums(self, deltas: Iterable[SparseDelta]) -> Tensor:
        """The two sums, (2,) float32."""
        sums = [torch.zeros(2)]
        for values in (delta.values for delta in deltas if delta.values.grad is not None):
            gradient = self._gradients.get(values, torch.zeros_like(values))
            parts = torch.stack([values.grad.abs(), gradient * values.grad.sign()])
            sums.append(parts.flatten(1).sum(1, dtype=torch.float32))
        return torch.stack([part.to(sums[-1].device) for part in sums]).sum(0)

    def forget(self) -> None:
        """The next update step begins."""
        self._gradients.clear()

    def close(self) -> None:
        self.forget()
        for hook in self._hooks:
            hook.remove()


class SftSelector:
    """Exchanges the trained positions of a model's active SFT adapter in the course of training.

    Call `step()` after every update step, that is after `optimizer.step()`; whether gradients have been zeroed by then
    does not matter. Gradients are gathered during exactly the `selection_accumulation_steps` update steps before a
    reselection, starting with the first step of training.

    An update step that the optimiser did not take (a GradScaler skips it when gradients overflow), or with a gradient
    that is not finite, counts as a completed step but not towards the statistics.

    Under data parallelism every process makes a selector, at the same place of the program, and all of them choose
    what one process would choose on the joined batch; see `parallel.Ranks` for what that asks of the processes.

    Args:
        model: The model with the SFT adapter: PeftModel, tuner, or a wrapper that has either as `module`, such as
            DistributedDataParallel.
        optimizer: `SftAdamW` for "rigl", `SftSM3` for "sm3", any for "static"; also as wrapped by accelerate.
        sft_config: Algorithm and schedule.
        total_update_steps: T, update steps that the whole training will take.
        grad_accumulation_steps: Micro-batches per update step. Statistics are sums over the micro-batches of a step,
            as in `param.grad`, so they do not depend on it.
        completed_steps: t at which training starts; `load_state_dict` sets it too.
        grad_scale: Returns the factor by which the loss is scaled, `scaler.get_scale` of a GradScaler. It is measured
            otherwise; only for an update step in which the gradients of all trained values are 0 (embeddings of tokens
            that the batch does not have) it must be said. An optimiser wrapped by accelerate knows its scaler.
        process_group: The processes that share a batch and average their gradients; None: this one is alone. "auto":
            those of the DistributedDataParallel that `model` is or holds; with several processes and no such wrapper
            it has to be said ("sm3" need not know: its accumulators are the same in all processes).

    Attributes:
        last_report: One dict per delta for the latest reselection: `name`, `moved` (trained weights exchanged), `total`
            (trained weights).
        history: One dict per reselection so far: `step` (t), `share` aimed at, `moved`, `total`, and `layers`, the
            trained weights that moved in each delta by its name.
        discarded_updates: Update steps inside gathering windows that did not count.

    Raises:
        TypeError: The optimiser is not the one that the selection algorithm needs.
        ValueError: No active SFT adapter, a delta that the optimiser does not train or that is partitioned over
            processes (FSDP, DeepSpeed), step counts out of their range, "sm3" selection without column accumulators,
            "static" positions that were not chosen yet, or several processes of which it is not known whether they
            share their batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sft_config: SftConfig,
        total_update_steps: int,
        grad_accumulation_steps: int,
        completed_steps: int = 0,
        grad_scale: Callable[[], float] | None = None,
        process_group: ProcessGroup | Literal["auto"] | None = "auto",
    ) -> None:
        for name, value, least in (
            ("total_update_steps", total_update_steps, 1),
            ("grad_accumulation_steps", grad_accumulation_steps, 1),
            ("completed_steps", completed_steps, 0),
        ):
            if value < least:
                raise ValueError(f"SftSelector: {name} must be at least {least}, got {value}")
        self.config = sft_config
        self.total_update_steps = total_update_steps
        self.grad_accumulation_steps = grad_accumulation_steps
        self.completed_steps = completed_steps
        self.deltas = named_deltas(model)
        check_agreement(model, sft_config)
        check_whole(model, self.deltas)
        self.optimizer = _unwrapped_optimizer(optimizer, sft_config.selection_algorithm)
        _check_trained(self.deltas, self.optimizer)
        _check_selected(self.deltas, sft_config)
        self._grad_scale = grad_scale or getattr(getattr(optimizer, "scaler", None), "get_scale", lambda: 1.0)
        competes = sft_config.budget == "global" and sft_config.selection_algorithm != "static"
        needs_group = competes or sft_config.selection_algorithm == "rigl"
        group = find_group(model, process_group) if needs_group else None
        if sft_config.budget == "global":
            _check_elastic(self.deltas, group)
        self._ranks = None if group is None else Ranks(group, list(self.deltas.values()))

        self.last_report: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.discarded_updates = 0
        self._statistics: dict[str, _Statistics] = {}
        self._shrinkage = _Shrinkage([])
        # Of the update step that the optimiser has taken since the last call of step(), None if it took none: sums of
        # the gradients and the loss scale. By the time of step() there may be no gradients, and another scale.
        self._taken: tuple[Tensor, float] | None = None
        self._hook = self.optimizer.register_step_pre_hook(self._note_optimizer_step)
        if self._window_is_open():
            self._open_window()

    def step(self) -> None:
        """Record the update step that has just been completed, and reselect if it is time to."""
        self.completed_steps += 1
        if self._statistics:
            self._collect()
        self._taken = None
        self._shrinkage.forget()
        if self._reselects_at(self.completed_steps):
            self._reselect()
        if self._window_is_open() and not self._statistics:
            self._open_window()

    def close(self) -> None:
        """Stop gathering and let go of the optimiser. A selector that has been closed cannot step any more."""
        self._close_window()
        self._hook.remove()

    def __reduce__(self) -> Any:
        raise TypeError(
            "An SftSelector is tied to its model and its optimiser by hooks, so it is neither copied nor pickled: make "
            "one for their copies and give it this one's state_dict()"
        )

    def share(self, step: int) -> float:
        """Fraction of the positions that a reselection after `step` update steps is to exchange."""
        progress = step / self.total_update_steps
        rate = self.config.initial_reselection_rate
        if self.config.reselection_rate_policy == "cosine":
            return rate * (1.0 + math.cos(math.pi * progress)) / 2.0
        # The random positions that training starts from deserve no respect: all of them may go at once.
        return 1.0 if step == self.config.selection_accumulation_steps else rate * (1.0 - progress)

    # ---- Schedule ----

    def _reselects_at(self, step: int) -> bool:
        if self.config.selection_algorithm == "static":
            return False
        in_phase = step % self.config.reselection_steps == self.config.selection_accumulation_steps
        return in_phase and step <= self.total_update_steps and self.share(step) > 0.0

    def _window_is_open(self) -> bool:
        """Whether the coming update step is one of those whose gradients decide about the next reselection."""
        if self.config.selection_algorithm != "rigl":
            return False
        phase = self.completed_steps % self.config.reselection_steps
        due = self.completed_steps - phase + self.config.selection_accumulation_steps
        return phase < self.config.selection_accumulation_steps and self._reselects_at(due)

    # ---- Gathering ----

    def _open_window(self) -> None:
        counts = self._candidate_counts()
        for name, delta in self.deltas.items():
            delta.start_gathering(self._ranks, counts[name])
            zeros = torch.zeros(2, counts[name], *delta.values.shape[1:], device=delta.indices.device)
            self._statistics[name] = _Statistics(*zeros, updates=0)
        self._shrinkage = _Shrinkage(self.deltas.values())

    def _candidate_counts(self) -> dict[str, int]:
        active = [delta.indices.numel() for delta in self.deltas.values()]
        if self.config.budget == "global":
            active = candidate_counts(active, [delta.dense_numel for delta in self.deltas.values()])
        return dict(zip(self.deltas, active))

    def _close_window(self) -> None:
        for delta in self.deltas.values():
            delta.stop_gathering()
        self._statistics.clear()
        self._shrinkage.close()

    def _note_optimizer_step(self, *_: Any) -> None:
        if self._statistics:
            self._taken = self._shrinkage.sums(self.deltas.values()), self._grad_scale()

    @torch.no_grad()
    def _collect(self) -> None:
        """Add the candidates' gradients of the update step just completed to the statistics."""
        grads = {name: delta.take_candidate_grad() for name, delta in self.deltas.items()}
        sums, scale = self._taken or (torch.zeros(2), 1.0)
        if self._ranks is None:
            grads = {name: grad for name, grad in grads.items() if grad is not None}
        else:
            grads = self._ranks.mean(grads, self.deltas)
            sums = self._ranks.mean_of(sums)
        seen, gathered = sums.tolist()
        if self._taken is None or not math.isfinite(seen + gathered) or not _all_finite(grads.values()):
            self._discard_update()
            return
        factor = seen / gathered if gathered else 1.0 / scale
        for name, grad in grads.items():
            self._statistics[name].add(grad.mul(factor))

    def _discard_update(self) -> None:
        self.discarded_updates += 1
        for name, delta in self.deltas.items():
            # Candidates chosen by gradients that overflowed are arbitrary: choose again at the next backward pass.
            if self._statistics[name].updates == 0:
                delta.start_gathering(self._ranks, delta.candidate_count)

    # ---- Reselection ----

    @torch.no_grad()
    def _reselect(self) -> None:
        step = self.completed_steps
        share = self.share(step)
        moved = self._exchange(share)
        self.last_report = [
            {"name": name, "moved": moved[name] * delta.slot_size, "total": delta.values.numel()}
            for name, delta in self.deltas.items()
        ]
        if self._statistics and not any(statistics.updates for statistics in self._statistics.values()):
            warn(
                f"No position was reselected after update step {step}: the optimizer took no step with finite "
                f"gradients since the previous {self.config.selection_accumulation_steps} calls of SftSelector.step(). "
                f"Call it after optimizer.step(), and see whether the gradients overflow."
            )
        self._close_window()
        summary = {key: sum(entry[key] for entry in self.last_report) for key in ("moved", "total")}
        layers = {entry["name"]: entry["moved"] for entry in self.last_report}
        self.history.append({"step": step, "share": share, **summary, "layers": layers})

    def _exchange(self, share: float) -> dict[str, int]:
        """Drop and grow `share` of the slots, of every layer or of all together; return how many came into each."""
        by_gradient = self.config.selection_algorithm == "rigl"
        is_global = self.config.budget == "global"
        sizes = [delta.slots for delta in self.deltas.values()]
        counts = [math.floor(size * share) for size in ([sum(sizes)] if is_global else sizes)]
        moves = self._moves_by_gradient(counts) if by_gradient else self._moves_by_accumulators(counts)
        moved = {}
        for (name, delta), (given_up, positions) in zip(self.deltas.items(), moves):
            moved[name] = positions.numel()
            if not given_up.numel() and not moved[name]:
                continue
            device = delta.indices.device
            candidates = delta.candidates
            source = delta.exchange(given_up.to(device), positions.to(device))
            self.optimizer.move_slots(delta.values, source)
            if by_gradient and moved[name]:
                known, found = self._statistics[name], find(positions.to(device), candidates)[0]
                mean, mean_square = (sums[found] / known.updates for sums in (known.total, known.squares))
                fresh = (source < 0).nonzero().squeeze(1)
                self.optimizer.seed_elements(delta.values, fresh, mean, mean_square, known.updates)
        return moved

    def _moves_by_gradient(self, counts: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each delta the slots it gives up, and the sorted candidates of largest summed gradient it takes up.

        Args:
            counts: How many to exchange in each layer; a single one under a global budget.
        """
        known = [(delta, self._statistics[name]) for name, delta in self.deltas.items()]
        if self.config.budget == "global":
            plan = exchange_anywhere([_offer(*each) for each in known], *counts)
        else:
            plan = (exchange(*_offer(*each), count) for each, count in zip(known, counts))
        for (delta, statistics), (given_up, grown) in zip(known, plan):
            candidates = delta.candidates if statistics.updates else delta.indices.detach()[:0]
            yield given_up, candidates[grown.to(candidates.device)]

    def _moves_by_accumulators(self, counts: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """As `_moves_by_gradient`; the slots are the inactive ones of largest (sum of) accumulator products."""
        deltas = list(self.deltas.values())
        rooms = [delta.choices - delta.slots for delta in deltas]

        def best(delta: SparseDelta, count: int) -> tuple[Tensor, Tensor, Tensor]:
            factors = self.optimizer.accumulators(delta.values)
            if delta.layout is not None:
                factors = delta.layout.factors(*factors)
            return largest_products(*factors, delta.indices.detach().long(), count), *factors

        if self.config.budget == "global":
            count = min(*counts, sum(rooms))

            def offer(layer: int, wanted: int) -> tuple[Tensor, Tensor]:
                positions, *factors = best(deltas[layer], wanted)
                return positions.cpu(), _RankOne(*factors).at(positions.cpu())

            smallest = smallest_anywhere([_magnitude(delta) for delta in deltas], count)
            yield from zip(smallest, best_anywhere(offer, rooms, count))
            return
        for delta, room, count in zip(deltas, rooms, counts):
            count = min(count, room)
            yield largest(_magnitude(delta).neg(), count).nonzero().squeeze(1), best(delta, count)[0]

    # ---- State ----

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as a flat dict of tensors that safetensors can write.

        `completed_steps`: int64 scalar. While a gathering window is open, for each delta (by its name) that has
        chosen its candidates: `<delta>.candidates` (c,) of the type of its indices, `<delta>.total` and
        `<delta>.squares` (c,) or (c, s) float32, `<delta>.updates` int64 scalar. Take it between update steps: what the
        micro-batches of an unfinished step have gathered is as little part of it as their gradients are of the
        optimiser's state.
        """
        state = {"completed_steps": torch.tensor(self.completed_steps)}
        for name, statistics in self._statistics.items():
            candidates = self.deltas[name].candidates
            if candidates is not None:
                state[f"{name}.candidates"] = candidates.clone()
                state[f"{name}.total"] = statistics.total.clone()
                state[f"{name}.squares"] = statistics.squares.clone()
                state[f"{name}.updates"] = torch.tensor(statistics.updates)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where the selector that returned `state` stopped, in the middle of a gathering window too.

        The schedule is not part of the state: it is this selector's own, from the step of the state on, so that a run
        may go on longer, or reselect less often, than it was meant to.

        Raises:
            ValueError: The state belongs to other deltas, or holds gathered gradients at a step at which nothing is
                gathered under this selector's schedule.
        """
        if "completed_steps" not in state:
            raise ValueError(f"No selector state: key 'completed_steps' is missing, got {sorted(state)[:3]}")
        saved = {key.rpartition(".")[0] for key in state} - {""}
        unknown = sorted(saved - self.deltas.keys())
        if unknown:
            raise ValueError(
                f"The selector state holds {len(unknown)} deltas that this model has not, such as {unknown[:3]}; "
                f"load it into the model that it was saved with"
            )
        counts = self._candidate_counts()
        for name in saved:
            missing = [e for e in ("candidates", "total", "squares", "updates") if f"{name}.{e}" not in state]
            if missing:
                raise ValueError(f"The selector state is not whole: it lacks {', '.join(missing)} of {name}")
            numbers = (counts[name], *self.deltas[name].values.shape[1:])
            for entry, expected in (("candidates", numbers[:1]), ("total", numbers), ("squares", numbers)):
                found = tuple(state[f"{name}.{entry}"].shape)
                if found != expected:
                    raise ValueError(f"{name}.{entry} has shape {found}, but the delta {expected}")
        self._close_window()
        self.completed_steps = int(state["completed_steps"])
        if self._window_is_open():
            self._open_window()
        elif saved:
            raise ValueError(
                f"The selector state was saved while gradients were being gathered, but after {self.completed_steps} "
                f"update steps none are gathered under this config: reselection_steps="
                f"{self.config.reselection_steps}, selection_accumulation_steps="
                f"{self.config.selection_accumulation_steps}, total_update_steps={self.total_update_steps}"
            )
        for name in saved:
            device = self.deltas[name].indices.device
            self.deltas[name].candidates = state[f"{name}.candidates"].to(self.deltas[name].indices, copy=True)
            self._statistics[name] = _Statistics(
                total=state[f"{name}.total"].to(device, copy=True),
                squares=state[f"{name}.squares"].to(device, copy=True),
                updates=int(state[f"{name}.updates"]),
            )


# ---- Model and optimiser ----


def named_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """The active sparse deltas of a model, or of the model inside a wrapper, by their names in the base model.

    Raises:
        ValueError: There is none.
    """
    return {name: delta for _, name, delta in sft_model(model).active_deltas()}


def sft_model(model: nn.Module) -> nn.Module:
    """The PeftModel or tuner with an active SFT adapter that `model` is or has inside (as `module`).

    Raises:
        ValueError: There is none.
    """
    while not hasattr(model, "active_deltas") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not hasattr(model, "active_deltas") or not any(model.active_deltas()):
        raise ValueError(
            f"{type(model).__name__} has no active SFT adapter; make one with get_peft_model(model, SftConfig(...)), "
            f"or activate it with set_adapter"
        )
    return model


def check_agreement(model: nn.Module, config: SftConfig) -> None:
    """Refuse a configuration that asks for another adapter than the model has; its schedule may be another.

    Raises:
        ValueError: It says of the adapter's size or form what is neither the default nor what the adapter has.
    """
    tuner = sft_model(model)
    made = [tuner.peft_config[name] for name in tuner.active_adapters]
    sizes = () if config.budget == "global" else ("num_deltas",)  # which follow the budget where it moves
    for name in ("density", "num_tunable_weights", "granularity", "block_size", "dtype", *sizes):
        value, values = getattr(config, name), [getattr(other, name, None) for other in made]
        if value != getattr(type(config), name) and value not in values:
            raise ValueError(
                f"sft_config has {name}={value!r}, but the adapter was made with {values[0]!r}: give what it was made "
                "with, or make another adapter with get_peft_model"
            )


def _unwrapped_optimizer(optimizer: torch.optim.Optimizer, algorithm: str) -> torch.optim.Optimizer:
    needed = OPTIMIZERS[algorithm]
    inner = optimizer
    while not isinstance(inner, SftOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, needed):
        raise TypeError(
            f"selection_algorithm={algorithm!r} needs the optimizer {needed.__name__}, got {type(inner).__name__}"
        )
    if isinstance(inner, SftSM3) and inner.row_cover_only:
        raise ValueError(
            "selection_algorithm='sm3' ranks positions by row and column accumulators, but the optimizer has "
            "row_cover_only=True; make it with row_cover_only=False"
        )
    return inner


def unselected(deltas: dict[str, SparseDelta], config: SftConfig) -> list[str]:
    """Names of the deltas whose positions `select_static` has yet to choose under this configuration."""
    if config.static_criterion in (None, "random"):
        return []
    return [name for name, delta in deltas.items() if not delta.is_selected]


def _check_selected(deltas: dict[str, SparseDelta], config: SftConfig) -> None:
    pending = unselected(deltas, config)
    if pending:
        raise ValueError(
            f"The positions of {len(pending)} deltas, such as {pending[0]}, were drawn, not chosen by static_criterion="
            f"{config.static_criterion!r}: call select_static(model, batches) before SftSelector"
        )


def _check_elastic(deltas: dict[str, SparseDelta], group: ProcessGroup | None) -> None:
    rigid = [name for name, delta in deltas.items() if not delta.elastic]
    if rigid:
        raise ValueError(
            f"budget='global' moves positions between layers, but {rigid[0]} was made with budget='per_layer'; make "
            f"the adapter with the same SftConfig"
        )
    if group is not None:
        raise ValueError(
            "budget='global' changes the sizes of parameters while training, and data parallelism (the buckets of "
            "DistributedDataParallel) needs them fixed; use budget='per_layer', or one process"
        )


def _check_trained(deltas: dict[str, SparseDelta], optimizer: torch.optim.Optimizer) -> None:
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, delta in deltas.items():
        if id(delta.values) not in trained:
            raise ValueError(
                f"{name}.values is not among the parameters of the optimizer; make the optimizer after the adapter, "
                f"with all of its parameters (a strategy that shards or flattens parameters cannot be used)"
            )
        if isinstance(optimizer, SftSM3) and optimizer.deltas.get(delta.values) is not delta:
            raise ValueError(f"{name} is not in the `deltas` that SftSM3 was made with; map {name}.values to it")


def _all_finite(tensors: Any) -> bool:
    flags = [tensor.isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


# ---- Ranking ----


def _offer(delta: SparseDelta, statistics: _Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `exchange` takes: `(magnitude, slots, is_active, score)`; no candidates if nothing was gathered."""
    indices = delta.indices.detach()
    candidates, total = (delta.candidates, statistics.total) if statistics.updates else (indices[:0],) * 2
    return _magnitude(delta), *find(candidates, indices), _slot_norm(total.float())


def _magnitude(delta: SparseDelta) -> Tensor:
    """Size of each slot's values, (k,), float32 or wider; NaN counts as infinite, so that a ranking of all exists."""
    values = delta.values.detach()
    sizes = _slot_norm(values.to(torch.promote_types(values.dtype, torch.float32)))
    return sizes.nan_to_num(nan=math.inf, posinf=math.inf)


def _slot_norm(numbers: Tensor) -> Tensor:
    """Score of each slot, (k,), from a number for each of its elements: (k,) or (k, s)."""
    return numbers.abs() if numbers.dim() == 1 else torch.linalg.vector_norm(numbers, dim=1)


def largest_products(rows: Tensor, columns: Tensor, active: Tensor, count: int) -> Tensor:
    """Inactive positions (i, j) of largest rows[i] * columns[j], without the matrix of these products.

    With the columns in descending order, the products above any threshold are a prefix of every row. So the threshold
    is found by bisection over the bit patterns of float64 (in which products of float32 numbers are exact), counting
    prefixes, and only what lies above it is ever listed. Memory: O(R + C + k + count). All on the CPU, where hundreds
    of tiny operations cost less than as many kernel launches.

    Args:
        rows: (R,) numbers >= 0.
        columns: (C,) numbers >= 0.
        active: (k,) int64, sorted flat row-major positions to leave out.
        count: At most R * C - k.

    Returns:
        (count,) int64 on the device of `active`, sorted. Among equal products the lower position comes first.
    """
    device, active = active.device, active.cpu()
    if count == 0:
        return active[:0].to(device)
    products = _RankOne(rows, columns)
    active_products = products.at(active)
    ascending = active_products.sort().values

    # Bit patterns of numbers >= 0 are ordered like the numbers. Invariant: at least `count` inactive products are >=
    # the number at `low`, fewer are >= the one at `high`; `reach_*` are the prefixes of each row that are >= it.
    low, high = 0, _to_bits(products.maximum()) + 1
    reach_low = torch.full_like(products.row_offsets, products.width)
    reach_high = torch.zeros_like(reach_low)
    while high - low > 1:
        middle = (low + high) // 2
        threshold = _to_number(middle)
        reach = products.reach(threshold, reach_high, reach_low)
        inactive = int(reach.sum()) - active.numel() + int(torch.searchsorted(ascending, threshold))
        if inactive >= count:
            low, reach_low = middle, reach
        else:
            high, reach_high = middle, reach
        if inactive == count:
            return _without(products.positions(torch.zeros_like(reach), reach), active).to(device)

    # Everything above the threshold, and as many of the ties at it as are wanted, whole rows first.
    above = _without(products.positions(torch.zeros_like(reach_high), reach_high), active)
    missing = count - above.numel()
    active_ties = active[active_products == _to_number(low)].div(products.width, rounding_mode="floor")
    ties = (reach_low - reach_high - active_ties.bincount(minlength=reach_low.numel())).cumsum(0)
    last_row = int(torch.searchsorted(ties, missing))
    reach_low[last_row + 1 :] = reach_high[last_row + 1 :]
    tied = _without(products.positions(reach_high, reach_low), active)[:missing]
    return torch.cat([above, tied]).sort().values.to(device)


class _RankOne:
    """The R x C matrix of all products of two vectors >= 0, as far as one can know it without forming it; NaN is 0."""

    def __init__(self, *factors: Tensor) -> None:
        # (R,), (C,) float64, on the CPU
        self.rows, self.columns = (factor.detach().cpu().nan_to_num(nan=0.0).double() for factor in factors)
        self.descending, self.order = self.columns.sort(descending=True)
        self.width = self.columns.numel()
        self.row_offsets = torch.arange(len(self.rows)) * self.width  # (R,) flat position of the first of each row

    def at(self, positions: Tensor) -> Tensor:
        """The products at flat positions."""
        columns = self.columns[positions.remainder(self.width)]
        return self.rows[positions.div(self.width, rounding_mode="floor")] * columns

    def maximum(self) -> float:
        return float(self.rows.max() * self.descending[0])

    def reach(self, threshold: float, least: Tensor, most: Tensor) -> Tensor:
        """(R,) for each row the number of its products >= threshold, known to lie between `least` and `most`."""
        least, most = least.clone(), most.clone()
        for _ in range(int((most - least).max()).bit_length()):
            middle = (least + most) // 2
            reached = (self.rows * self.descending[middle.clamp(max=self.width - 1)] >= threshold) & (middle < most)
            least = torch.where(reached, middle + 1, least)
            most = torch.where(reached, most, middle)
        return least

    def positions(self, start: Tensor, stop: Tensor) -> Tensor:
        """Sorted flat positions of the start[i]-th to (stop[i] - 1)-th largest products of every row i."""
        lengths = stop - start
        first = lengths.cumsum(0) - lengths
        rank = torch.arange(int(lengths.sum())) + (start - first).repeat_interleave(lengths)
        return (self.row_offsets.repeat_interleave(lengths) + self.order[rank]).sort().values


def _without(positions: Tensor, active: Tensor) -> Tensor:
    return positions[~find(positions, active)[1]] if active.numel() else positions


def _to_bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _to_number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
