"""Layer replication: a deeper model whose added layers share the weights of others, so that only adapters differ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; `share_weights`: with the same parameters and buffers."""
    held = (*module.parameters(), *module.buffers()) if share_weights else ()
    return copy.deepcopy(module, {id(tensor): tensor for tensor in held})


@dataclass
class Replication:
    """What a replication has replaced."""

    parent: nn.Module
    name: str
    layers: nn.ModuleList
    config: object
    said: dict[str, object]

    def undo(self) -> None:
        """Give the model its own layers back."""
        setattr(self.parent, self.name, self.layers)
        _number(self.layers)
        for key, value in self.said.items():
            setattr(self.config, key, value)


def replicate_layers(model: nn.Module, layer_map: Sequence[tuple[int, int]]) -> Replication:
    """Let the model have the layers of these ranges, one after the other: [(0, 3), (1, 4)] is 0, 1, 2, 1, 2, 3.

    The configuration says so too. What comes again shares its weights with the first time.

    Args:
        layer_map: (first, last + 1) each.

    Returns:
        What it takes to undo it.

    Raises:
        ValueError: the model has not one list of layers, or not as many as named.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and (count is None or len(child) == count)
    ]
    if len(lists) != 1:
        raise ValueError(
            f"layer_replication is for models with one list of layers, and {type(model).__name__} has {len(lists)}"
        )
    parent, name, layers = lists[0]
    order = [i for start, end in layer_map for i in range(start, end)]
    if max(order) >= len(layers):
        raise ValueError(f"layer_replication={list(layer_map)} goes beyond the {len(layers)} layers of the model")
    used, replicated = set(), []
    for i in order:
        replicated.append(clone_module(layers[i], share_weights=True) if i in used else layers[i])
        used.add(i)
    # What configurations say of each layer (layer_types, ...) is said of those that there are now.
    said = {} if count is None else {key: value for key, value in vars(config).items() if "layer" in key}
    said = {key: value for key, value in said.items() if isinstance(value, (list, tuple)) and len(value) == len(layers)}
    replication = Replication(parent, name, layers, config, said)
    for key, value in said.items():
        setattr(config, key, [value[i] for i in order])
    if count is not None:
        config.num_hidden_layers, replication.said = len(order), said | {"num_hidden_layers": count}
    setattr(parent, name, nn.ModuleList(replicated))
    _number(replicated)
    return replication


def _number(layers: Sequence[nn.Module]) -> None:
    """Tell the layers' parts their places, by which they find theirs in caches."""
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
