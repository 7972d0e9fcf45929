"""`LoraModel`: LoRA layers in a model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import nn

from ..._lazy import explain_missing
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.other import shared_parameters
from ...utils.quantization_utils import find_backend
from ..base import BaseTuner
from ..targeting import for_module, name_matches, pattern_key
from .bnb import Linear4bit, Linear8bitLt
from .combine import Combination, combined_config, fill
from .config import LoraConfig
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer, MultiheadAttention
from .parameters import walk_parameters, wrapper_of
from .replication import Replication, replicate_layers


def rank_and_alpha(config, key: str) -> tuple[int, float]:
    """`(r, lora_alpha)` of the layer `key`, from the patterns or the configuration."""
    key = pattern_key(config, key)
    r = for_module(key, config.rank_pattern, config.r)
    return r, for_module(key, config.alpha_pattern, config.lora_alpha)


def _ranges(config) -> list[list[int]]:
    return [list(one) for one in config.layer_replication or ()]


class LoraModel(BaseTuner):
    """A model with LoRA adapters (arXiv 2106.09685); see `BaseTuner`."""

    _replication: Replication | None = None  # of its layers, once for all adapters

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layer_classes = {"Linear": Linear, "Conv1d": Conv1d, "Conv2d": Conv2d, "Conv3d": Conv3d, "Embedding": Embedding}
    packed_linear_classes = {"bitsandbytes 4-bit": Linear4bit, "bitsandbytes 8-bit": Linear8bitLt}  # others: Linear

    def prepare_config(self, config):
        if config.target_parameters and config.target_modules is None:
            config.target_modules = set()
        return super().prepare_config(config)

    def check_new_config(self, config):
        """Refuse adapters of other parameters than the first one's: in files their layers are numbered."""
        super().check_new_config(config)
        others = [other for other in self.peft_config.values() if isinstance(other, LoraConfig) and other is not config]
        if any(sorted(other.target_parameters or ()) != sorted(config.target_parameters or ()) for other in others):
            raise ValueError(
                "All adapters of a model must have the same target_parameters: the others have "
                f"{others[0].target_parameters}, got {config.target_parameters}"
            )
        if any(_ranges(other) != _ranges(config) for other in others):
            raise ValueError(
                "All adapters of a model must have the same layer_replication: the others have "
                f"{others[0].layer_replication}, got {config.layer_replication}"
            )

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        config = self.peft_config[adapter_name]
        new = config.layer_replication and self._replication is None
        if new:
            self._replication = replicate_layers(model, config.layer_replication)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if new:
                self._undo_replication()
            raise

    def _undo_replication(self) -> None:
        if self._replication is not None:
            self._replication.undo()
            self._replication = None

    def unload(self):
        model = super().unload()
        self._undo_replication()
        return model

    def parameter_targets(self, config):
        if not config.target_parameters:
            return {}
        walked = walk_parameters(self.model)
        return {key: place for key, *place in walked if name_matches(config.target_parameters, key)}

    def _add_to_parameters(self, config, adapter_name: str) -> None:
        shared, active, disabled = shared_parameters(self.model), self.active_adapters, self._adapters_disabled
        for key, (owner, name) in self.parameter_targets(config).items():
            layer = wrapper_of(self.model, owner, name)
            if adapter_name in layer._available_adapters:
                continue  # the module stands in several places
            if not layer._available_adapters:
                layer._active_adapter = list(active)
                layer.enable_adapters(not disabled)
            with torch.device("meta") if layer.op.weight.is_meta else nullcontext():
                layer.update_layer(adapter_name, config, **self.layer_kwargs(config, key))
            self._move_to_base(layer, adapter_name)
            layer.op.shared |= id(layer.op.weight) in shared

    def add_parts(self, config, adapter_name):
        self._add_to_parameters(config, adapter_name)
        if getattr(config, "trainable_token_indices", None):
            from ..trainable_tokens.wrapper import wrap_trainable_tokens

            wrap_trainable_tokens(self, config.trainable_token_indices, adapter_name)

    def layer_kwargs(self, config, key):
        return dict(zip(("r", "lora_alpha"), rank_and_alpha(config, key)))

    def layer_class(self, target, key):
        own = super().layer_class(target, key)
        if own is Linear and isinstance(target, nn.MultiheadAttention):
            return MultiheadAttention
        backend = find_backend(target) if own is Linear else None
        return self.packed_linear_classes.get(backend.name, own) if backend else own

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that combines others; it is not activated. Layers that an adapter lacks count as no change.

        Args:
            weights: one per adapter; negative ones take it away.
            combination_type: "cat": the exact weighted sum, of the sum of the ranks. "svd": the sum, factorised anew to
                `svd_rank`. "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties": the factors are combined
                one by one, at the adapters' common rank. "<one of the last four>_svd": the changes of the weight are
                combined so, and factorised.
            svd_rank: rank of what is factorised; None: the largest of the adapters.
            svd_clamp: quantile of the factors' numbers at which they are clipped.
            svd_full_matrices, svd_driver: as for `torch.linalg.svd`.
            density: share of the numbers that is kept, in (0, 1]; for all but "cat", "svd" and "linear".
            majority_sign_method: how TIES elects signs; see `merge_utils.calculate_majority_sign_mask`.

        Raises:
            ValueError: unknown or repeated adapters, as many weights, a name that is taken, ranks that must be equal
                and are not, a DoRA, modules that are trained whole, or an argument outside its range.
        """
        combination = Combination(
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        )
        self._check_known(adapters)
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"There must be one weight per adapter, and one at least, got {adapters} and {weights}")
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already: delete it first, or take another name")
        layers = [layer for layer in self.layers() if layer._available_adapters & set(adapters)]
        rank = max(combination.rank([layer.r[name] for name in adapters if name in layer.r]) for layer in layers)
        self.peft_config[adapter_name] = combined_config([self.peft_config[name] for name in adapters], rank)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in self.layers():
            if adapter_name in layer._available_adapters:
                fill(layer, adapter_name, dict(zip(adapters, weights)), combination)


explain_missing(
    __name__,
    {"ParamWrapper": "peft.tuners.lora.parameters"}
    | dict.fromkeys(
        ["dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties"], "peft.utils.merge_utils"
    ),
)
