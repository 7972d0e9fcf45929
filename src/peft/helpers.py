"""Small tools around a model with adapters."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

from torch import nn

from ._lazy import explain_missing


class _Signed:
    """A model's method with the signature and the docstring of its base model's.

    An object that holds both bound methods, not a function over them: in a deep copy or an unpickled model these are
    bound to the copy.
    """

    def __init__(self, own: Callable, base: Callable):
        self.own = own
        # Not __annotations__, which may hold what cannot be pickled; inspect.signature follows __wrapped__.
        functools.update_wrapper(self, base, ("__module__", "__name__", "__qualname__", "__doc__"), updated=())

    def __call__(self, *args, **kwargs):
        return self.own(*args, **kwargs)


def _take_signature(model: nn.Module, name: str) -> None:
    own = getattr(model, name)
    own = own.own if isinstance(own, _Signed) else own
    setattr(model, name, _Signed(own, getattr(model.get_base_model(), name)))


def update_forward_signature(model: nn.Module) -> None:
    """Let `inspect.signature(model.forward)` be that of the base model's forward."""
    _take_signature(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Let `inspect.signature(model.generate)` be that of the base model's generate."""
    if hasattr(model.get_base_model(), "generate"):
        _take_signature(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Both of the above.

    Raises:
        ValueError: `method` is not "forward", "generate" or "all".
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method must be 'forward', 'generate' or 'all', got {method!r}")
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """Whether there is an adapter at a folder or hub id."""
    from .config import PeftConfig

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (OSError, ValueError, KeyError):
        return False
    return True


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this context the LoRA scalings of a model are multiplied by `multiplier`.

    Raises:
        TypeError: `multiplier` is not a number.
        ValueError: the model has no LoRA layers.
    """
    from .tuners.lora import LoraLayer

    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier must be a number, got {type(multiplier).__name__}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("The model has no LoRA layers to scale")
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: scale * multiplier for name, scale in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling.update(scaling)


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within this context layers do not cast their inputs to the adapter's dtype.

    They never do for plain layers: the factors are cast instead. Factors with hooks (layer-wise casting) are called
    as modules; within this context with the input as it is.
    """
    from .tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.cast_input_dtype_enabled = enabled


explain_missing(__name__)
