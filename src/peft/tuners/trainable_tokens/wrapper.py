"""Trainable tokens beside the adapters of another method (LoRA's `trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...utils.other import AuxiliaryTrainingWrapper, Places
from ..base import BaseTuner
from ..ops import make_op
from ..targeting import keys_ending_in
from .config import TrainableTokensConfig
from .layer import TrainableTokensLayer
from .model import input_embeddings_name, tied_modules


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Holds a `TrainableTokensLayer` under the name that files have for it; what it does, that layer does."""

    def __init__(self, layer: TrainableTokensLayer):
        super().__init__(None, "")
        self._active_adapter = layer.active_adapters
        self.enable_adapters(not layer.disable_adapters)
        self.token_adapter = layer

    @property
    def _available_adapters(self):
        return getattr(self.token_adapter, "_available_adapters", set())

    def forward(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        return self.token_adapter(*args, **kwargs)  # it is given the names of a mixed batch itself

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "token_adapter":
                raise
            return getattr(self.unload([]), name)

    def delete_adapter(self, adapter_name: str) -> None:
        self.token_adapter.delete_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    def unload(self, adapter_names: Sequence[str]) -> nn.Module:
        layer = self.token_adapter
        return layer.get_base_layer() if isinstance(layer, TrainableTokensLayer) else layer


def wrap_trainable_tokens(
    tuner: BaseTuner, indices: Sequence[int] | dict[str, Sequence[int]], adapter_name: str
) -> None:
    """Give an adapter trainable tokens.

    Args:
        indices: of the input embeddings, or `{end of a module's name: indices}`. What shares a weight with a module
            shares its tokens, unless it is named too.

    Raises:
        ValueError: a name that is no module's, a module that has no rows of tokens, that is adapted otherwise, or that
            is trained whole.
    """
    model = tuner.model
    if not isinstance(indices, dict):
        name = (input_embeddings_name(model) or "embed_tokens").removesuffix(".token_adapter")
        indices = {name: indices}
    modules = {key: module for key, module in model.named_modules() if ".token_adapter" not in key}
    wanted: dict[str, TrainableTokensConfig] = {}
    for name, tokens in indices.items():
        keys = keys_ending_in(name, modules)
        if not keys:
            raise ValueError(f"trainable_token_indices names {name!r}, which is no module of the model")
        wanted |= dict.fromkeys(keys, TrainableTokensConfig(token_indices=list(tokens)))
    for key, config in wanted.items():
        layer = _token_layer(tuner, key)
        if layer.tied_to is not None:
            raise _otherwise(key)
        layer.update_layer(adapter_name, config)
        tuner._move_to_base(layer, adapter_name)
        ties = [other.removesuffix(".token_adapter") for other in tied_modules(model, layer.get_base_layer())]
        layer.keeps_ties = not any(other in wanted for other in ties)
        layer.op.shared |= bool(ties) and not layer.keeps_ties
        for other in ties if layer.keeps_ties else ():
            if _token_layer(tuner, other, layer).tied_to is not layer:
                raise _otherwise(other)


def _otherwise(key: str) -> ValueError:
    return ValueError(
        f"{key} is tied to another module and shares its trained tokens in one adapter of the model, and not in "
        "another: name the same modules in trainable_token_indices of all of them"
    )


def _token_layer(tuner: BaseTuner, key: str, tied_to: TrainableTokensLayer | None = None) -> TrainableTokensLayer:
    """The layer of the module `key`, which is wrapped if it is not."""
    module = tuner.model.get_submodule(key)
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter
    op = make_op(module)
    if op is None or op.kind not in ("Linear", "Embedding"):
        raise ValueError(
            f"trainable_token_indices names {key} ({type(module).__name__}), which is no plain embedding or linear "
            "layer: one that is a target of the adapter, or trained whole, cannot have trainable tokens as well"
        )
    layer = TrainableTokensLayer(module, tied_to, in_wrapper=True).train(module.training)
    layer._active_adapter = list(tuner.active_adapters)
    layer.enable_adapters(not tuner._adapters_disabled)
    Places(tuner.model).replace(module, TrainableTokensWrapper(layer))
    return layer
