"""`AdaptionPromptModel`: adapted attention in the last layers of a model."""

from __future__ import annotations

from functools import partial

from ..base import BaseTuner
from ..targeting import model_config
from .layer import KINDS, AdaptedAttention


class AdaptionPromptModel(BaseTuner):
    """A model with LLaMA-Adapters (arXiv 2303.16199); see `BaseTuner`."""

    prefix = "adaption_"
    tuner_layer_cls = AdaptedAttention

    def _kind(self) -> type:
        model_type = model_config(self.model).get("model_type")
        if model_type not in KINDS:
            raise ValueError(f"Adaption prompts are for the model types {sorted(KINDS)}, got {model_type!r}")
        return KINDS[model_type]

    def prepare_config(self, config):
        """Fill in the name of the attention modules."""
        for name in ("adapter_len", "adapter_layers"):
            if getattr(config, name) is None:
                raise ValueError(f"AdaptionPromptConfig needs {name}")
        config.target_modules = config.target_modules or self._kind().target
        return config

    def layer_class(self, target, key):
        return partial(AdaptedAttention, kind=self._kind(), width=self.model.config.hidden_size)

    def _find_targets(self, config, state_dict):
        ending, wanted = f".{config.target_modules}", self._kind().target
        found = {key: module for key, module in self.model.named_modules() if key.endswith(ending)}
        if config.target_modules != wanted or len(found) < config.adapter_layers:
            raise ValueError(
                f"adapter_layers={config.adapter_layers} and target_modules={config.target_modules!r} do not fit the "
                f"model: it has {len(found)} such modules, and its attention is called {wanted!r}"
            )
        last = list(found)[-config.adapter_layers :]
        return {key: getattr(found[key], "base_layer", found[key]) for key in last}
