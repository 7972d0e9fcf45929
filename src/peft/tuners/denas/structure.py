"""Structures: which layers get a delta and of what size, as JSON objects and files.

    {"num_hidden_layers": [1, 0, 1], "r": [8, 1, 4], "alpha": [2, 1, 1]}

is LoRA on layers 0 and 2 of three, with rank r and `lora_alpha = alpha * r`. SSF has the first key only, SFT "share" in
place of the last two. This is deltatuner's format; numbers of layers that are left out have no meaning. Where the
choice is per layer and type of module, every list is an object of such lists by type:

    {"num_hidden_layers": {"self_attn.q_proj": [1, 0, 1], "mlp.up_proj": [0, 0, 1]}, ...}
"""

from __future__ import annotations

import ast
import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...config import write_text
from ...utils.constants import STRUCTURE_NAME
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig
from ..targeting import name_matches
from .layout import Granularity, Layout, Unit, layout_of

LAYER_NAME = "num_hidden_layers"
SIZES = {PeftType.LORA: ("r", "alpha"), PeftType.SSF: (), PeftType.SFT: ("share",)}
"""What a structure says of a layer besides on or off, by method."""
PRESETS = Path(__file__).with_name("presets")
EVEN_SHARE = 4
"""The share of an SFT layer that has the density asked for: 2 is half of that density, 8 twice."""


@dataclass(frozen=True)
class Structure:
    """One structure, in the order of `Layout.units`.

    Attributes:
        on: 0 or 1 for each unit.
        sizes: `{"r": one number for each unit, ...}`.
    """

    granularity: Granularity
    on: tuple[int, ...]
    sizes: dict[str, tuple[float, ...]]

    def to_dict(self, layout: Layout, layer_name: str = LAYER_NAME) -> dict[str, Any]:
        """The JSON object."""
        lists = {layer_name: self.on, **self.sizes}
        if self.granularity == "layer":
            return {name: list(values) for name, values in lists.items()}
        n = layout.layers
        return {
            name: {kind: list(values[i * n : (i + 1) * n]) for i, kind in enumerate(layout.kinds)}
            for name, values in lists.items()
        }


def parse_structure(
    content: dict[str, Any], layout: Layout, method: PeftType | str, layer_name: str = LAYER_NAME
) -> Structure:
    """Read a JSON object as a structure of this model.

    Raises:
        ValueError: a key is missing or unknown, a list has another length than the model has layers, a value is not
            possible, or all layers are off.
    """
    wanted = (layer_name, *SIZES[method])
    if set(content) != set(wanted):
        raise ValueError(
            f"A structure for {PeftType(method).value} has the keys {list(wanted)}, got {sorted(content)}"
            + ("" if layer_name in content else f" (layer_name={layer_name!r} says how the first is called)")
        )
    by_kind = isinstance(content[layer_name], dict)
    lists = {name: _flat(name, content[name], layout, by_kind) for name in wanted}
    on = lists.pop(layer_name)
    if any(value not in (0, 1) for value in on):
        raise ValueError(f"{layer_name} of a structure must be 0 or 1 for every layer, got {on}")
    if not any(on):
        raise ValueError(f"The structure leaves out every layer ({layer_name} is 0 throughout): it needs at least one")
    for name, values in lists.items():
        whole = name != "alpha"  # a rank and a share; lora_alpha may be any multiple of the rank
        for value, used in zip(values, on):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
            if used and not (number and (value == int(value) or not whole)):
                rule = "a positive whole number" if whole else "a positive number"
                raise ValueError(f"{name} of a structure must be {rule} for every layer that is on, got {value!r}")
    return Structure(
        "module" if by_kind else "layer",
        tuple(int(value) for value in on),
        {name: tuple(values) for name, values in lists.items()},
    )


def _flat(name: str, values: Any, layout: Layout, by_kind: bool) -> list:
    """One list over all units; the lengths are checked."""
    if by_kind != isinstance(values, dict):
        raise ValueError("The entries of a structure are all lists, or all objects of lists by type of module")
    if by_kind and set(values) != set(layout.kinds):
        raise ValueError(f"{name} of the structure is for modules {sorted(values)}, the targets are {layout.kinds}")
    lists = [values[kind] for kind in layout.kinds] if by_kind else [values]
    for part in lists:
        if not isinstance(part, list) or len(part) != layout.layers:
            found = f"has {len(part)} entries" if isinstance(part, list) else f"is {part!r}"
            raise ValueError(
                f"{name} of the structure {found}, but the model has {layout.layers} layers: it was found for another "
                "model. Search again, or give the structure of this one"
            )
    return [value for part in lists for value in part]


# ---- Files ----


def read_structure(source: dict[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """A structure's object, from a file (the first line that is not empty; JSON, or a Python dict) or as it is given.

    A name of `presets` means the file that comes with the package, unless there is a file or folder of that name.

    Raises:
        ValueError: there is no such file, or it holds none.
    """
    if isinstance(source, dict):
        return copy.deepcopy(source)
    path = os.path.join(source, STRUCTURE_NAME) if os.path.isdir(source) else source
    if source in presets() and not os.path.exists(source):
        path = PRESETS / f"{source}.json"
    try:
        with open(path, encoding="utf-8") as file:
            line = next((line.strip() for line in file if line.strip()), "")
    except OSError as error:
        raise ValueError(
            f"Cannot read the structure {str(path)!r}: {error.strerror}; give a file, or one of {presets()}"
        ) from error
    content = None
    for parse in (json.loads, ast.literal_eval):
        try:
            content = parse(line)
            break
        except (ValueError, SyntaxError):
            continue
    if not isinstance(content, dict):
        raise ValueError(f"The first line of {str(path)!r} must be a JSON object, the structure, got {line[:60]!r}")
    return content


def presets() -> list[str]:
    """Names of the structures that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def write_structure(structure: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a structure's object as one line of JSON; into a folder under the name that adapters' folders use."""
    path = os.path.join(path, STRUCTURE_NAME) if os.path.isdir(path) else path
    write_text(path, json.dumps(structure) + "\n")


# ---- From a structure to an ordinary configuration ----


def apply_structure(
    config: TargetedConfig,
    model: nn.Module,
    structure: dict[str, Any] | str | os.PathLike,
    layer_name: str = LAYER_NAME,
) -> TargetedConfig:
    """An ordinary configuration that makes exactly this structure.

    Args:
        config: a LoraConfig, SsfConfig or SftConfig; its targets are those that the structure chooses from.
        structure: the object or a file.

    Returns:
        A copy of `config` that names the modules to adapt, with `rank_pattern` and `alpha_pattern` (LoRA) or
        `num_deltas` (SFT).

    Raises:
        ValueError: the structure is not one of this model and method.
    """
    return configure(config, layout_of(model, config), read_structure(structure), layer_name)


def configure(config: TargetedConfig, layout: Layout, content: dict[str, Any], layer_name: str) -> TargetedConfig:
    """`apply_structure` for a model of which the layout is known."""
    parsed = parse_structure(content, layout, config.peft_type, layer_name)
    chosen = [
        (unit, {name: values[i] for name, values in parsed.sizes.items()})
        for i, unit in enumerate(layout.units(parsed.granularity))
        if parsed.on[i] and unit.keys
    ]
    if not chosen:
        raise ValueError("The structure keeps only layers that have no targets: choose other target_modules")
    config = copy.copy(config)
    config.structure = content
    _set_targets(config, layout, {key for unit, _ in chosen for key in unit.keys})
    if config.peft_type == PeftType.LORA:
        _set_ranks(config, chosen)
    elif config.peft_type == PeftType.SFT:
        config.num_deltas = {
            key: sft_weights(layout, key, config, sizes["share"]) for unit, sizes in chosen for key in unit.keys
        }
    return config


def sft_weights(layout: Layout, key: str, config, share: float) -> int:
    """How many weights of module `key` an SFT structure trains; at least one."""
    size = layout.ops[key].stored_shape.numel()
    return min(size, max(1, int(share * config.density * size / EVEN_SHARE)))


def _set_targets(config: TargetedConfig, layout: Layout, keys: set[str]) -> None:
    """Let the configuration mean the modules `keys` and no others."""
    others = [key for key in layout.places if key not in keys]
    config.target_modules = keys
    # A name means every module whose name ends in it; so the names of left-out modules may need to be said.
    config.exclude_modules = {key for key in others if name_matches(sorted(keys), key)} or None
    config.layers_to_transform = config.layers_pattern = None


def _set_ranks(config, chosen: list[tuple[Unit, dict[str, float]]]) -> None:
    ranks, alphas = {}, {}
    for unit, sizes in chosen:
        r = int(sizes["r"])
        alpha = sizes["alpha"] * r
        for key in unit.keys:
            pattern = "^" + re.escape(key)  # the whole name: an ending could mean a module of another stack as well
            ranks[pattern], alphas[pattern] = r, int(alpha) if alpha == int(alpha) else alpha
    config.rank_pattern = {key: r for key, r in ranks.items() if r != config.r}
    config.alpha_pattern = {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}
