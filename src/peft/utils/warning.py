"""The warning category of this package, so that users can filter it, and how it is raised."""

from __future__ import annotations

import sys
import warnings

# What may stand between two of our functions on the stack; a user's line is none of these.
_BETWEEN = ("contextlib", "torch.utils._contextlib", "torch.nn.modules.module")


class PeftWarning(UserWarning):
    """Something that is legal but probably not meant."""


def warn(message: str) -> None:
    """Raise a `PeftWarning` that points at the line outside of this package from which it was called.

    The number of our own functions in between depends on the way by which the user came, so a fixed `stacklevel` would
    be wrong for some. (`skip_file_prefixes` does the same from Python 3.12 on.)
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PeftWarning, stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] == "peft" or module in _BETWEEN
