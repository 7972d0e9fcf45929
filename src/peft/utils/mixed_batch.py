"""Mixed batches: the rows of one batch go different ways through a module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree  # transformers registers its ModelOutputs with it


def runs_of(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """`(name, start, stop)` of every run of rows that bear the same name."""
    stops = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(names)))
    return [(names[start], start, stop) for start, stop in zip([0, *stops], stops)]


def run_by_row(run: Callable[..., Any], names: Sequence[str | None], args: tuple, kwargs: dict) -> Any:
    """Call `run(name, *args, **kwargs)` once per distinct name, with the rows of the batch that bear it.

    The batch is the first tensor among the arguments. Other tensors with as many rows (masks, positions) are split
    along with it, everything else goes to every call as it is. The results, tensors or tuples, dicts and ModelOutputs
    of them, are put together in the order of the rows.

    Raises:
        ValueError: not one name per row.
        TypeError: no tensor among the arguments, or results that are not one row per row of the batch.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batch = next((leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.dim()), None)
    if batch is None:
        raise TypeError("A mixed batch needs a tensor with one row per name among the arguments; there is none")
    count = batch.shape[0]
    if len(names) != count:
        raise ValueError(
            f"adapter_names must name one adapter per row of the layer's input: got {len(names)} names for {count} rows"
        )
    rows: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    if len(rows) == 1:
        return run(names[0], *args, **kwargs)
    results = []
    for name, group in rows.items():
        part = [_rows(leaf, group) if _has_rows(leaf, count) else leaf for leaf in leaves]
        some_args, some_kwargs = pytree.tree_unflatten(part, spec)
        results.append(pytree.tree_flatten(run(name, *some_args, **some_kwargs)))
    first = results[0][1]
    if any(other != first for _, other in results):
        raise TypeError("In a mixed batch the adapters' results must have one form, but they differ in it")
    order = [row for group in rows.values() for row in group]
    sizes = [len(group) for group in rows.values()]
    joined = [_join(pieces, sizes, order) for pieces in zip(*(leaves for leaves, _ in results))]
    return pytree.tree_unflatten(joined, first)


def _has_rows(leaf: Any, count: int) -> bool:
    return torch.is_tensor(leaf) and leaf.dim() > 0 and leaf.shape[0] == count


def _rows(leaf: torch.Tensor, group: Sequence[int]) -> torch.Tensor:
    if group[-1] - group[0] < len(group):
        return leaf.narrow(0, group[0], len(group))
    return leaf.index_select(0, torch.tensor(group, device=leaf.device))


def _join(pieces: Sequence[Any], sizes: Sequence[int], order: Sequence[int]) -> Any:
    if all(piece is None for piece in pieces):
        return None
    if not all(_has_rows(piece, size) for piece, size in zip(pieces, sizes)):
        found = [tuple(p.shape) if torch.is_tensor(p) else type(p).__name__ for p in pieces]
        raise TypeError(
            f"The results of a mixed batch cannot be put together: expected tensors with {list(sizes)} rows (or None "
            f"everywhere), got {found}. Run the adapters one by one"
        )
    joined = torch.cat(list(pieces))
    if order == sorted(order):
        return joined
    return joined.index_select(0, torch.tensor(order, device=joined.device).argsort())
