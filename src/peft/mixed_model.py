"""`PeftMixedModel`: adapters of several methods in one model. Not in this version; others test for the type."""

from __future__ import annotations

from torch import nn


class PeftMixedModel(nn.Module):
    """A model with adapters of several methods.

    Raises:
        NotImplementedError: always; the class exists for `isinstance`.
    """

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("Models with adapters of several methods are not in this version of peft")
