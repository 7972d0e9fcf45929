"""The search space: candidates as small integer arrays, what each costs, how they are drawn, crossed and changed.

A candidate is an array `(U, 1 + D)`: for each of the U units of `Layout.units` whether it is on, and the number of its
choice in each of the D quantities (`r` and `alpha` for LoRA, `share` for SFT, none for SSF). What is off has choice 0
throughout, so that equal structures are equal arrays. Only the first quantity, the size, costs parameters.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import nn

from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig
from ..ops import Op
from .config import DenasConfig
from .layout import layout_of
from .structure import EVEN_SHARE, LAYER_NAME, SIZES, Structure, sft_weights

MILLION = 1_000_000


def lora_parameters(op: Op, r: int, bias: bool = False) -> int:
    """Parameters of a LoRA of rank r: A (r, I, *K) and B (O, r), with `lora_bias` a bias (O)."""
    inputs = op.matrix_shape[1]
    return r * (inputs + op.out_features) + (op.out_features if bias else 0)


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class Budget:
    """What a candidate must keep to: numbers of parameters, and milliseconds of a forward pass (None: no limit)."""

    max_params: int
    min_params: int = 0
    max_latency: float | None = None
    min_latency: float | None = None

    @property
    def needs_latency(self) -> bool:
        return self.max_latency is not None or self.min_latency is not None

    def allows_latency(self, latency: float) -> bool:
        high = float("inf") if self.max_latency is None else self.max_latency
        return (self.min_latency or 0.0) <= latency <= high


def _refuse_foreign_ranges(search: DenasConfig, method: PeftType) -> None:
    """Refuse ranges of quantities that the method's structures do not have."""
    defaults = {field.name: field.default for field in dataclasses.fields(search)}
    for quantity in ("r", "alpha", "share"):
        for name in (f"{quantity}_min", f"{quantity}_max", f"{quantity}_step"):
            if quantity not in SIZES[method] and getattr(search, name) != defaults[name]:
                raise ValueError(f"{name} has no meaning for {method.value}, whose structures have no {quantity!r}")


class SearchSpace:
    """All structures of an adapter on a model.

    Args:
        config: the adapter: a LoraConfig, SsfConfig or SftConfig.
        with_alpha: whether LoRA's multiplier of alpha is searched; else it is that of `config`.

    Attributes:
        costs: (U, V) parameters of each unit by size; SSF has V = 1.

    Raises:
        ValueError: no targets in numbered layers, a method that has no structures, or ranges of another method.
    """

    def __init__(self, model: nn.Module, config: TargetedConfig, search: DenasConfig, with_alpha: bool):
        if config.peft_type not in SIZES:
            raise ValueError(f"DE-NAS is for LORA, SSF and SFT, got {config.peft_type}")
        if config.peft_type == PeftType.SFT and config.granularity != "element":
            raise ValueError(f"DE-NAS searches SFT with granularity='element', got {config.granularity!r}")
        _refuse_foreign_ranges(search, PeftType(config.peft_type))
        self.method, self.config, self.granularity = PeftType(config.peft_type), config, search.granularity
        self.layout = layout_of(model, config)
        self.units = self.layout.units(search.granularity)
        ranges = {
            "r": range(search.r_min, search.r_max + 1, search.r_step),
            "share": range(search.share_min, search.share_max + 1, search.share_step),
            "alpha": range(search.alpha_min, search.alpha_max + 1, search.alpha_step)
            if with_alpha
            else [_whole(config.lora_alpha / config.r) if self.method == PeftType.LORA else 1],
        }
        self.values = [list(ranges[name]) for name in SIZES[self.method]]
        sizes = self.values[0] if self.values else [1]
        self.costs = np.array(
            [[sum(self._cost(key, size) for key in unit.keys) for size in sizes] for unit in self.units], dtype=np.int64
        )
        self.usable = np.array([bool(unit.keys) for unit in self.units])

    def _cost(self, key: str, size: int) -> int:
        op = self.layout.ops[key]
        if self.method == PeftType.LORA:
            return lora_parameters(op, size, self.config.lora_bias)
        if self.method == PeftType.SSF:
            return 2 * op.out_features
        return sft_weights(self.layout, key, self.config, size)

    @property
    def full_params(self) -> int:
        """Parameters of the adapter as its configuration has it: every target, rank `r` or the density asked for."""
        size = {PeftType.LORA: getattr(self.config, "r", 0), PeftType.SFT: EVEN_SHARE, PeftType.SSF: 1}[self.method]
        return sum(self._cost(key, size) for key in self.layout.places)

    def params(self, codes: np.ndarray) -> np.ndarray:
        """Parameters of candidates (..., U, 1 + D) -> (...)."""
        return self.lookup(self.costs, codes)

    def lookup(self, table: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Sum of the entries of a table (U, V) that candidates (..., U, 1 + D) choose -> (...)."""
        option = codes[..., 1] if self.values else np.zeros_like(codes[..., 0])
        return (table[np.arange(len(table)), option] * codes[..., 0]).sum(-1)

    def budget(self, search: DenasConfig) -> Budget:
        """The limits of a search; no maximum means the parameters of the adapter as it is configured.

        Raises:
            ValueError: limits that no candidate can meet.
        """
        most = int(self.costs[self.usable].max(axis=1).sum())
        least = int(self.costs[self.usable].min())
        maximum = self.full_params if search.max_params is None else round(search.max_params * MILLION)
        minimum = 0 if search.min_params is None else round(search.min_params * MILLION)
        if maximum < least:
            raise ValueError(
                f"max_params = {maximum / MILLION:g} million is less than the smallest structure needs, one layer with "
                f"{least:,} parameters: raise it to at least {least / MILLION:g}"
            )
        if minimum > most:
            raise ValueError(
                f"min_params = {minimum / MILLION:g} million is more than the largest structure has, {most:,} "
                "parameters: lower it, widen the ranges, or name more target_modules"
            )
        if minimum > maximum:
            raise ValueError(
                f"min_params = {minimum / MILLION:g} million is more than max_params = {maximum / MILLION:g} million"
                + (" (the adapter as it is configured; give max_params)" if search.max_params is None else "")
            )
        return Budget(maximum, minimum, search.max_latency, search.min_latency)

    # Candidates

    def encode(self, structure: Structure) -> np.ndarray:
        """The candidate of a structure.

        Raises:
            ValueError: another granularity, or a size outside the ranges.
        """
        if structure.granularity != self.granularity:
            raise ValueError(f"The structure is per {structure.granularity}, the search is per {self.granularity}")
        codes = np.zeros((len(self.units), 1 + len(self.values)), dtype=np.int64)
        codes[:, 0] = np.array(structure.on) * self.usable
        for d, (name, values) in enumerate(zip(SIZES[self.method], self.values), start=1):
            for i in np.flatnonzero(codes[:, 0]):
                if structure.sizes[name][i] not in values:
                    raise ValueError(f"{name}={structure.sizes[name][i]!r} is not among the values searched, {values}")
                codes[i, d] = values.index(structure.sizes[name][i])
        return codes

    def decode(self, codes: np.ndarray) -> Structure:
        """The structure of a candidate."""
        sizes = {
            name: tuple(values[i] for i in codes[:, d])
            for d, (name, values) in enumerate(zip(SIZES[self.method], self.values), start=1)
        }
        return Structure(self.granularity, tuple(int(on) for on in codes[:, 0]), sizes)

    def to_dict(self, codes: np.ndarray, layer_name: str = LAYER_NAME) -> dict:
        return self.decode(codes).to_dict(self.layout, layer_name)

    def canonical(self, codes: np.ndarray) -> np.ndarray:
        """A copy without the choices of what is off, and without layers that have no targets."""
        codes = codes.copy()
        codes[..., 0] *= self.usable
        codes[..., 1:] *= codes[..., :1]
        return codes

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A candidate at random: on or off with even odds, sizes uniform."""
        on = rng.integers(0, 2, len(self.units))
        return self.canonical(np.stack([on, *self._draw_sizes(rng)], axis=1))

    def _draw_sizes(self, rng: np.random.Generator) -> list[np.ndarray]:
        return [rng.integers(0, len(values), len(self.units)) for values in self.values]

    def mutate(self, codes: np.ndarray, m_prob: float, s_prob: float, rng: np.random.Generator) -> np.ndarray:
        """Flip each unit on or off with probability `s_prob`, draw each of its sizes anew with `m_prob`."""
        codes = codes.copy()
        codes[:, 0] ^= rng.random(len(codes)) < s_prob
        for d, new in enumerate(self._draw_sizes(rng), start=1):
            codes[:, d] = np.where(rng.random(len(codes)) < m_prob, new, codes[:, d])
        return self.canonical(codes)

    def cross(self, a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Each unit from one parent or the other, with even odds."""
        return np.where(rng.integers(0, 2, (len(a), 1)) == 1, a, b)

    def fit(self, codes: np.ndarray, budget: Budget, rng: np.random.Generator) -> np.ndarray | None:
        """Bring a candidate into the budget of parameters by shrinking or growing units in random order.

        A random structure hardly ever meets a tight budget, and a search that only throws away would score nothing.

        Returns:
            The candidate; None: it could not be brought into the budget.
        """
        codes = codes.copy()
        usable = np.flatnonzero(self.usable)
        if not codes[:, 0].any():
            codes[rng.choice(usable), 0] = 1
        for _ in range(4 * len(usable) * self.costs.shape[1]):
            total = int(self.params(codes))
            if budget.min_params <= total <= budget.max_params:
                return self.canonical(codes)
            if not self._step(codes, -1 if total > budget.max_params else 1, rng):
                return None
        return None

    def _step(self, codes: np.ndarray, direction: int, rng: np.random.Generator) -> bool:
        """Make one random unit a step smaller (down to off) or larger; whether there was one."""
        on, size = codes[:, 0], codes[:, 1] if self.values else np.zeros(len(codes), dtype=np.int64)
        last = self.costs.shape[1] - 1
        if direction > 0:
            able = np.flatnonzero(self.usable & ((on == 0) | (size < last)))
        else:  # the last unit that is on cannot be switched off
            able = np.flatnonzero((on == 1) & ((size > 0) | (on.sum() > 1)))
            if not able.size:  # one unit of the smallest size, which is too large: try another one
                cheapest = np.flatnonzero(self.usable & (self.costs[:, 0] == self.costs[self.usable, 0].min()))
                if on[cheapest].any():
                    return False
                codes[:] = 0
                codes[rng.choice(cheapest), 0] = 1
                return True
        if not able.size:
            return False
        i = rng.choice(able)
        if direction > 0 and on[i] == 0:
            codes[i, 0] = 1
            codes[i, 1:2] = 0
        elif direction < 0 and size[i] == 0:
            codes[i] = 0
        else:
            codes[i, 1] += direction
        return True
