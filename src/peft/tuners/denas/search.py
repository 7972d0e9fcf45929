"""Searching: how candidates are scored and remembered, and the engines that propose them.

Every engine goes through `Search.evaluate`: it refuses what was scored before and what is outside the budget, scores
the rest, and keeps the history. Optuna's engines are in `optuna_engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from ...utils.warning import warn
from .config import DenasConfig
from .knapsack import best_choice
from .score import de_score
from .space import MILLION, Budget, SearchSpace
from .supernet import Supernet


@dataclass(frozen=True)
class Record:
    """A candidate that was scored."""

    codes: np.ndarray
    score: float
    params: int
    latency: float | None
    """Milliseconds of a forward pass; None: it was not measured."""


class Scorer:
    """Scores candidates: by looking them up in a table of units and sizes, or by a pass of the supernet.

    Args:
        table: (U, V) values whose sum is the score; None: deltatuner's formula.
        net: for that formula, and for latencies.
    """

    def __init__(self, space: SearchSpace, config: DenasConfig, table: np.ndarray | None, net: Supernet | None):
        self.space, self.config, self.table, self.net = space, config, table, net

    def latency(self, codes: np.ndarray) -> float | None:
        """Milliseconds of a forward pass; None where nobody asks for it."""
        if not self.config.needs_latency:
            return None
        self.net.apply(codes)
        return 1000 * self.net.latency()

    def score(self, codes: np.ndarray, latency: float | None) -> float:
        if self.table is not None:
            return float(self.space.lookup(self.table, codes))
        terms = self.net.terms(codes)
        return de_score(terms, (latency or 0.0) / 1000, self.config, self.space.method)


class Search:
    """A search under way: its budget, its history, and what it has tried.

    Args:
        data: a checksum of what scores are measured on; searches with a common storage have the same.
    """

    def __init__(self, space: SearchSpace, scorer: Scorer, config: DenasConfig, progress: bool, data: int = 0):
        self.space, self.scorer, self.config, self.data = space, scorer, config, data
        self.budget: Budget = space.budget(config)
        self.rng = np.random.default_rng(config.seed)
        self.history: list[Record] = []
        self.seen: dict[bytes, Record | None] = {}
        self.front: list[Record] | None = None
        self.best: Record | None = None  # the highest score; among equals the fewest parameters, then the first
        self._bar = tqdm(desc="searching", unit="structure", disable=not progress, dynamic_ncols=True)

    def new(self, make: Callable[[], np.ndarray], count: int) -> Iterator[np.ndarray]:
        """Up to `count` candidates from `make`, within the budget of parameters, none of them scored before."""
        made: set[bytes] = set()
        for _ in range(count * self.config.scale_factor):
            if len(made) == count:
                return
            codes = self.space.fit(make(), self.budget, self.rng)
            if codes is not None and codes.tobytes() not in self.seen and codes.tobytes() not in made:
                made.add(codes.tobytes())
                yield codes

    def evaluate(self, codes: np.ndarray) -> Record | None:
        """Score a candidate and remember it; None, without a score, if it is outside the budget.

        What was scored before is not scored again.
        """
        key = codes.tobytes()
        if key in self.seen:
            return self.seen[key]
        params = int(self.space.params(codes))
        allowed = self.budget.min_params <= params <= self.budget.max_params and bool(codes[:, 0].any())
        latency = self.scorer.latency(codes) if allowed else None
        if latency is not None and not self.budget.allows_latency(latency):
            allowed = False
        if not allowed:
            self.seen[key] = None
            return None
        return self.remember(Record(codes, self.scorer.score(codes, latency), params, latency))

    def remember(self, record: Record) -> Record:
        self.seen[record.codes.tobytes()] = record
        self.history.append(record)
        if self.best is None or (record.score, -record.params) > (self.best.score, -self.best.params):
            self.best = record
        self._bar.update()
        self._bar.set_postfix(best=f"{self.best.score:.4g}", params=f"{self.best.params:,}", refresh=False)
        return record

    def run(self) -> Record:
        """Search with the configured engine, and return the best candidate. An interrupt keeps the best so far.

        Raises:
            ValueError: no candidate was within the budget.
        """
        from .optuna_engines import search_with_optuna

        engines = {"exact": exact, "evolutionary": evolutionary, "random": random_search}
        try:
            engines.get(self.config.engine, search_with_optuna)(self)
        except KeyboardInterrupt:
            if not self.history:
                raise
            warn(
                f"The search was interrupted after {len(self.history)} structures; the best of them is taken",
            )
        finally:
            self._bar.close()
        if self.best is None:
            raise ValueError(f"The search found no structure within the budget: {describe(self.budget)}")
        return self.best

    def rounds(self) -> Iterator[int]:
        """Numbers of rounds, until `max_epochs` or until `patience` rounds brought nothing better."""
        best, idle = -np.inf, 0
        for number in range(self.config.max_epochs):
            yield number
            score = -np.inf if self.best is None else self.best.score
            idle = 0 if score > best else idle + 1
            best = max(best, score)
            if self.config.patience is not None and idle >= self.config.patience:
                return


def describe(budget: Budget) -> str:
    """The limits in words."""
    text = f"{budget.min_params / MILLION:g} to {budget.max_params / MILLION:g} million parameters"
    if budget.needs_latency:
        text += f", {budget.min_latency or 0:g} to {budget.max_latency or float('inf'):g} ms"
    return text + ". Widen it, or let the search try more (max_epochs, population_num, scale_factor)"


# ---- Engines ----


def exact(search: Search) -> None:
    """The best structure of all within the budget, by dynamic programming over the table of scores.

    The empty structure is no answer: if nothing is worth anything, the cheapest layer is kept.
    """
    space, budget = search.space, search.budget
    groups = np.flatnonzero(space.usable)
    costs = [np.concatenate([[0], space.costs[i]]) for i in groups]
    values = [np.concatenate([[0.0], search.scorer.table[i]]) for i in groups]
    floor = max(budget.min_params, int(space.costs[space.usable].min()))
    choice = best_choice(costs, values, budget.max_params, floor)
    if choice is None:
        return
    codes = np.zeros((len(space.units), 1 + len(space.values)), dtype=np.int64)
    for i, option in zip(groups, choice):
        codes[i, 0] = option > 0
        codes[i, 1:2] = max(0, option - 1)
    search.evaluate(space.canonical(codes))


def random_search(search: Search) -> None:
    """Independent random candidates, fitted into the budget."""
    for _ in search.rounds():
        for codes in search.new(lambda: search.space.draw(search.rng), search.config.population_num):
            search.evaluate(codes)


def evolutionary(search: Search) -> None:
    """Each round keeps the best, crosses and mutates them, and fills up with random candidates."""
    config, space, rng = search.config, search.space, search.rng

    best: list[Record] = []

    def parent() -> np.ndarray:
        return best[rng.integers(len(best))].codes

    for _ in search.rounds():
        population: list[np.ndarray] = []
        if search.history:
            best = sorted(search.history, key=lambda record: -record.score)[: config.select_num]
            ways = (
                (lambda: space.mutate(parent(), config.m_prob, config.s_prob, rng), config.mutation_num),
                (lambda: space.cross(parent(), parent(), rng), config.crossover_num),
            )
            population = [codes for make, count in ways for codes in search.new(make, count)]
        population += search.new(lambda: space.draw(rng), config.population_num - len(population))
        for codes in population:
            search.evaluate(codes)
