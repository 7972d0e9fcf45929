"""Is it worth it? Accuracy, time and memory of full fine-tuning, LoRA, SFT and SSF on tasks of reasoning-gym.

    python benchmarks/quality.py                    runs the cells that are missing, one by one, and draws
    python benchmarks/quality.py --table            only draws

A cell is one training: task, method, learning rate, seed (`quality_cell.py`). Each runs in a process of its own and
writes one JSON file when it is done, so that the benchmark can be stopped at any time and goes on where it was. First
all learning rates of a method's grid are tried with seed 0. The one of best accuracy on the validation problems is then
used for the other seeds, and only its cells give the accuracy on the test problems.

Drawing, also done after each cell, writes the tables into docs/source/quality.md and the plot beside it. What has not
been measured is empty there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quality_cell import METHODS, SUITES, Cell, Suite, is_available

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "source" / "quality.md"
POLL_SECONDS = 2.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",  # some tasks draw other problems otherwise
}
"""Of the process that runs a cell, besides what this one has."""

LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "sft-rigl": "SFT, rigl",
    "sft-sm3": "SFT, sm3",
    "sft-static": "SFT, static gradient",
    "ssf": "SSF",
    "head": "head only",
}


# ---- Cells on disk ----


class Results:
    """The finished cells of a suite, and what follows from them.

    Raises:
        SystemExit: a file was measured under other settings than the suite's, so its figures cannot stand beside new
            ones.
    """

    def __init__(self, suite: Suite, folder: Path):
        self.suite, self.folder = suite, folder
        self.cells: dict[Cell, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            cell = Cell(**{field.name: result[field.name] for field in dataclasses.fields(Cell)})
            if cell.task in suite.tasks:
                self._check_settings(path, result["settings"], suite.settings(cell.task))
                self.cells[cell] = result

    @staticmethod
    def _check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise SystemExit(
                    f"{path} was measured with {name} = {found.get(name)!r}, now it is {wanted.get(name)!r}: delete "
                    f"the file, or write to another folder (--results)"
                )

    def tuning(self, task: str, method: str) -> dict[float, dict[str, Any]]:
        """What the learning rates that were tried came to, in rising order."""
        tried = {c.rate: r for c, r in self.cells.items() if (c.task, c.method, c.seed) == (task, method, 0)}
        return dict(sorted(tried.items()))

    def best_rate(self, task: str, method: str) -> float | None:
        """The learning rate of best validation accuracy, the smallest of equals; None while a rate is missing."""
        tried = self.tuning(task, method)
        if not set(self.suite.rates.get(method, [None])) <= set(tried):
            return None
        return max(tried, key=lambda rate: (tried[rate]["validation"], -rate))

    def chosen(self, task: str, method: str) -> list[dict[str, Any]]:
        """The cells of the chosen learning rate, by seed."""
        rate = self.best_rate(task, method)
        cells = sorted((c for c in self.cells if (c.task, c.method, c.rate) == (task, method, rate)), key=seed_of)
        return [self.cells[cell] for cell in cells]


def seed_of(cell: Cell) -> int:
    return cell.seed


def missing(results: Results, seeds: int) -> Iterator[Cell]:
    """The cells that can be run now: learning rates not tried yet, then further seeds at the chosen ones."""
    suite = results.suite
    pairs = [(task, method) for task in suite.tasks for method in suite.rates if is_available(method)]
    wanted = [Cell(task, method, rate, 0) for task, method in pairs for rate in suite.rates[method]]
    rates = {pair: results.best_rate(*pair) for pair in pairs}
    for seed in range(1, seeds):
        wanted += [Cell(*pair, rates[pair], seed) for pair in pairs if rates[pair] is not None]
    yield from (cell for cell in wanted if cell not in results.cells)


# ---- Running ----


def run_missing(suite: Suite, folder: Path, seeds: int, pause_file: Path | None) -> Iterator[tuple[Cell, bool]]:
    """Run all cells that are missing; yields each with whether it succeeded. What fails is not tried twice."""
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[Cell] = []
    while True:
        results = Results(suite, folder)
        todo = [cell for cell in missing(results, seeds) if cell not in failed]
        if not todo:
            return
        cell, start = todo[0], time.monotonic()
        print(f"{cell.file}: started, {len(todo)} to run", file=sys.stderr, flush=True)
        succeeded = run_cell(suite, cell, folder, pause_file)
        if not succeeded:
            failed.append(cell)
        print(f"{cell.file}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        yield cell, succeeded


def run_cell(suite: Suite, cell: Cell, folder: Path, pause_file: Path | None) -> bool:
    """Run a cell in a process of its own; returns whether it succeeded."""
    what = json.dumps([dataclasses.asdict(suite), dataclasses.asdict(cell), str(folder / cell.file)])
    script = str(ROOT / "benchmarks" / "quality_cell.py")
    return run_process([sys.executable, script, what], {**os.environ, **ENVIRONMENT}, pause_file) == 0


def run_process(command: list[str], environment: dict[str, str], pause_file: Path | None) -> int:
    """Run a program to its end and return its exit status. For as long as `pause_file` exists it does not run."""

    def paused() -> bool:
        return pause_file is not None and pause_file.exists()

    while paused():
        time.sleep(POLL_SECONDS)
    process = subprocess.Popen(command, env=environment)
    stopped = False
    try:
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if paused() != stopped:
                    stopped = not stopped
                    process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
    finally:
        if process.poll() is None:
            process.kill()  # ends a stopped process too
            process.wait()


# ---- Table and plot ----


def tables(results: Results) -> str:
    """A Markdown table for every task."""
    if not results.cells:
        return "No cell has been run yet."
    return "\n\n".join(f"### {task}\n\n{table(results, task)}" for task in results.suite.tasks)


def table(results: Results, task: str) -> str:
    header = ["", "trained", "learning rate", "validation", "test", "seeds", "CPU s/step", "× frozen", "MiB"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [[LABELS[method], *row(results, task, method)] for method in methods_of(results.suite)]
    majority = {result["majority"] for cell, result in results.cells.items() if cell.task == task}
    lines += [["most frequent answer", "", "", "", percent(share), "", "", "", ""] for share in majority]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def methods_of(suite: Suite) -> list[str]:
    return [method for method in METHODS if method in suite.rates]


def row(results: Results, task: str, method: str) -> list[str]:
    """What the table says of a method; empty strings for what has not been measured."""
    cells = results.chosen(task, method)
    if not cells:
        return [""] * 8
    rate, tried = cells[0]["rate"], list(results.tuning(task, method))
    at_edge = len(tried) > 1 and rate in (tried[0], tried[-1])
    return [
        f"{cells[0]['trained']:,}",
        f"{rate:g}{' *' if at_edge else ''}",
        percent(results.tuning(task, method)[rate]["validation"]),
        with_error([cell["test"] for cell in cells]),
        str(len(cells)),
        f"{statistics.median(cell['cpu_seconds_per_step'] for cell in cells):.2f}",
        f"{statistics.median(map(relative_time, cells)):.2f}",
        f"{(cells[0]['step_bytes'] + cells[0]['optimizer_bytes']) / 2**20:.0f}",
    ]


def relative_time(cell: dict[str, Any]) -> float:
    """A training step in steps of the frozen model, clocked in the same process."""
    return cell["cpu_seconds_per_step"] / cell["frozen_cpu_seconds_per_step"]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def with_error(shares: list[float]) -> str:
    """Mean in percent, with its standard error if there are several."""
    if len(shares) == 1:
        return percent(shares[0])
    return f"{percent(statistics.mean(shares))} ± {percent(standard_error(shares))}"


def standard_error(values: list[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def draw(results: Results, path: Path) -> None:
    """Test accuracy of each method: every seed a dot, the mean a bar with its standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks, methods = list(results.suite.tasks), methods_of(results.suite)
    figure = Figure(figsize=(4.5 * len(tasks), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks):
        for place, method in enumerate(methods):
            accuracies = [100 * cell["test"] for cell in results.chosen(task, method)]
            if accuracies:
                error = standard_error(accuracies) if len(accuracies) > 1 else None
                axes.barh(place, statistics.mean(accuracies), xerr=error, color=f"C{place}", alpha=0.5, capsize=3)
                axes.plot(accuracies, [place] * len(accuracies), "o", color=f"C{place}", markersize=4)
        for share in {result["majority"] for cell, result in results.cells.items() if cell.task == task}:
            axes.axvline(100 * share, color="black", linestyle=":", linewidth=1)
        axes.set(title=task, xlabel="test problems solved, %", xlim=(0, 102))
        axes.set_yticks(range(len(methods)), [LABELS[method] for method in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)  # from top to bottom, with room for those that are not measured
    # Nothing about the program that wrote it: the same figures give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def fill_page(page: str, name: str, text: str, writer: str = "benchmarks/quality.py") -> str:
    """The page with the text between the markers that have this name."""
    begin, end = f"<!-- {name}: written by {writer} -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"The page must have the lines {begin!r} and {end!r} once each: between them go the tables")
    return f"{page.partition(begin)[0]}{begin}\n\n{text}\n\n{end}{page.partition(end)[2]}"


# ---- Command line ----


def parse(arguments: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUITES, default="minilm", help="default: minilm")
    parser.add_argument("--table", action="store_true", help="run nothing, only draw what there is")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per method and task (default: 3)")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of the model's tasks; default: all")
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="RATE", help="learning rates to try in place of the grid"
    )
    for name in ("steps", "batch", "validation", "test"):
        parser.add_argument(f"--{name}", type=int, help="in place of the suite's; the page shows the suite's only")
    parser.add_argument("--results", type=Path, help="folder of the cells; default: benchmarks/results/quality/MODEL")
    parser.add_argument("--pause-file", type=Path, help="while this file exists, the running cell is stopped")
    args = parser.parse_args(arguments)
    suite = SUITES[args.model]
    for name, least in (("seeds", 1), ("steps", 2), ("batch", 1), ("validation", 1), ("test", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    for task in args.tasks or ():
        if task not in suite.tasks:
            parser.error(f"--tasks must be of {', '.join(suite.tasks)} with --model {args.model}, got {task}")
    for method in args.only or ():
        if method not in suite.rates:
            parser.error(f"--only must be of {', '.join(suite.rates)} with --model {args.model}, got {method}")
    return args


def suite_of(args: argparse.Namespace) -> Suite:
    """The suite that the arguments ask for."""
    suite = SUITES[args.model]
    changed = {name: getattr(args, name) for name in ("steps", "batch", "validation", "test")}
    suite = dataclasses.replace(suite, **{name: value for name, value in changed.items() if value is not None})
    rates = {m: tuple(args.rates or rates) for m, rates in suite.rates.items() if args.only is None or m in args.only}
    tasks = {task: s for task, s in suite.tasks.items() if args.tasks is None or task in args.tasks}
    return dataclasses.replace(suite, rates=rates, tasks=tasks)


def publish(args: argparse.Namespace) -> str:
    """Draw what there is, and return the tables. Only the suite's own cells in their own folder go into the page."""
    folder = args.results or RESULTS / args.model
    if folder != RESULTS / args.model:
        results, plot = Results(suite_of(args), folder), folder / "quality.png"
    else:
        results = Results(SUITES[args.model], folder)
        plot = PAGE.with_name("quality.png" if args.model == "minilm" else f"quality-{args.model}.png")
        page = fill_page(PAGE.read_text(encoding="utf-8"), args.model, tables(results))
        PAGE.write_text(page, encoding="utf-8")
    if results.cells:
        draw(results, plot)
    return tables(results)


def main(arguments: Iterable[str] | None = None) -> int:
    args = parse(arguments)
    failed = []
    if not args.table:
        folder = args.results or RESULTS / args.model
        for cell, succeeded in run_missing(suite_of(args), folder, args.seeds, args.pause_file):
            if succeeded:
                publish(args)  # after each cell, since nobody knows which is the last before it is stopped
            else:
                failed.append(cell)
    print(publish(args))
    for cell in failed:
        print(f"failed: {cell.file}; what it said stands above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
