"""`IA3Model`: IA3 layers in a model."""

from __future__ import annotations

from ...utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from ...utils.warning import warn
from ..base import BaseTuner, model_config
from ..ops import make_op
from ..targeting import name_matches
from .layer import IA3Layer


class IA3Model(BaseTuner):
    """A model with IA3 adapters (arXiv 2205.05638); see `BaseTuner`."""

    prefix = "ia3_"
    tuner_layer_cls = IA3Layer
    target_module_mapping = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    _given = False  # whether the configuration at hand came with feedforward_modules

    def prepare_config(self, config):
        config, self._given = super().prepare_config(config), config.feedforward_modules is not None
        if config.feedforward_modules is None:
            model_type = model_config(self.model).get("model_type", "custom")
            default = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type)
            if default is None:
                raise ValueError(
                    f"No default feedforward_modules for model type {model_type!r}: give `feedforward_modules` in the "
                    "configuration, those of the targets whose input is to be scaled ([]: none)"
                )
            config.feedforward_modules = set(default)
        return config

    def shared_state(self, config, targets, adapter_name):
        """Check feedforward_modules against the targets.

        Raises:
            ValueError: a layer whose input is not scaled by scaling its weight.
        """
        wanted = config.feedforward_modules
        for key, target in targets.items():
            if name_matches(wanted, key) and make_op(target).kind in ("Embedding", "Norm"):
                raise ValueError(
                    f"Target module {key} ({type(target).__name__}) is not supported in feedforward_modules: its "
                    "input has no channels with weights of their own. Leave it out there, and its output is scaled"
                )
        if self._given and not config.from_file:
            entries = [wanted] if isinstance(wanted, str) else [[entry] for entry in sorted(wanted)]
            useless = [entry for entry in entries if not any(name_matches(entry, key) for key in targets)]
            if useless:
                warn(f"feedforward_modules names what is no target, so that it has no effect: {useless}")

    def layer_kwargs(self, config, key):
        return {"is_feedforward": name_matches(config.feedforward_modules, key)}
