"""The exact best choice within a budget (multiple-choice knapsack), for scores that are sums over layers.

Dynamic programming over the layers keeps, of all partial choices, those that no cheaper one equals, and drops those
that even the continuous relaxation (Dantzig's bound: the steepest steps of each layer's concave hull, the last one in
part) cannot lift to a choice that is known already. Where returns diminish with size, as they do here, few survive, so
the cost hardly depends on the size of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TOLERANCE = 1e-12
"""Relative to the values; a partial choice is dropped only if its bound is smaller by more than rounding."""


def best_choice(
    costs: Sequence[np.ndarray], values: Sequence[np.ndarray], maximum: int, minimum: int = 0
) -> list[int] | None:
    """Choose one option of each group, of largest total value, with `minimum <= total cost <= maximum`.

    Args:
        costs, values: for each group (options,) whole numbers >= 0, and finite numbers.

    Returns:
        The number of the option chosen in each group; None: no choice is within the budget.
    """
    costs = [np.asarray(cost, dtype=np.int64) for cost in costs]
    values = [np.asarray(value, dtype=np.float64) for value in values]
    found = _solve(costs, values, maximum, 0)
    if found is None or minimum <= 0 or sum(cost[i] for cost, i in zip(costs, found)) >= minimum:
        return found
    return _solve(costs, values, maximum, minimum)


def _solve(costs: list[np.ndarray], values: list[np.ndarray], maximum: int, minimum: int) -> list[int] | None:
    least = -np.inf  # value of a choice that is known to exist
    slack = TOLERANCE * max(float(np.abs(value).sum()) for value in values) * len(values)
    hulls = [_hull(cost, value) for cost, value in zip(costs, values)]
    cost, value = np.zeros(1, dtype=np.int64), np.zeros(1)
    back: list[tuple[np.ndarray, np.ndarray]] = []  # for each group: of each state, the state before and the option
    for group, (group_cost, group_value) in enumerate(zip(costs, values)):
        new_cost = (cost[:, None] + group_cost).ravel()
        new_value = (value[:, None] + group_value).ravel()
        rest = _Rest(costs[group + 1 :], values[group + 1 :], hulls[group + 1 :])
        upper, lower = rest.bounds(maximum - new_cost)
        if minimum == 0:
            least = max(least, float((new_value + lower).max()))
        kept = np.flatnonzero((upper > -np.inf) & (new_value + upper >= least - slack))
        # By cost, the most valuable first among equals; then only those that are worth more than all cheaper ones.
        kept = kept[np.lexsort((-new_value[kept], new_cost[kept]))]
        if minimum == 0:
            before = np.maximum.accumulate(np.concatenate([[-np.inf], new_value[kept]]))[:-1]
            kept = kept[new_value[kept] > before]
        elif kept.size:
            kept = kept[np.concatenate([[True], np.diff(new_cost[kept]) > 0])]
        if not kept.size:
            return None
        back.append((kept // len(group_cost), kept % len(group_cost)))
        cost, value = new_cost[kept], new_value[kept]
    allowed = np.flatnonzero(cost >= minimum)
    if not allowed.size:
        return None
    state, chosen = int(allowed[np.argmax(value[allowed])]), []
    for states, options in reversed(back):
        chosen.append(int(options[state]))
        state = int(states[state])
    return chosen[::-1]


def _hull(cost: np.ndarray, value: np.ndarray) -> list[int]:
    """Options on the upper concave hull, from the cheapest to the most valuable."""
    hull: list[int] = []
    for i in np.lexsort((-value, cost)):
        if hull and value[i] <= value[hull[-1]]:
            continue
        if hull and cost[i] == cost[hull[-1]]:
            hull.pop()
        while len(hull) > 1:
            a, b = hull[-2:]
            if (value[b] - value[a]) * (cost[i] - cost[b]) > (value[i] - value[b]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(int(i))
    return hull


class _Rest:
    """What the remaining groups can add, as a function of what is left of the budget: steps of all hulls by steepness.

    Returns diminish along a hull, so any number of these steps, from the first, is a choice.
    """

    def __init__(self, costs, values, hulls):
        self.base_cost = sum(int(cost[hull[0]]) for cost, hull in zip(costs, hulls))
        self.base_value = float(sum(value[hull[0]] for value, hull in zip(values, hulls)))
        pairs = [(c, v, a, b) for c, v, hull in zip(costs, values, hulls) for a, b in zip(hull, hull[1:])]
        price = np.array([c[b] - c[a] for c, _, a, b in pairs], dtype=np.float64)
        gain = np.array([v[b] - v[a] for _, v, a, b in pairs], dtype=np.float64)
        order = np.argsort(-gain / price, kind="stable")
        self.price = np.concatenate([[0.0], np.cumsum(price[order])])
        self.gain = np.concatenate([[0.0], np.cumsum(gain[order])])

    def bounds(self, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Upper bound (the last step taken in part) and a value that is reached (without it); -inf: nothing fits."""
        room = left - self.base_cost
        upper = self.base_value + np.interp(room, self.price, self.gain)
        lower = self.base_value + self.gain[np.maximum(np.searchsorted(self.price, room, side="right") - 1, 0)]
        return np.where(room >= 0, upper, -np.inf), np.where(room >= 0, lower, -np.inf)
