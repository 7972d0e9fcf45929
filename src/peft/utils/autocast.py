"""Autocast, as autograd functions of ours meet it."""

from __future__ import annotations

import contextlib

import torch


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast is off while this lasts.

    Where it is off anyway nothing is entered: torch's context takes as long as a small operation, and every adapted
    layer needs two of them in a step. (While torch.compile traces a function's backward pass together with its forward
    pass, nobody knows yet where the former will run.)
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
