"""The command line: `peft train`, `evaluate`, `inspect`, `merge`, `search` and `memory`.

Here is what all of them share: parsing, and turning what a user can mend (a wrong argument, a broken line in the data,
a full disk) into one line on stderr and exit code 2. An error of ours keeps its traceback. Nothing heavy is imported
before the arguments have been checked.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from .common import CliError, explain


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error that the user can mend, 130 if interrupted,
    141 if nobody reads its output to the end.

    1 is what a check that fails returns (`peft evaluate --check`), or a mistake of ours, with its traceback.
    """
    from .arguments import parse

    args = parse(argv)
    try:
        code = importlib.import_module(f".{args.command}", __name__).run(args) or 0
        sys.stdout.flush()  # or Python would find out at its end that nobody takes it, and we could not say so
        return code
    except BrokenPipeError:  # `peft inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        print(f"peft {args.command}: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, CliError) else explain(error)
        if message is None:
            raise
        print(f"peft {args.command}: error: {message}", file=sys.stderr)
        return 2
