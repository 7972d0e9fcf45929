"""Sparse fine-tuning end to end: what `make demo` runs.

SmolLM2-135M learns to reverse lists of words, a task of reasoning-gym with checkable answers. `peft train` says how
many held-out problems it solves exactly before and after; then a fresh process loads the saved adapter and must
come to the same figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

TRAINING = {
    "--method": "sft",
    "--data": "task:word_sequence_reversal",
    "--task-args": json.dumps({"max_words": 4}),
    "--train-size": "800",
    "--eval-size": "100",
    "--batch-size": "8",
    "--epochs": "1",
    "--density": "0.01",
    "--lr": "2e-3",
}


def peft(*arguments: str) -> None:
    """Run the `peft` command in a process of its own."""
    print("$ peft", *arguments, flush=True)
    result = subprocess.run([sys.executable, "-m", "peft", *arguments])
    if result.returncode:
        sys.exit(result.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/demo", help="folder for the run; default: runs/demo")
    parser.add_argument("options", nargs="*", help="options of `peft train` that replace the demo's, after a --")
    args = parser.parse_args()
    start = time.monotonic()
    given = dict(zip(args.options[::2], args.options[1::2]))
    options = [part for pair in (TRAINING | given).items() for part in pair]
    peft("train", *options, "--output", args.output, "--overwrite")
    print("\nThe same adapter in a fresh process:", flush=True)
    peft("evaluate", args.output, "--check")
    print(f"\n{time.monotonic() - start:.0f} s in all; the adapter is in {Path(args.output)}")


if __name__ == "__main__":
    main()
