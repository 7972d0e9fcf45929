"""`DeltaTunerArguments`: deltatuner's fields, with its names and defaults."""

from __future__ import annotations

import dataclasses

from ..config import documented_dataclass
from ..tuners.denas.config import ENGINES, SCORES, DenasConfig, SearchSettings

ALGOS = ("auto", "lora", "ssf", "sft")
SEARCH_ENGINES = {
    "EvolutionarySearchEngine": "evolutionary",
    "RandomSearchEngine": "random",
    **{engine: engine for engine in ENGINES},
}
"""deltatuner's names of engines, and ours."""


@documented_dataclass
class DeltaTunerArguments(SearchSettings):
    """What `optimize` does; for programs and `transformers.HfArgumentParser`.

    Raises:
        ValueError: a value that is not possible; it is named with the rule.
    """

    search_engine: str = "EvolutionarySearchEngine"
    """"EvolutionarySearchEngine", "RandomSearchEngine", or one of our engines: "exact", "tpe", "nsga2"."""
    model_id: str | None = None
    """Name of the base model, for the configuration of the adapter; None: what the model says itself."""
    img_size: int = 32
    """Tokens in each row of the batch."""
    max_param_limits: float | None = None
    """Most trained parameters, in millions; None: as many as the adapter that the search starts from."""
    min_param_limits: float | None = None
    """Fewest trained parameters, in millions."""
    budget_latency_max: float | None = None
    """Longest forward pass, in milliseconds."""
    budget_latency_min: float | None = None
    """Shortest forward pass, in milliseconds."""
    layer_name: str = "num_hidden_layers"
    """Key of structures that says which layers are on."""
    best_model_structure: str | None = None
    """A file that holds the structure, or the structure itself; nothing is searched then."""
    search_space_name: str | None = None
    """deltatuner's name of the ranges to search. There is one set of ranges for each algorithm here, so None or the
    algorithm's name."""
    random_seed: int = 12345
    """Of the search."""
    denas: bool = True
    """Whether to search; False leaves LoRA as it is, or puts the algorithm on all its targets."""
    ssf_target_module: list[str] | str | None = None
    """Modules that SSF, or SFT, may take, as target_modules; None: every linear layer."""
    task_type: str = "CAUSAL_LM"
    """The task of the adapter where the model has none yet."""
    algo: str = "auto"
    """"lora", "ssf", "sft", or "auto": lora for a model that has LoRA already, else ssf."""
    score: str | None = None
    """The score, "deltatuner" or "gradient_coherence". None: "deltatuner", and for sft and the engine "exact", which it
    is not for, "gradient_coherence"."""

    def __post_init__(self):
        if self.algo not in ALGOS:
            raise ValueError(f"algo must be one of {ALGOS}, got {self.algo!r}")
        if self.search_engine not in SEARCH_ENGINES:
            raise ValueError(
                f"search_engine must be one of {sorted(SEARCH_ENGINES)}, got {self.search_engine!r}"
                + (" (SigOpt's service is closed: 'tpe' or 'nsga2' search by Optuna)" if "igopt" in
                   self.search_engine.lower() else "")
            )  # fmt: skip
        if self.score not in (None, *SCORES):
            raise ValueError(f"score must be one of {SCORES} or None, got {self.score!r}")
        if self.search_space_name not in (None, *ALGOS[1:]):
            raise ValueError(f"search_space_name must be None or one of {ALGOS[1:]}, got {self.search_space_name!r}")

    def to_search(self, algo: str) -> DenasConfig:
        """The search that these arguments describe.

        Raises:
            ValueError: values that exclude each other.
        """
        if self.search_space_name not in (None, algo):
            raise ValueError(f"search_space_name={self.search_space_name!r} is not that of algo={algo!r}")
        engine = SEARCH_ENGINES[self.search_engine]
        score = self.score or ("gradient_coherence" if algo == "sft" or engine == "exact" else "deltatuner")
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(SearchSettings)}
        return DenasConfig(
            **same,
            score=score,
            engine=engine,
            patience=None,
            sequence_length=self.img_size,
            max_params=self.max_param_limits,
            min_params=self.min_param_limits,
            max_latency=self.budget_latency_max,
            min_latency=self.budget_latency_min,
            seed=self.random_seed,
        )
