"""What the configurations of all tuners share: which modules an adapter is put on, and which train beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..config import PeftConfig, documented_dataclass


@documented_dataclass
class ModulesConfig(PeftConfig):
    """A configuration that names modules of the base model.

    Raises:
        ValueError: an invalid regular expression.
    """

    target_modules: list[str] | str | None = None
    """Modules to adapt: a list of names (matched at the end of a module's name), a regular expression for the whole
    name, or "all-linear" (every linear layer of the backbone, the head left out). None: the method's own choice: the
    architecture's usual targets for LoRA, "all-linear" for SFT and SSF."""
    exclude_modules: list[str] | str | None = None
    """Modules not to adapt, given like target_modules."""
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved whole beside the adapter, such as a new classification head."""

    def __post_init__(self):
        super().__post_init__()
        check_modules(self)


@documented_dataclass
class TargetedConfig(ModulesConfig):
    """A configuration that names modules and, by number, the layers in which they are meant.

    Raises:
        ValueError: an invalid regular expression, or a choice of layers that the targets cannot express.
    """

    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; None: all."""
    layers_pattern: list[str] | str | None = None
    """Name of the list that the layer numbers count in, such as "layers" or "h"; None: the first number in a name."""

    def __post_init__(self):
        super().__post_init__()
        _check_layer_selection(self)


def check_pattern(pattern: str, name: str) -> None:
    """Check that the option `name` holds a regular expression.

    Raises:
        ValueError: it is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is not a valid regular expression: {error}") from error


def check_probability(config, *names: str) -> None:
    """Check that options are probabilities, and not that of certain loss.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)!r}")


def check_rank_and_alpha(config, alpha_name: str) -> None:
    """Check `r`, the option `alpha_name`, `rank_pattern` and `alpha_pattern`; patterns that are None become empty.

    Raises:
        ValueError: a rank below 1, an alpha that is 0 or not finite, or an invalid regular expression.
    """
    config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    for name, r in {"r": config.r, **_entries(config, "rank_pattern")}.items():
        if r < 1:
            raise ValueError(f"A rank must be a positive whole number, got {name}={r!r}")
    for name, alpha in {alpha_name: getattr(config, alpha_name), **_entries(config, "alpha_pattern")}.items():
        if alpha == 0 or not math.isfinite(alpha):
            raise ValueError(f"{name} scales the delta, so it must be finite and not 0, got {alpha!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            check_pattern(key, name)


def _entries(config, name: str) -> dict:
    return {f"{name}[{key!r}]": value for key, value in getattr(config, name).items()}


def check_tokens(name: str, tokens: Sequence[int]) -> None:
    """Check that the option `name` holds ids of different tokens.

    Raises:
        ValueError: they are negative or not different.
    """
    if len(set(tokens)) < len(tokens) or any(token < 0 for token in tokens):
        raise ValueError(f"{name} must be ids of different tokens, none of them negative, got {list(tokens)}")


def check_modules(config: PeftConfig, *names: str) -> None:
    """Check fields that name modules; lists of names become sets, as upstream has them in memory.

    Args:
        names: of the fields; none: target_modules and exclude_modules.
    """
    for name in names or ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, (list, tuple)):
            setattr(config, name, set(value))
        elif isinstance(value, str):
            check_pattern(value, name)


def _check_layer_selection(config: TargetedConfig) -> None:
    if isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name} cannot be combined with target_modules={config.target_modules!r}: put the layers into the "
                    "regular expression, or give target_modules as a list"
                )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern says where layers are counted: it needs layers_to_transform")
