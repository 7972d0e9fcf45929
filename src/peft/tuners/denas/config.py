"""Configurations: `DenasConfig`, of a search, and `CompactLoraConfig`, of a LoRA whose structure was searched."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from ...config import documented
from ...utils.peft_types import PeftType
from ..lora.config import LoraConfig
from .layout import GRANULARITIES

OBJECTIVES = ("score", "params", "latency")
ENGINES = ("exact", "evolutionary", "random", "tpe", "nsga2")
SCORES = ("gradient_coherence", "deltatuner")
WEIGHTS = ("expressivity_weight", "complexity_weight", "diversity_weight", "saliency_weight", "latency_weight")


@dataclass
class SearchSettings:
    """What deltatuner's arguments and ours have in common, by deltatuner's names and with its defaults."""

    population_num: int = 50
    """Candidates of one round, in every engine but "exact"."""
    select_num: int = 50
    """Best candidates that the next round of "evolutionary" is made from."""
    crossover_num: int = 25
    """Candidates of a round that are crossed from two of these."""
    mutation_num: int = 25
    """Candidates of a round that are mutated from one of these."""
    max_epochs: int = 10
    """Rounds."""
    m_prob: float = 0.2
    """Probability that a mutation draws a size of a layer anew."""
    s_prob: float = 0.4
    """Probability that a mutation switches a layer on or off."""
    scale_factor: int = 10
    """Tries for each candidate that is needed, before a round goes on with fewer."""
    expressivity_weight: float = 0.0
    """Weights of the terms of the score "deltatuner"; see `peft.tuners.denas.score`."""
    complexity_weight: float = 0.0
    """Likewise."""
    diversity_weight: float = 1.0
    """Likewise."""
    saliency_weight: float = 1.0
    """Likewise."""
    latency_weight: float = 0.0
    """Likewise, of the time of a forward pass in seconds."""
    batch_size: int = 4
    """Rows of the batch that is made where none is given."""


@documented
@dataclass
class DenasConfig(SearchSettings):
    """A train-free search for the structure of an adapter: which layers get one, and of what size.

    Raises:
        ValueError: a value outside its range, or one that has no meaning with the others.
    """

    score: Literal["gradient_coherence", "deltatuner"] = "gradient_coherence"
    """What says how good a structure is. "gradient_coherence" is a sum over layers, from one forward and backward pass;
    "deltatuner" is deltatuner's formula, from one pass for each candidate."""
    engine: Literal["exact", "evolutionary", "random", "tpe", "nsga2"] | None = None
    """How structures are searched: "exact" (the best of all within max_params; for scores that are sums),
    "evolutionary", "random", or Optuna's "tpe" and "nsga2" (several objectives, a Pareto front). None: "exact" where it
    is possible, else "evolutionary"."""
    granularity: Literal["layer", "module"] = "layer"
    """What is decided as one: all targets of a layer, or those of each type of module in it."""
    r_min: int = 1
    """Smallest rank of LoRA that is tried."""
    r_max: int = 12
    """Largest rank of LoRA that is tried."""
    r_step: int = 1
    """From one rank to the next."""
    alpha_min: int = 1
    """Smallest multiplier a of LoRA, with lora_alpha = a * r, that is tried. Only the score "deltatuner" depends on it;
    with the other it is lora_alpha / r of the adapter's configuration."""
    alpha_max: int = 6
    """Largest multiplier."""
    alpha_step: int = 1
    """From one multiplier to the next."""
    share_min: int = 1
    """Smallest share of an SFT layer that is tried; 4 is the density of the adapter's configuration."""
    share_max: int = 12
    """Largest share."""
    share_step: int = 1
    """From one share to the next."""
    max_params: float | None = None
    """Most trained parameters, in millions. None: as many as the adapter has as it is configured."""
    min_params: float | None = None
    """Fewest trained parameters, in millions."""
    max_latency: float | None = None
    """Longest forward pass of the batch, in milliseconds, measured on this machine. Not with "exact" or SFT."""
    min_latency: float | None = None
    """Shortest forward pass, in milliseconds."""
    patience: int | None = 3
    """Stop after so many rounds without a better score. None: never before max_epochs."""
    seed: int = 12345
    """Of the search and of the initial deltas that "deltatuner" scores."""
    sequence_length: int = 32
    """Tokens in each of its rows."""
    objectives: list[str] | None = None
    """What "nsga2" trades off, "score" and "params", "latency" or both. None: score and params."""
    storage: str | None = None
    """Where Optuna keeps the search: a journal file, or the URL of a database (sqlite:///search.db). A search that was
    interrupted goes on from there, and several processes search together."""
    study_name: str = "denas"
    """Name of the search in the storage."""

    def __post_init__(self):
        for name, allowed in (("score", SCORES), ("engine", (None, *ENGINES)), ("granularity", GRANULARITIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        self._check_numbers()
        if self.engine is None:
            self.engine = "exact" if self.is_additive and not self.needs_latency else "evolutionary"
        self._check_combinations()
        self._check_objectives()

    @property
    def is_additive(self) -> bool:
        """Whether the score is a sum over layers."""
        return self.score == "gradient_coherence"

    @property
    def needs_latency(self) -> bool:
        """Whether the time of a forward pass is to be measured for every candidate."""
        limits = self.max_latency is not None or self.min_latency is not None
        return limits or self.latency_weight > 0 or "latency" in (self.objectives or ())

    def _check_numbers(self):
        for name in ("r", "alpha", "share"):
            low, high, step = (getattr(self, f"{name}_{end}") for end in ("min", "max", "step"))
            if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high):
                raise ValueError(f"{name}_min..{name}_max must be whole numbers >= 1 in order, got {low!r}..{high!r}")
            if not isinstance(step, int) or step < 1:
                raise ValueError(f"{name}_step must be a whole number >= 1, got {step!r}")
        for name in ("population_num", "select_num", "max_epochs", "scale_factor", "batch_size", "sequence_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        for name in ("crossover_num", "mutation_num", "seed"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number >= 0, got {getattr(self, name)!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 or None, got {self.patience!r}")
        for name in ("m_prob", "s_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in ("max_params", "min_params", "max_latency", "min_latency"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if None not in (self.min_latency, self.max_latency) and self.min_latency > self.max_latency:
            raise ValueError(f"min_latency={self.min_latency} is more than max_latency={self.max_latency}")
        for name in WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")

    def _check_combinations(self):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self.is_additive:
            for name in (*WEIGHTS, "alpha_min", "alpha_max", "alpha_step"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name} has no meaning with score={self.score!r}, only with 'deltatuner'")
        if self.engine == "exact":
            if not self.is_additive:
                raise ValueError("engine='exact' needs a score that is a sum over layers, 'gradient_coherence'")
            if self.needs_latency:
                raise ValueError("engine='exact' knows parameters only: with a limit on latency choose another engine")
        if self.storage is not None and self.engine not in ("tpe", "nsga2"):
            raise ValueError(f"storage is Optuna's: it goes with engine 'tpe' or 'nsga2', got {self.engine!r}")
        if self.engine == "evolutionary" and self.crossover_num + self.mutation_num > self.population_num:
            raise ValueError(
                f"crossover_num + mutation_num = {self.crossover_num + self.mutation_num} is more than "
                f"population_num = {self.population_num}"
            )

    def _check_objectives(self):
        if self.engine != "nsga2":
            if self.objectives is not None:
                raise ValueError(f"objectives are what engine='nsga2' trades off; got engine={self.engine!r}")
            return
        self.objectives = list(self.objectives or ("score", "params"))
        known = set(self.objectives) <= set(OBJECTIVES) and len(set(self.objectives)) == len(self.objectives)
        if not known or len(self.objectives) < 2 or "score" not in self.objectives:
            raise ValueError(
                f"objectives must be 'score' and at least one more of {OBJECTIVES}, got {self.objectives!r}"
            )


@documented
@dataclass
class CompactLoraConfig(LoraConfig):
    """LoRA on the layers and with the ranks of a structure, which is given or searched for.

    What it makes is an ordinary LoRA: in the model and in files its configuration is a `LoraConfig` with the modules of
    the structure as targets, and rank_pattern and alpha_pattern. `best_model_structure.txt` beside it holds the
    structure. For a search `get_peft_model` takes `tokenizer` or `batch`; `result` is then what it found.

    Raises:
        ValueError: both or neither of best_structure and search, or a pattern beside them.
    """

    result = None  # the SearchResult of the search, when it has run; no field
    _tokenizer = _batch = None

    best_structure: dict[str, Any] | str | None = None
    """The structure: deltatuner's JSON object, a file that holds it, or the name of one that comes with the package."""
    search: DenasConfig | dict[str, Any] | None = None
    """How to search for one. None, without best_structure: as `DenasConfig()` says."""
    layer_name: str = "num_hidden_layers"
    """The key of the structure that says which layers are on."""

    def __post_init__(self):
        if isinstance(self.best_structure, os.PathLike):
            self.best_structure = os.fspath(self.best_structure)
        super().__post_init__()
        self.peft_type = PeftType.COMPACT_LORA
        if self.best_structure is not None and self.search is not None:
            raise ValueError("best_structure and search exclude each other: give the structure, or search for one")
        if isinstance(self.search, dict):
            self.search = DenasConfig(**self.search)
        if self.best_structure is None and self.search is None:
            self.search = DenasConfig()
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise ValueError(f"{name} is what the structure decides in a CompactLoraConfig: leave it out")

    def use_examples(self, tokenizer: Any = None, batch: Any = None) -> None:
        """What the search measures gradients on; see `search_structure`."""
        self._tokenizer, self._batch = tokenizer, batch

    def for_model(self, model) -> LoraConfig:
        """The LoRA of the structure, after the search where there is to be one."""
        from .model import search_structure
        from .structure import apply_structure

        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(LoraConfig)}
        plain = LoraConfig(**own | {"peft_type": PeftType.LORA})
        structure = self.best_structure
        if structure is None:
            self.result = search_structure(
                model, plain, self.search, self._tokenizer, self._batch, layer_name=self.layer_name
            )
            structure = self.result.structure
        return apply_structure(plain, model, structure, self.layer_name)
