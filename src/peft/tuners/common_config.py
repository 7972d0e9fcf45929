"""Checks that the configurations of all tuners share."""

from __future__ import annotations

import re


def check_layer_selection(config) -> None:
    """Normalise and check target_modules, exclude_modules, layers_to_transform and layers_pattern in place.

    Lists become sets, as upstream has them in memory.

    Raises:
        ValueError: an invalid regular expression, or a choice of layers that the targets cannot express.
    """
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, (list, tuple)):
            setattr(config, name, set(value))
        elif isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{name}={value!r} is not a valid regular expression: {error}") from error
    if isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name} cannot be combined with target_modules={config.target_modules!r}: put the layers into the "
                    "regular expression, or give target_modules as a list"
                )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern says where layers are counted: it needs layers_to_transform")
