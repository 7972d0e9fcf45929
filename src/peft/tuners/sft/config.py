"""Configuration of sparse fine-tuning, for programs (`SftConfig`) and for command lines (`SftArguments`)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal, get_type_hints

from ...config import check_least, documented_dataclass, literal_values
from ...utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig


@dataclass
class _SftOptions:
    """The fields that a program and a command line both set."""

    density: float = 0.01
    """Share of the number of parameters of the whole base model that is trained, in (0, 1]."""
    num_tunable_weights: int | None = None
    """Number of weights that are trained, in all; overrides density."""
    granularity: Literal["element", "row", "column", "block"] = "element"
    """What is chosen as one: single weights; all weights of one output channel ("row") or of one input channel
    ("column"); or tiles of block_size x block_size ("block")."""
    block_size: int = 16
    """Side of the tiles that granularity="block" chooses."""
    selection_algorithm: Literal["rigl", "sm3", "static"] = "rigl"
    """How weights are chosen: "rigl": again and again, by accumulated gradients (SpIEL-AG); "sm3": again and again, by
    the accumulators of the SM3 optimiser (SpIEL-MA); "static": once, before training, by static_criterion (then the
    fields about reselection have no meaning)."""
    static_criterion: Literal["gradient", "fisher", "magnitude", "random"] | None = None
    """Which weights "static" chooses: of largest summed "gradient" or of largest sum of squared gradients ("fisher",
    arXiv 2111.09839) over the calibration batches, of largest "magnitude", or "random" ones. None: "gradient" with
    "static"; with the other algorithms it has to be None."""
    calibration_batches: int = 8
    """Batches of the training data that `SftTrainer` calibrates "gradient" and "fisher" on."""
    budget: Literal["per_layer", "global"] = "per_layer"
    """Whether every layer keeps its number of trained weights, or the layers compete for them ("global"): what is
    dropped and what grows is then the smallest and the best over all of them. Not with data parallelism."""
    reselection_steps: int = 20
    """Update steps from one reselection to the next."""
    selection_accumulation_steps: int = 5
    """Update steps before a reselection in which gradients are gathered for it ("rigl"), in 1..reselection_steps-1."""
    reselection_rate_policy: Literal["linear", "cosine"] = "linear"
    """How the share of weights that is re-chosen falls over the training."""
    initial_reselection_rate: float = 0.2
    """That share at the beginning, in [0, 1]."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Data type of the trained numbers; "auto": that of the weight they belong to."""


def choices(field: str) -> tuple[str, ...]:
    """The values that an option of few values has, besides None; () for any other option."""
    return literal_values(get_type_hints(_SftOptions)[field])


@documented_dataclass
class SftConfig(_SftOptions, TargetedConfig):
    """Sparse fine-tuning: `W` with k trained numbers added at k chosen positions (arXiv 2401.16405, section 3).

    The budget is `num_deltas`, else `num_tunable_weights`, else `density`.
    """

    method = PeftType.SFT
    num_deltas: dict[str, int] | None = None
    """Number of trained weights per module, {its whole name: k}; overrides the others, and without target_modules says
    what is adapted. Filled in when the adapter is made, so that loading does not derive it again."""
    sized_by_file = False  # num_deltas was derived for a file that does not say it, but has the sizes; no field

    def __post_init__(self):
        super().__post_init__()
        self._check_budget()
        check_least(self, block_size=1)
        if self.granularity != "block" and self.block_size != type(self).block_size:
            raise ValueError(
                f"block_size={self.block_size} has no meaning with granularity={self.granularity!r}; set "
                f"granularity='block', or leave it out"
            )
        if self.budget == "global" and self.granularity != "element":
            raise ValueError(
                f"budget='global' compares single weights of different layers, so it cannot be combined with "
                f"granularity={self.granularity!r}; use budget='per_layer', or granularity='element'"
            )
        self._check_static()
        check_least(self, reselection_steps=2)
        if not 1 <= self.selection_accumulation_steps <= self.reselection_steps - 1:
            raise ValueError(
                f"selection_accumulation_steps must be in 1..reselection_steps-1 = 1..{self.reselection_steps - 1}, "
                f"got {self.selection_accumulation_steps!r}"
            )
        if not 0 <= self.initial_reselection_rate <= 1:
            raise ValueError(f"initial_reselection_rate must be in [0, 1], got {self.initial_reselection_rate!r}")

    def _check_static(self):
        if self.selection_algorithm == "static" and self.static_criterion is None:
            self.static_criterion = "gradient"
        if self.static_criterion is not None and self.selection_algorithm != "static":
            raise ValueError(
                f"static_criterion={self.static_criterion!r} has no meaning with selection_algorithm="
                f"{self.selection_algorithm!r}; set selection_algorithm='static', or leave it at None"
            )
        check_least(self, calibration_batches=1)

    def _check_budget(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density!r}")
        check_least(self, num_tunable_weights=1)
        for name, k in (self.num_deltas or {}).items():
            if k < 0:
                raise ValueError(f"num_deltas[{name!r}] must be a whole number >= 0, got {k!r}")


def _as_in_config(name: str) -> dataclasses.Field:
    """A field of `SftArguments` that is documented in `SftConfig`."""
    (metadata,) = (field.metadata for field in dataclasses.fields(SftConfig) if field.name == name)
    return dataclasses.field(default=None, metadata=metadata)


@documented_dataclass
class SftArguments(_SftOptions):
    """What scripts set of an `SftConfig`; for `transformers.HfArgumentParser`.

    Raises:
        ValueError: `num_deltas` is a string that is no JSON.
    """

    target_modules: list[str] | None = None
    """Modules to adapt: names (matched at the end of a module's name), or "all-linear". Default: every linear layer of
    the backbone."""
    exclude_modules: list[str] | None = None
    """Modules not to adapt: names, matched like target_modules."""
    modules_to_save: list[str] | None = _as_in_config("modules_to_save")
    layers_to_transform: list[int] | None = _as_in_config("layers_to_transform")
    layers_pattern: list[str] | None = _as_in_config("layers_pattern")
    # HfArgumentParser takes the second of the types.
    num_deltas: dict[str, int] | str | None = None
    """Number of trained weights per module, by its whole name, overriding the other budgets; on a command line as JSON:
    {"encoder.layer.0.output.dense": 100}."""

    def __post_init__(self):
        if isinstance(self.num_deltas, str):
            try:
                self.num_deltas = json.loads(self.num_deltas)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'num_deltas must be JSON such as {{"encoder.layer.0.output.dense": 100}}, got '
                    f"{self.num_deltas!r}: {error}"
                ) from error

    def to_config(self, **fields) -> SftConfig:
        """The configuration with these values; `fields` gives any others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.target_modules == [INCLUDE_LINEAR_LAYERS_SHORTHAND]:  # the only word that is no name
            values["target_modules"] = INCLUDE_LINEAR_LAYERS_SHORTHAND
        return SftConfig(**values | fields)
