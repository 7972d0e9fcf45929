"""`TrainableTokensModel`: layers of trainable tokens in a model."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from ...utils.other import AuxiliaryTrainingWrapper, memory_of
from ...utils.placement import offload_hook
from ..base import BaseTuner
from ..ops import make_op
from ..targeting import model_config
from ..tuners_utils import BaseTunerLayer
from .layer import TrainableTokensLayer


class TrainableTokensModel(BaseTuner):
    """A model some of whose tokens are trained; see `BaseTuner`."""

    prefix = "trainable_tokens_"
    tuner_layer_cls = TrainableTokensLayer
    layer_classes = dict.fromkeys(("Linear", "Embedding"), TrainableTokensLayer)

    def prepare_config(self, config):
        if config.target_modules is None:
            config.target_modules = input_embeddings_name(self.model) or "embed_tokens"
        return super().prepare_config(config)

    def _find_targets(self, config, state_dict):
        """The named modules, each followed by those that share its weight."""
        found, targets = super()._find_targets(config, state_dict), {}
        self._partners: dict[str, str] = {}  # module -> the one before it that has the same weight
        for key, base in found.items():
            if key not in self._partners:
                others = {other: _bare(self.model.get_submodule(other)) for other in tied_modules(self.model, base)}
                self._partners |= dict.fromkeys(others, key)
                targets |= {key: base, **others}
        return targets

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key):
        if current_key in self._partners and not isinstance(target, BaseTunerLayer):
            partner = self.model.get_submodule(self._partners[current_key])
            setattr(parent, target_name, TrainableTokensLayer(target, partner).train(target.training))
            return
        super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key)


def _end(model: nn.Module, which: str) -> nn.Module | None:
    """The module of the model's "input" or "output" embeddings."""
    getter = getattr(model, f"get_{which}_embeddings", None)
    return getter() if callable(getter) else None


def input_embeddings_name(model: nn.Module) -> str | None:
    """What the model calls the module of its input embeddings, without what adapters have made of it."""
    embeddings = _end(model, "input")
    return next((name for name, module in model.named_modules() if module is embeddings), None)


def _bare(module: nn.Module) -> nn.Module:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.unload([])
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def tied_modules(model: nn.Module, base: nn.Module) -> list[str]:
    """Names of the other modules that hold the same weight as `base`, without what adapters have made of them.

    Raises:
        ValueError: one of them is trained whole, or is adapted in another way.
    """
    memory, partner, found, inside = _weight_of(base), _offloaded_partner(model, base), [], ()
    for key, module in model.named_modules():
        if inside and key.startswith(inside) or not getattr(module, "adapter_layer_names", True):
            continue  # a wrapper of trainable tokens stands for the layer in it
        bare = _bare(module)
        if bare is not module:
            inside = (*inside, key + ".")
        if bare is base or not (bare is partner or memory is not None and _weight_of(bare) == memory):
            continue
        if bare is not module and not isinstance(module, TrainableTokensLayer):
            raise ValueError(
                f"{key} shares its weight with the trained tokens' embeddings, and has an adapter or is trained whole: "
                "leave it out of target_modules and modules_to_save, or untie it"
            )
        found.append(key)
    return found


def _offloaded_partner(model: nn.Module, base: nn.Module) -> nn.Module | None:
    """The other end of the model where the two are tied, and off-loading has made two parameters of their weight."""
    ends = [_bare(end) for which in ("input", "output") if (end := _end(model, which)) is not None]
    if offload_hook(base) is None or base not in ends or not model_config(model).get("tie_word_embeddings"):
        return None
    return next((end for end in ends if end is not base), None)


def _weight_of(module: nn.Module) -> Hashable | None:
    """What is equal for layers that hold the same weight, packed or not; None: it is no layer, or not known."""
    op = make_op(module)
    return None if op is None else memory_of(op.weight)
