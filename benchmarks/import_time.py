"""Wall time of `import peft` beside that of `import torch`, in fresh processes.

`import peft` imports nothing that it does not use, torch included, so a second row shows what a program pays that goes
on to adapt a model. Each round starts one process per row, in turn, so that a slow phase of the machine hits all rows
alike. One round is thrown away: it fills the disk cache. With `--upstream-python`, the interpreter of an environment
that has upstream's package, the table gains upstream's rows.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

ADAPT = "from peft import LoraConfig, get_peft_model"
LIMIT = 1.2  # times `import torch`


def seconds(python: str, code: str) -> float:
    """Wall time of a process that runs `code`. The interpreter's own start counts: users wait for it too."""
    start = time.perf_counter()
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{python} failed to run {code!r}:\n{done.stderr}")
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes per row (default: 5)")
    parser.add_argument("--upstream-python", metavar="PATH", help="interpreter of an environment with upstream's peft")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    rows = {
        "import torch": (sys.executable, "import torch"),
        "import peft": (sys.executable, "import peft"),
        ADAPT: (sys.executable, ADAPT),
    }
    if args.upstream_python:
        rows["import torch (upstream's environment)"] = (args.upstream_python, "import torch")
        rows["import peft (upstream)"] = (args.upstream_python, "import peft")

    times: dict[str, list[float]] = {label: [] for label in rows}
    for round_ in range(args.rounds + 1):
        for label, (python, code) in rows.items():
            taken = seconds(python, code)
            if round_ > 0:
                times[label].append(taken)

    medians = {label: statistics.median(taken) for label, taken in times.items()}
    print(f"median of {args.rounds} fresh processes")
    print(f"{'':50}{'seconds':>9}{'x torch':>9}")
    for label, median in medians.items():
        print(f"{label:50}{median:9.2f}{median / medians['import torch']:9.2f}")

    worst = max(medians["import peft"], medians[ADAPT]) / medians["import torch"]
    print(f"\nlimit {LIMIT} x torch: {'kept' if worst <= LIMIT else 'EXCEEDED'}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
