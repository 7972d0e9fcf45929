"""Lazy packages: names and submodules that are imported when somebody first asks for them (PEP 562).

`attach` builds what a package's `__init__` needs from a literal table. Asking for a name that upstream has and this
package does not (`_missing`) says which method it belongs to and where it can be had.

A package is told twice about a name that is missing, because Python asks in two ways. `peft.AdaLoraConfig` and
`hasattr(peft, "AdaLoraConfig")` go through the package's `__getattr__`, which must raise AttributeError. `from peft
import AdaLoraConfig` swallows that error and next looks for a submodule of that name; there a finder, last on
`sys.meta_path`, raises ImportError. (No single exception can do both: AttributeError and ImportError have different
memory layouts, so Python refuses a class that is both.) The second way exists for packages only, so plain modules get
an empty `__path__` (`explain_missing`). Modules that are missing as a whole (`import peft.tuners.xlora`) come to the
finder as well; `importlib.util.find_spec` raises that ImportError for them, too, instead of returning None.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(
    package: str, table: Mapping[str, str], submodules: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `(__getattr__, __dir__, __all__)` for the package `package`.

    Args:
        package: the package's `__name__`.
        table: public name -> module that defines it, perhaps relative to the package (`".tuners.lora"`).
        submodules: submodules that are reachable as attributes without having been imported.
    """

    def __getattr__(name: str) -> Any:
        if name in table:
            value = getattr(importlib.import_module(table[name], package), name)
        elif name in submodules:
            value = importlib.import_module(f"{package}.{name}")
        elif not name.startswith("_") and (text := explanation(f"{package}.{name}")):
            raise AttributeError(text)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next look-up does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *table, *submodules})

    return __getattr__, __dir__, sorted(table)


class _MissingNames:
    """A finder that finds nothing: it explains `from package import name` for the known missing names."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> None:
        if text := explanation(fullname):
            raise ImportError(text, name=fullname)


sys.meta_path.append(_MissingNames)


def explain_missing(module: str, elsewhere: Mapping[str, str] | None = None) -> None:
    """Let a module say of upstream's names that it lacks which method they belong to.

    Args:
        module: its `__name__`; a package that does not use `attach`, or a plain module.
        elsewhere: name -> module that defines it; these can be imported from here too.
    """
    content = vars(sys.modules[module])
    content["__getattr__"] = attach(module, elsewhere or {})[0]
    content.setdefault("__path__", [])  # see above


def explanation(fullname: str) -> str | None:
    """What to say of a name of upstream's that is not here; None: it is here, or nobody's."""
    if not fullname.startswith("peft."):
        return None
    from . import __version__
    from ._missing import method_of

    method = method_of(fullname)
    if method is None:
        return None
    # Not plain `pip install peft==X`: our version satisfies that requirement, so pip would leave everything as it is.
    upstream = __version__.partition("+")[0]
    return (
        f"{method} ({fullname}) is not part of peft {__version__} yet; upstream's package "
        f"has it: pip install --force-reinstall --no-deps peft=={upstream}"
    )
