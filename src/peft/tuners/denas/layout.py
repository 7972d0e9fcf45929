"""Where an adapter's targets stand in a model: which layer, which type of module.

Layers are counted in the order of the model's lists of layers: one list in a decoder, two in an encoder-decoder (the
encoder's come first), so that every layer has one number and a structure is one flat list per quantity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ...mapping import PEFT_TYPE_TO_TUNER_MAPPING
from ...utils.warning import warn
from ..common_config import TargetedConfig
from ..ops import Op, make_op

Granularity = Literal["layer", "module"]
GRANULARITIES = ("layer", "module")
_NUMBERED = re.compile(r"^(.+?)\.(\d+)(?:\.(.+))?$")  # list of layers, number in it, name inside the layer


@dataclass(frozen=True)
class Unit:
    """What is decided as one: the targets of a layer, all of them or those of one type."""

    layer: int
    kind: str | None
    """Name of the modules inside their layer, such as "self_attn.q_proj"; None: all targets of the layer."""
    keys: tuple[str, ...]
    """Full names of the modules; empty where a layer has none."""


class Layout:
    """The targets of an adapter by layer.

    Args:
        targets: `{full name: base layer}`, as `BaseTuner.targets_of` gives them.

    Attributes:
        layers: number L of layers in all lists of layers that hold targets.
        places: `{full name: (number of the layer, name inside it)}`.
        ops: `{full name: Op}`.

    Raises:
        ValueError: no target lies in a numbered layer, or one is of a kind that adapters do not know.
    """

    def __init__(self, model: nn.Module, targets: dict[str, nn.Module]):
        sizes: dict[str, int] = {}
        for key, _ in model.named_modules():
            if match := _NUMBERED.match(key):
                sizes[match[1]] = max(sizes.get(match[1], 0), int(match[2]) + 1)
        matches = {key: match for key in targets if (match := _NUMBERED.match(key))}
        used = {match[1] for match in matches.values()}
        first, self.layers = {}, 0
        for stack in (stack for stack in sizes if stack in used):
            first[stack] = self.layers
            self.layers += sizes[stack]
        self.places = {key: (first[m[1]] + int(m[2]), m[3] or "") for key, m in matches.items()}
        self.ops = {key: self._op(key, targets[key]) for key in self.places}
        if not self.places:
            raise ValueError(
                f"DE-NAS chooses per layer, but none of the targets {sorted(targets)[:3]} is in a numbered layer "
                "(as in model.layers.3.mlp): choose other target_modules"
            )
        if outside := sorted(set(targets) - set(self.places)):
            warn(
                f"DE-NAS chooses per layer; {outside[:3]} ({len(outside)} of {len(targets)} targets) are in no "
                "numbered layer and get no adapter",
            )

    @staticmethod
    def _op(key: str, module: nn.Module) -> Op:
        op = make_op(module)
        if op is None:
            raise ValueError(
                f"Target module {key} ({type(module).__name__}) is not supported: narrow target_modules or use "
                "exclude_modules"
            )
        return op

    @property
    def kinds(self) -> list[str]:
        """The types of modules, in the order of the model."""
        return list(dict.fromkeys(kind for _, kind in self.places.values()))

    def units(self, granularity: Granularity) -> list[Unit]:
        """What is decided as one: L units, or L for each type of module (type by type).

        A layer without targets has a unit too (without keys), so that positions are layer numbers.
        """
        kinds = [None] if granularity == "layer" else self.kinds
        keys: dict[tuple[int, str | None], list[str]] = {}
        for key, (layer, kind) in self.places.items():
            keys.setdefault((layer, None if granularity == "layer" else kind), []).append(key)
        return [Unit(i, kind, tuple(keys.get((i, kind), ()))) for kind in kinds for i in range(self.layers)]


def layout_of(model: nn.Module, config: TargetedConfig) -> Layout:
    """Where the targets of `config` stand in the model; neither is changed."""
    return Layout(model, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].targets_of(model, config))
