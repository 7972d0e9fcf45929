"""`PeftMixedModel`: adapters of several methods in one model (`get_peft_model(..., mixed=True)`)."""

from __future__ import annotations

import contextlib

from .peft_model import PeftModel
from .tuners.mixed import MixedModel


class PeftMixedModel(PeftModel):
    """A model with adapters of several methods (see `tuners.mixed`), several of which can be active; as `PeftModel`."""

    one_method = False

    @staticmethod
    def _tuner_class(peft_config):
        return MixedModel

    def _mixed_batch(self, adapter_names, generating=False):
        if adapter_names is not None:
            raise ValueError("A model of several methods has no mixed batches: activate adapters with set_adapter()")
        return contextlib.nullcontext()
