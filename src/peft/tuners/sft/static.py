"""Positions chosen once, before training: `select_static`, for `SftConfig(selection_algorithm="static")`.

A weight's score is its magnitude, or comes from the gradients of a few batches: |sum of the gradients| ("gradient", the
first-order saliency that SpIEL-AG grows by, measured at the start), or the sum of the squared gradients, one per batch
("fisher": the diagonal of the empirical Fisher information, as in FISH Mask, arXiv 2111.09839, section 3, but of
batches instead of single examples). The positions of largest score are trained, per layer, or over all layers with
`budget="global"`.

Gradients are of whole weights, so they are summed for as many layers at a time as a workspace holds, and the batches
are gone through once for every such group of layers.

Of a structured delta the groups of largest norm (of weights, of summed gradients) or of largest sum (of squared
gradients) are taken.

Left out: a loss scale. Under float16 autocast small gradients may vanish; calibrate in bfloat16 or float32.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...utils.other import frozen
from ...utils.quantization_utils import is_quantized
from ...utils.warning import warn
from .budget import Pool, largest
from .config import choices
from .parallel import find_group
from .selector import sft_model

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .layer import SftLayer, SparseDelta

WORKSPACE_BYTES = 2**30
"""Bound of what is summed up at a time, by default."""


def select_static(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    criterion: str | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    progress: bool = True,
    process_group: ProcessGroup | None | str = "auto",
) -> None:
    """Choose where the active SFT adapter will be trained. `SftTrainer` does it by itself.

    The model, its parameters, their `.grad` and all random number generators are left as they were; only the adapter's
    `indices` change. Gradients are taken without dropout: everything is in evaluation mode meanwhile, but for modules
    with gradient checkpointing, which would lose it.

    In a data-parallel run call it on every rank: all batches of all ranks count, and all ranks choose the same.

    Args:
        model: The model with a new SFT adapter (values all 0): PeftModel, tuner, or a wrapper that has either as
            `module`; the wrapper itself is not run.
        batches: For "gradient" and "fisher", on the model's device. They are held in a list, and each is used as often
            as there are groups of layers.
        loss_fn: `loss_fn(model, batch)` returns the scalar loss. None: `model(**batch).loss`.
        criterion: "gradient", "fisher", "magnitude", or "random", which leaves the random positions of a new adapter
            as they are. None: what the adapter's configuration says.
        workspace_bytes: Bound of the sums: layers are taken together while theirs fit (4 bytes per element of the
            weight, for "fisher" the size of a gradient more), but at least one at a time. The gradient and the ranking
            of one layer come on top.
        progress: Show a bar.
        process_group: The processes whose batches count; as for `SftSelector`.

    Raises:
        ValueError: Values that are trained already, no batches, no loss, gradients that are not finite, an unknown
            criterion or none, or no layer whose weight the loss depends on.
    """
    tuner = sft_model(model)
    active = list(tuner.active_deltas())
    criterion = _resolve_criterion(tuner, criterion)
    for _, name, delta in active:
        if delta.values.count_nonzero():
            raise ValueError(
                f"{name} has been trained already, and its values belong to its positions: choose positions for a new "
                f"adapter, before training"
            )
    if criterion == "random":
        for _, _, delta in active:
            delta.is_selected = True
        return
    if criterion == "magnitude":
        weights = ((name, delta, layer.op.to_view(layer.op.load()[0])) for layer, name, delta in active)
        scores = ((name, delta, _of_slots(delta, weight.reshape(-1).abs())) for name, delta, weight in weights)
    else:
        batches = list(batches) if batches is not None else []
        if not batches:
            raise ValueError(f"criterion={criterion!r} needs `batches` of the training data, got none")
        loss_fn, group = loss_fn or _loss_of_model, find_group(model, process_group)
        scores = _gradient_scores(tuner, active, batches, loss_fn, criterion, workspace_bytes, progress, group)
    elastic = {delta.elastic for _, _, delta in active}
    if len(elastic) > 1:
        raise ValueError(
            "Some of the active adapters have budget='global' and some 'per_layer': activate one at a time"
        )
    with torch.no_grad():
        unseen = _place_anywhere(scores, active) if elastic == {True} else _place(scores)
    if len(unseen) == len(active):
        raise ValueError(
            "The loss depends on none of the adapted layers, so their gradients say nothing: is the adapter disabled "
            "or merged, or are the batches of another kind than in training?"
        )
    if unseen:
        warn(
            f"{len(unseen)} adapted layers took no part in the calibration, such as {unseen[:3]}; they keep random "
            "positions. Use more batches if they will be trained"
        )
    for _, _, delta in active:
        delta.is_selected = True


def _resolve_criterion(tuner: nn.Module, criterion: str | None) -> str:
    if criterion is None:
        configs = [tuner.peft_config[name] for name in tuner.active_adapters]
        found = {config.static_criterion for config in configs}
        if len(found) != 1 or found == {None}:
            raise ValueError(
                f"The active adapters' configurations have static_criterion {sorted(map(str, found))}: make the "
                f"adapter with SftConfig(selection_algorithm='static'), or give `criterion`"
            )
        criterion = found.pop()
    if criterion not in choices("static_criterion"):
        raise ValueError(f"criterion must be one of {choices('static_criterion')}, got {criterion!r}")
    return criterion


# ---- Scores: (name, delta, scores (n,) >= 0 or None if the layer was not used), one layer after the other ----

Scores = Iterator[tuple[str, "SparseDelta", Tensor | None]]


def _of_slots(delta: SparseDelta, sizes: Tensor) -> Tensor:
    """Scores of what can be chosen from the sizes (n,) of single weights: these, or the squared norm of each group."""
    return sizes if delta.layout is None else delta.layout.squares(sizes)


def _gradient_scores(tuner, active, batches, loss_fn, criterion, workspace_bytes, progress, process_group) -> Scores:
    groups = _groups(active, criterion == "fisher", workspace_bytes)
    with tqdm(total=len(groups) * len(batches), desc="Choosing weights", disable=not progress) as bar:
        for group in groups:
            sums = [_GradientSum(layer, delta, squared=criterion == "fisher") for layer, _, delta in group]
            with _observed(tuner, sums), undisturbed_randomness():  # every group sees the same random numbers
                for batch in batches:
                    with torch.enable_grad():
                        loss = loss_fn(tuner, batch)
                    if loss.requires_grad:  # else it depends on no layer of this group
                        loss.backward()
                    for one in sums:
                        one.end_batch()
                    bar.update()
            for (_, name, delta), one in zip(group, sums):
                yield name, delta, one.scores(name, process_group)


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ValueError(f"A batch is a {type(batch).__name__}, not a dict for model(**batch): give `loss_fn`")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("The model returned no loss: put labels into the batches, or give `loss_fn`")
    return loss


def _groups(active: Sequence[tuple], squared: bool, workspace_bytes: int) -> list[list[tuple]]:
    groups: list[list[tuple]] = []
    used = 0
    for entry in active:
        layer, _, delta = entry
        size = delta.dense_numel * _sum_dtype(layer).itemsize * (2 if squared else 1)
        if not groups or used + size > workspace_bytes:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += size
    return groups


class _GradientSum:
    """The gradients of one weight (n elements), or their squares, summed over batches."""

    def __init__(self, layer: SftLayer, delta: SparseDelta, squared: bool) -> None:
        self.delta, self.squared = delta, squared
        self.total = torch.zeros(delta.dense_numel, dtype=_sum_dtype(layer), device=delta.indices.device)  # (n,)
        self.of_batch: Tensor | None = None  # (n,), if squared: sum over the uses of the weight in one batch
        self.uses = 0

    def __call__(self, stored: Tensor) -> Tensor:
        """The same weight, with its gradient observed."""
        if not stored.requires_grad:  # else another adapter has begun
            stored = stored.detach().requires_grad_()
            stored.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        stored.register_hook(self._observe)
        return stored

    def _observe(self, gradient: Tensor) -> None:
        self.uses += 1
        gradient = gradient.reshape(-1).to(self.total.dtype)
        if not self.squared:
            self.total.add_(gradient)
        else:
            self.of_batch = gradient if self.of_batch is None else self.of_batch + gradient

    def end_batch(self) -> None:
        if self.of_batch is not None:
            self.total.addcmul_(self.of_batch, self.of_batch)
            self.of_batch = None

    def scores(self, name: str, group: ProcessGroup | None) -> Tensor | None:
        """One of each slot that can be chosen, over the batches of all ranks; None if none of them used the layer."""
        uses = torch.tensor(self.uses, device=self.total.device)
        if group is not None:
            torch.distributed.all_reduce(uses, group=group)
            torch.distributed.all_reduce(self.total, group=group)
        if not self.total.isfinite().all():
            raise ValueError(f"The gradients of {name} in the calibration batches are not finite; is the loss?")
        if not uses:
            return None
        if self.squared and self.delta.layout is not None:
            self.total.sqrt_()
        return _of_slots(self.delta, self.total.abs_())


def _sum_dtype(layer: SftLayer) -> torch.dtype:
    """float32, or what is wider among the weight's type; a packed weight has no type of its own."""
    if is_quantized(layer.get_base_layer()):
        return torch.float32
    return torch.promote_types(layer.weight.dtype, torch.float32)


@contextlib.contextmanager
def _observed(model: nn.Module, sums: Sequence[_GradientSum]) -> Iterator[None]:
    """Let the sums see the gradients of their weights, while nothing else has gradients and there is no dropout."""
    with frozen(model):
        for module in model.modules():
            module.training = module.training and getattr(module, "gradient_checkpointing", False) is True
        try:
            for one in sums:
                one.delta.observer = one
            yield
        finally:
            for one in sums:
                one.delta.observer = None


@contextlib.contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """Put all random number generators back where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if accelerator is not None:
                devices = range(torch.accelerator.device_count())
                stack.enter_context(torch.random.fork_rng(devices=devices, device_type=accelerator.type))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _place(scores: Scores) -> list[str]:
    """Put every delta where the scores are largest; return the names of those whose layers were not used."""
    unseen = []
    for name, delta, score in scores:
        if score is None:
            unseen.append(name)
        else:
            delta.choose(largest(score, delta.indices.numel()).nonzero().squeeze(1))
    return unseen


def _place_anywhere(scores: Scores, active: Sequence[tuple[SftLayer, str, SparseDelta]]) -> list[str]:
    """As `_place`, under a global budget: where scores are largest over all layers."""
    total = sum(delta.indices.numel() for _, _, delta in active)
    pool, used, unseen = Pool(total), [], []
    for number, (name, delta, score) in enumerate(scores):
        if score is None:
            unseen.append(name)
            total -= delta.indices.numel()
        else:
            pool.add(number, score)
            used.append((number, delta))
    best = pool.best(total) if used else None
    for number, delta in used:
        delta.choose(best(number))
    return unseen
