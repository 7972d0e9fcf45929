"""`SftModel`: sparse deltas in a model, and how a budget of trained weights is shared out over its layers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator

from ...utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ...utils.quantization_utils import logical_numels
from ..base import BaseTuner
from ..ops import make_op
from ..targeting import is_target
from ..tuners_utils import BaseTunerLayer
from .layer import SftLayer, SparseDelta
from .structured import make_layout


def share_out(total: int, sizes: dict[str, int], slot_sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Split `total` trained weights over layers in proportion to their `sizes`.

    Single weights are rounded down. Where a layer's weights are chosen in groups, every share is rounded down to whole
    groups, and what is left goes, one group each, to the layers that lost the largest part of a group, as far as it
    reaches; so small layers may get none, but the total comes close to the budget.

    Args:
        sizes: weights of each layer that can be chosen.
        slot_sizes: number of weights in a group of each layer; None: single weights.

    Raises:
        ValueError: more than the layers hold, or so little that no layer gets anything.
    """
    room = sum(sizes.values())
    if total > room:
        raise ValueError(f"The budget of {total:,} trained weights is larger than the targets, which hold {room:,}")
    if slot_sizes is None:
        shares = {key: total * size // room for key, size in sizes.items()}
        if not any(shares.values()):
            raise ValueError(
                f"The budget of {total:,} trained weights, shared out over {len(sizes):,} layers in proportion to "
                f"their sizes and rounded down, leaves every layer with none. Raise density or num_tunable_weights, "
                f"or say where they go with num_deltas"
            )
        return shares
    shares = {key: total * size // (room * slot_sizes[key]) * slot_sizes[key] for key, size in sizes.items()}
    left = total - sum(shares.values())
    lost = {key: (total * size - shares[key] * room) / (room * slot_sizes[key]) for key, size in sizes.items()}
    for key in sorted(sizes, key=lambda key: -lost[key]):
        if lost[key] > 0 and slot_sizes[key] <= left:
            shares[key] += slot_sizes[key]
            left -= slot_sizes[key]
    if not any(shares.values()):
        raise ValueError(
            f"The budget of {total:,} trained weights is not enough for one group of weights: the smallest has "
            f"{min(slot_sizes.values()):,}. Raise the budget or choose another granularity"
        )
    return shares


class SftModel(BaseTuner):
    """A model with sparse deltas (arXiv 2401.16405); see `BaseTuner`."""

    prefix = "sft_"
    tuner_layer_cls = SftLayer
    default_targets = INCLUDE_LINEAR_LAYERS_SHORTHAND

    def prepare_config(self, config):
        config = copy.copy(config)  # num_deltas will be filled in; the user may give the same object another density
        if config.target_modules is None and config.num_deltas:
            self._target_exactly(config, set(config.num_deltas))
        return super().prepare_config(config)

    def _target_exactly(self, config, names: set[str]) -> None:
        """Let the configuration mean the modules `names` and no others whose names end like theirs."""
        config.target_modules = names
        meant = {key for key, _ in self.model.named_modules() if is_target(config, key)}
        if not meant <= names and meant & names:
            config.target_modules = "|".join(re.escape(key) for key in sorted(meant & names))
            config.layers_to_transform = config.layers_pattern = None  # done; an expression cannot have them beside it

    def shared_state(self, config, targets, adapter_name):
        """Resolve the budget into `config.num_deltas`.

        Raises:
            ValueError: a granularity that a target cannot have; a budget that is larger than a layer or than all
                targets, or smaller than a group; or `num_deltas` that names other modules than the targets.
        """
        ops = {key: make_op(module) for key, module in targets.items()}
        layouts = {key: make_layout(op, config, key) for key, op in ops.items()}
        sizes = {
            key: math.prod(ops[key].stored_shape) if layout is None else layout.count * layout.size
            for key, layout in layouts.items()
        }
        slots = None if config.granularity == "element" else {key: layout.size for key, layout in layouts.items()}
        if config.num_deltas is None:
            total = config.num_tunable_weights
            if total is None:
                total = int(config.density * self._base_numel())
            config.num_deltas = share_out(total, sizes, slots)
            config.sized_by_file = config.from_file  # who wrote it may have rounded otherwise
        else:
            config.num_deltas = dict(config.num_deltas)  # a global budget changes it, and the user's is the user's
        strangers = sorted(set(config.num_deltas) - set(targets))
        missing = sorted(set(targets) - set(config.num_deltas))
        if strangers or missing:
            raise ValueError(
                f"num_deltas must name exactly the targets: {len(strangers)} names are no targets ({strangers[:3]}), "
                f"{len(missing)} targets have no entry ({missing[:3]})"
            )
        for key, k in config.num_deltas.items():
            if k > sizes[key]:
                raise ValueError(f"num_deltas[{key!r}] = {k:,} is more than the {sizes[key]:,} weights of the layer")
            if slots and k % slots[key]:
                raise ValueError(
                    f"num_deltas[{key!r}] = {k:,} is no multiple of {slots[key]:,}, the weights of one group with "
                    f"granularity={config.granularity!r}"
                )

    def _base_numel(self) -> int:
        adapters = {
            id(parameter)
            for layer in self.layers()
            for name in layer._available_adapters
            for _, parameter in layer.adapter_tensors(name)
        } | {id(parameter) for wrapper in self.wrappers() for parameter in wrapper.adapter_parameters()}
        return sum(n for p, n in logical_numels(self.model) if id(p) not in adapters)

    def layer_kwargs(self, config, key):
        return {"key": key}

    def active_deltas(self) -> Iterator[tuple[BaseTunerLayer, str, SparseDelta]]:
        """`(layer, name of the delta in the base model, delta)` for the deltas of the active adapters."""
        for key, layer in self.model.named_modules():
            if isinstance(layer, SftLayer):
                for name in layer.active_adapters:
                    if name in layer.sft_delta:
                        yield layer, f"{key}.sft_delta.{name}", layer.sft_delta[name]
