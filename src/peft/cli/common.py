"""What the commands have in common: errors for users, files that are never half there, tables."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config import umask

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# torch and safetensors report a full disk as an error of their own.
DISK_FULL_TEXTS = (
    "No space left on device", "os error 28", "PytorchStreamWriter failed writing", "inline_container.cc",
)  # fmt: skip
MEMORY_FULL_TEXTS = ("out of memory", "DefaultCPUAllocator: can't allocate memory")

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""In a module's name, the number of a layer in a list."""


class CliError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


class NotFinite(CliError):
    """A loss or trained weights that are infinite or not numbers."""


def explain(error: BaseException) -> str | None:
    """One line about an error of the machine (disk, permissions, ...); None if it is another kind of error."""
    chain = error
    while chain is not None:
        full = isinstance(chain, OSError) and chain.errno in DISK_FULL
        if full or any(text in str(chain) for text in DISK_FULL_TEXTS):
            where = f" ({chain.filename})" if isinstance(chain, OSError) and chain.filename else ""
            return f"the disk is full{where}: free some space, or write to another disk"
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, OSError) and error.errno is not None:
        return first_line(error)
    if isinstance(error, MemoryError) or any(text in str(error) for text in MEMORY_FULL_TEXTS):
        return f"out of memory; for training, lower --batch-size or --max-length ({first_line(error)})"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the second after a colon; or its type if it has none."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() would put it in quotes
    lines = [line.strip() for line in str(text).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def notice(text: str) -> None:
    """Tell the user something on stderr; in a distributed run only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def need(package: str, purpose: str, extra: str = "demo") -> CliError:
    """The error that says that an optional package is missing."""
    return CliError(f"{purpose} needs the package {package}: pip install 'peft[{extra}]', or pip install {package}")


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `target`, hidden beside it; it is gone afterwards unless it was renamed.

    Parents of `target` that had to be made are removed again if the block fails.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o777 & ~umask())
        yield temporary
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def give_usual_modes(folder: Path) -> None:
    """Let files have the permissions that the umask grants; safetensors makes them readable by their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask())


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to the first that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


# ---- Tables and numbers ----


def format_table(
    rows: Sequence[Sequence[object]], header: Sequence[str] | None = None, right: Sequence[int] = ()
) -> str:
    """Rows as aligned plain text below an underlined header; the columns with the numbers in `right` to the right."""
    lines = [[str(cell) for cell in row] for row in rows]
    if header is not None:
        lines = [list(header), ["-" * len(name) for name in header], *lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    if header is not None:
        lines[1] = ["-" * width for width in widths]
    aligned = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def format_bytes(size: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
