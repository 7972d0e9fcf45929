"""Which positions are exchanged for which: pure functions over scores, for one layer or for several that compete.

With `SftConfig(budget="global")` the layers compete: what is dropped is smallest, and what grows is best, over all of
them, so the number of trained positions of a layer changes. Values and gradients of different layers are compared as
they are, without any scaling.

Letters: k trained positions and c candidates of a layer, m exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OFFERED = 0.6
"""Candidates of a layer per position that it has, and again per position that it would have of an even share. Twice
this, 1.2, are gathered per trained position in all: at 20 bytes each (position, gradient, two sums) 24 bytes."""


def find(wanted: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Slot of each wanted number in the sorted `ordered`, and whether it is there (else the slot says nothing)."""
    if not ordered.numel():
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    slots = torch.searchsorted(ordered, wanted).clamp_(max=ordered.numel() - 1)
    return slots, ordered[slots] == wanted


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask (n,) of the `count` <= n largest of scores (n,); among equal ones the first come first. None may be NaN."""
    if count == scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(scores.numel() - count + 1).values
    mask = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def candidate_counts(active: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """How many candidates each layer offers under a global budget, from its trained positions and its size.

    Half of them follow what the layer has, half its size, so that a layer that lost everything can come back.
    """
    even = sum(active) / max(1, sum(rooms))
    return [min(room, max(1, int(OFFERED * (k + even * room)))) for k, room in zip(active, rooms)]


def exchange(magnitude: Tensor, slots: Tensor, is_active: Tensor, score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Drop the `count` smallest of what is trained for the best candidates.

    What is dropped and grown at once stays as it is, and no more is given up than comes in.

    Args:
        magnitude: (k,) size of the trained values, not NaN.
        slots: (c,) slot of each candidate that is trained already; of the others it says nothing.
        is_active: (c,) whether it is.
        score: (c,) what the candidates promise, not NaN.
        count: At most k.

    Returns:
        (m,) sorted slots that are given up, and (m,) sorted numbers of the candidates that take their place.
    """
    dropped = largest(magnitude.neg(), count)
    stays = is_active & ~dropped[slots]
    eligible = (~stays).nonzero().squeeze(1)
    chosen = eligible[largest(score[eligible], min(count, eligible.numel()))]
    dropped[slots[chosen[is_active[chosen]]]] = False
    grown = chosen[~is_active[chosen]]
    given_up = dropped.nonzero().squeeze(1)
    return given_up[largest(magnitude[given_up].neg(), grown.numel())], grown


def exchange_anywhere(
    layers: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], count: int
) -> list[tuple[Tensor, Tensor]]:
    """`exchange` over several layers, each `(magnitude, slots, is_active, score)`, as if they were one.

    Returns:
        For each layer the slots given up and the candidates grown, not equally many.
    """
    sizes = [magnitude.numel() for magnitude, *_ in layers]
    device = layers[0][0].device
    first, shifted = 0, []
    for size, (_, slots, is_active, _) in zip(sizes, layers):
        shifted.append(torch.where(is_active, slots + first, 0).to(device))
        first += size
    magnitude, is_active, score = (torch.cat([layer[i].to(device) for layer in layers]) for i in (0, 2, 3))
    given_up, grown = exchange(magnitude, torch.cat(shifted), is_active, score, count)
    return list(zip(_per_layer(given_up, sizes), _per_layer(grown, [layer[3].numel() for layer in layers])))


def smallest_anywhere(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Slots of the `count` smallest over all layers, for each layer."""
    device = magnitudes[0].device
    chosen = largest(torch.cat([magnitude.to(device) for magnitude in magnitudes]).neg(), count).nonzero().squeeze(1)
    return _per_layer(chosen, [magnitude.numel() for magnitude in magnitudes])


def _per_layer(chosen: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Sorted numbers in a concatenation of `sizes` -> the numbers within each part."""
    edges = torch.tensor([0, *sizes], device=chosen.device).cumsum(0)
    bounds = torch.searchsorted(chosen, edges).tolist()
    return [chosen[bounds[i] : bounds[i + 1]] - edges[i] for i in range(len(sizes))]


def best_anywhere(offer: Callable[[int, int], tuple[Tensor, Tensor]], rooms: Sequence[int], count: int) -> list[Tensor]:
    """The `count` best positions over all layers, where a layer can only say which its best few are.

    Every layer starts with a few, and a layer all of whose offers were taken is asked for twice as many.

    Args:
        offer: `offer(layer, n)` returns `(positions, scores)`, both (n,), of the n best of a layer, on the CPU.
        rooms: How many a layer has to offer at most.
        count: At most all rooms together.
    """
    wanted = [min(room, 2 * (count // len(rooms)) + 1) for room in rooms]
    offers = [offer(layer, n) for layer, n in enumerate(wanted)]
    while True:
        scores = torch.cat([score for _, score in offers])
        chosen = largest(scores, min(count, scores.numel())).split(wanted)
        asked = [i for i, mask in enumerate(chosen) if mask.all() and wanted[i] < rooms[i]]
        if not asked:
            return [positions[mask] for (positions, _), mask in zip(offers, chosen)]
        for i in asked:
            wanted[i] = min(rooms[i], 2 * wanted[i])
            offers[i] = offer(i, wanted[i])


class Pool:
    """The best positions over layers whose scores come one layer after the other; O(count) memory."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.scores: Tensor | None = None
        self.layers: Tensor | None = None
        self.positions: Tensor | None = None

    def add(self, layer: int, scores: Tensor) -> None:
        """Take in the scores (n,) of all positions of a layer."""
        positions = largest(scores, min(self.count, scores.numel())).nonzero().squeeze(1)
        new = (scores[positions], torch.full_like(positions, layer), positions)
        if self.scores is not None:
            old = (self.scores, self.layers, self.positions)
            new = tuple(torch.cat([a, b.to(a.device)]) for a, b in zip(old, new))
        self.scores, self.layers, self.positions = new
        self._keep(self.count)

    def _keep(self, count: int) -> None:
        mask = largest(self.scores, min(count, self.scores.numel()))
        self.scores, self.layers, self.positions = self.scores[mask], self.layers[mask], self.positions[mask]

    def best(self, count: int) -> Callable[[int], Tensor]:
        """The sorted positions, by layer, of the `count` best."""
        self._keep(count)
        return lambda layer: self.positions[self.layers == layer]
