"""`PeftMixedModel`: a model with adapters of several methods. Not in this version; other libraries test for its type."""

from __future__ import annotations

from torch import nn


class PeftMixedModel(nn.Module):
    """A model with adapters of several methods.

    Raises:
        NotImplementedError: always; the class exists for `isinstance`.
    """

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("Models with adapters of several methods are not in this version of peft")
