"""What initialisations that need data (CorDA, LoRA-GA) compute before there is an adapter, and where it waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ...config import write_atomically
from ...utils.quantization_utils import is_quantized
from ..ops import make_op

_ATTRIBUTE = "lora_start"


class Prepared(NamedTuple):
    """The start of a layer's adapter."""

    init: str
    r: int
    factors: Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]  # as `init.factors_out_of`
    keep: bool = False  # after an adapter has taken it over


def prepare(layer: nn.Module, start: Prepared) -> None:
    """Let the start wait in the layer."""
    setattr(layer, _ATTRIBUTE, start)


def prepared(layer: nn.Module, init: str, r: int):
    """The factors that were prepared for this layer, as `init.factors_out_of` has them.

    Raises:
        ValueError: there are none, or of another rank.
    """
    start = getattr(layer, _ATTRIBUTE, None)
    if start is None or start.init != init:
        raise ValueError(
            f"init_lora_weights={init!r} takes a part out of the base weights that depends on data, also when an "
            f"adapter is loaded that was trained so. Call preprocess_{init.replace('_', '')}(model, config, ...) first "
            "(for a saved adapter: with its cache_file), or use the adapter in plain form (save_pretrained with "
            "path_initial_model_for_weight_conversion), or, if the base weights are the changed ones, load it with "
            "config=PeftConfig.from_pretrained(folder, init_lora_weights=True)"
        )
    if start.r != r:
        raise ValueError(f"The factors were prepared for rank {start.r}, and the adapter has {r}: prepare them anew")

    def factors(W, r, s):
        if not start.keep:
            delattr(layer, _ATTRIBUTE)
        return start.factors(W, r, s)

    return factors


def linear_targets(model: nn.Module, config, init: str, vectors: int = 1) -> dict[str, tuple[nn.Module, int]]:
    """`{name: (layer, rank)}` of the layers that the adapter is to get.

    Args:
        vectors: singular vectors that a rank needs.

    Raises:
        ValueError: a configuration for another initialisation, layers that are no plain linear ones or too small.
    """
    from .model import LoraModel, rank_and_alpha

    if config.init_lora_weights != init:
        raise ValueError(f"The configuration must have init_lora_weights={init!r}, got {config.init_lora_weights!r}")
    targets = {}
    for name, layer in LoraModel.targets_of(model, config).items():
        op, r = make_op(layer), rank_and_alpha(config, name)[0]
        if op is None or op.kind != "Linear" or op.is_read or is_quantized(layer):
            raise ValueError(
                f"init_lora_weights={init!r} is for plain linear layers, and {name} is {layer}: leave it out"
            )
        if vectors * r > min(op.weight_shape):
            raise ValueError(
                f"init_lora_weights={init!r} needs {vectors * r} singular vectors for r={r}, and {name} of shape "
                f"{tuple(op.weight_shape)} has {min(op.weight_shape)}: give it a smaller rank (rank_pattern)"
            )
        targets[name] = (layer, r)
    return targets


def from_file(path: str | None, names, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Read tensors from a file, or make them and write it if it is not there; None: no file.

    Raises:
        ValueError: the file has others than those called `names`.
    """
    if path is None or not os.path.exists(path):
        tensors = make()
        if path is not None:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            write_atomically(path, lambda temporary: torch.save(tensors, temporary))
        return tensors
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors for this model, such as {missing[:3]}: remove it")
    return tensors
