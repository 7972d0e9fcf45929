"""Do DE-NAS's scores mean anything, and does what they find pay?

    python benchmarks/denas_proxy.py                    runs the cells that are missing, one by one, and draws
    python benchmarks/denas_proxy.py --model smollm2    likewise, of the larger model
    python benchmarks/denas_proxy.py --table            only draws

A cell is one fine-tuning of a LoRA: task, structure, learning rate, seed; as in `quality.py`, of which this is a part
with other methods. It writes one JSON file when it is done, so that the benchmark can be stopped at any time and goes
on where it was. There are two kinds of structures:

- Random ones. "wide" ones are drawn over all sizes, "narrow" ones have the parameters of an even LoRA to 2 %, so that
  the mere number says nothing; these are trained with two seeds. The table has Spearman's correlation of what each
  predictor says with minus the held-out loss (1: it orders structures as training does) and its 95 % bootstrap
  interval.
- Those that a user would choose, and those that a search finds, at equal numbers of parameters, with three seeds.

All structures are trained at the same learning rate, one that suits LoRA on all linear layers (see `quality.py`).

Predictors are computed when the cells are there, and kept in a file beside them. Drawing, also done at the end, writes
the tables into docs/source/denas.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from denas_predictors import predictors
from quality import ENVIRONMENT, ROOT, fill_page, relative_time, run_process, standard_error
from quality_cell import Cell, Suite, adapted, problem_of, run_cell

RESULTS = ROOT / "benchmarks" / "results" / "denas"
PAGE = ROOT / "docs" / "source" / "denas.md"
STRUCTURES = 24
"""Random ones of each kind, wide and narrow."""
BAND = (0.98, 1.0)
"""Share of an even LoRA's parameters that narrow structures have."""
SEARCH_BATCHES = 4
"""Batches of the training data that scores see."""
R_MAX = 12
CONTESTANTS = {
    "usual": "LoRA, usual targets",
    "even": "LoRA, all linear layers",
    "found-layer": "found, per layer",
    "found-module": "found, per layer and module type",
}
SUITES = {
    "minilm": Suite(
        model="minilm",
        tasks={
            "aiw": {"task_type_weights": [0.5, 0.5, 0.0], "max_entities": 20},
            "syllogism": {"invalid_ratio": 0.5},
        },
        rates={},
        steps=40,
        batch=16,
        validation=200,
        test=300,
        rank=4,
    ),
    "smollm2": Suite(
        model="smollm2",
        tasks={"word_sequence_reversal": {"max_words": 4}, "letter_counting": {}},
        rates={},
        steps=40,
        batch=4,
        validation=32,
        test=64,
        rank=4,
    ),
}
"""As in `quality_cell`. A LoRA of rank `rank` on all linear layers is the budget."""
RATES = {"aiw": 5e-3, "syllogism": 2e-3, "word_sequence_reversal": 1e-3, "letter_counting": 1e-3}
"""Learning rate by task."""
PRESET_NAMES = {"minilm": "all-minilm-l6-v2", "smollm2": "smollm2-135m"}


# ---- Structures ----


class Bench:
    """A task's model and data with one seed, the search space, and the structures in it by name."""

    def __init__(self, suite: Suite, task: str, seed: int = 0):
        import transformers

        from peft import DenasConfig, LoraConfig
        from peft.tuners.denas.space import SearchSpace

        self.suite = suite
        self.problem = problem_of(suite, task)
        transformers.set_seed(seed)
        self.model = self.problem.base()  # as `run_cell` makes it
        rank = suite.rank
        self.config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=self.problem.task_type
        )
        self.space = SearchSpace(self.model, self.config, DenasConfig(r_max=R_MAX), with_alpha=False)

    @functools.cached_property
    def random_structures(self) -> dict[str, np.ndarray]:
        """Candidates by name, always the same."""
        from peft.tuners.denas.space import Budget

        full, most = self.space.full_params, int(self.space.costs.max(axis=1).sum())
        found = {}
        for kind, budget in (("wide", Budget(most)), ("narrow", Budget(int(BAND[1] * full), int(BAND[0] * full)))):
            rng = np.random.default_rng([0, len(kind)])
            for number in range(STRUCTURES):
                codes = self.space.fit(self.space.draw(rng), budget, rng)
                if codes is None:
                    raise SystemExit(f"no structure has {budget.min_params:,} to {budget.max_params:,} parameters")
                found[f"{kind}-{number:02d}"] = codes
        return found

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The first batches of the training data."""
        size, examples = self.suite.batch, self.problem.examples
        return [self.problem.collate(examples[i * size : (i + 1) * size]) for i in range(SEARCH_BATCHES)]

    def config_of(self, name: str) -> Any:
        """The ordinary LoRA of a structure."""
        from peft import DenasConfig, search_structure
        from peft.tuners.denas.structure import LAYER_NAME, configure

        space = self.space
        if name == "usual":
            one = dataclasses.replace(self.config, r=1, lora_alpha=2, target_modules=None)
            usual = type(space)(self.model, one, DenasConfig(), with_alpha=False)
            r = space.full_params // usual.full_params
            return dataclasses.replace(self.config, r=r, lora_alpha=2 * r, target_modules=None)
        if name.startswith("found-"):
            search = DenasConfig(granularity=name.removeprefix("found-"), r_max=R_MAX)
            found = search_structure(self.model, self.config, search, batch=self.batches(), progress=False)
            return found.config()
        if name == "even":
            codes = np.tile([1, space.values[0].index(self.suite.rank), 0], (len(space.units), 1))
        else:
            codes = self.random_structures[name]
        return configure(self.config, space.layout, space.to_dict(codes), LAYER_NAME)


def held_out_loss(problem, model: torch.nn.Module, problems: list[dict[str, Any]]) -> float:
    """Mean loss of an answer (classifier) or of its tokens."""
    from peft.cli.evaluate import own_batches

    examples = problem.examples_of(problems)
    model.eval()
    total = count = 0
    for rows in own_batches([problem.length_of(example) for example in examples], 2 * problem.batch):
        batch = problem.collate([examples[row] for row in rows])
        labels = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total, count = total + model(**batch).loss.item() * labels, count + labels
    return total / count


# ---- Cells on disk ----


@functools.cache
def settings(model: str, task: str) -> dict[str, Any]:
    """What a loss depends on besides its cell's coordinates."""
    return SUITES[model].settings(task) | {"r_max": R_MAX, "band": list(BAND), "search_batches": SEARCH_BATCHES}


class Results:
    """The finished cells of a model.

    Raises:
        SystemExit: a file was measured under other settings.
    """

    def __init__(self, model: str, folder: Path):
        self.model, self.folder, self.suite = model, folder, SUITES[model]
        self.cells: dict[Cell, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            cell = Cell(**{field.name: result[field.name] for field in dataclasses.fields(Cell)})
            if result["settings"] != settings(model, cell.task):
                raise SystemExit(f"{path} was measured under other settings: delete it, or take another folder")
            self.cells[cell] = result

    def of(self, task: str, name: str) -> list[dict[str, Any]]:
        """The cells of a structure, by seed."""
        cells = (cell for cell in self.cells if (cell.task, cell.method) == (task, name))
        return [self.cells[cell] for cell in sorted(cells, key=lambda cell: cell.seed)]

    def loss(self, cell: dict[str, Any]) -> float:
        """Of all held-out problems: none of them chooses anything here."""
        parts = (("validation", self.suite.validation), ("test", self.suite.test))
        return sum(cell[name] * size for name, size in parts) / (self.suite.validation + self.suite.test)

    def missing(self, tasks: Iterable[str], part: str, seeds: int) -> Iterator[Cell]:
        """The cells to run, the most telling first."""
        stages = [("proxy", "narrow", range(1)), ("pays", "", range(seeds))]
        stages += [("proxy", "wide", range(1)), ("proxy", "narrow", range(1, 2))]
        for what, kind, its_seeds in stages:
            names = CONTESTANTS if what == "pays" else [f"{kind}-{number:02d}" for number in range(STRUCTURES)]
            cells = (Cell(task, name, RATES[task], seed) for task in tasks for seed in its_seeds for name in names)
            yield from (cell for cell in cells if part in (what, "all") and cell not in self.cells)

    def scores_file(self, task: str) -> Path:
        return self.folder / "scores" / f"{task}.json"

    def scores(self, task: str) -> dict[str, dict[str, float]]:
        """`{predictor: {structure: value}}`; empty before they have been computed."""
        path = self.scores_file(task)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_json(path: Path, content: Any) -> None:
    from peft.config import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


# ---- Running ----


def work(args: argparse.Namespace) -> None:
    """Run the cells that are missing in this process."""
    torch.set_num_threads(1)
    suite = SUITES[args.model]
    make_bench = functools.lru_cache(maxsize=1)(lambda task, seed: Bench(suite, task, seed))
    for _ in range(args.limit):
        results = Results(args.model, args.results)
        cell = next(results.missing(args.tasks or suite.tasks, args.part, args.seeds), None)
        if cell is None:
            break
        start = time.monotonic()
        bench = make_bench(cell.task, cell.seed)
        config = bench.config_of(cell.method)
        result = run_cell(suite, cell, lambda model, *_, config=config: adapted(model, config), held_out_loss)
        result |= {"structure": config.structure, "settings": settings(args.model, cell.task)}
        write_json(args.results / cell.file, result)
        print(f"{cell.file}: loss {result['test']:.4f}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def score(args: argparse.Namespace) -> None:
    """Compute what the predictors say of the random structures that have been measured since."""
    torch.set_num_threads(1)
    results = Results(args.model, args.results)
    for task in args.tasks or SUITES[args.model].tasks:
        measured = {name for kind in ("wide", "narrow") for name in random_losses(results, task, kind)}
        known = results.scores(task)
        if new := sorted(measured - set(known.get("random", ()))):
            bench = Bench(SUITES[args.model], task)
            for predictor, values in predictors(bench, {name: bench.random_structures[name] for name in new}).items():
                known.setdefault(predictor, {}).update(values)
            write_json(results.scores_file(task), known)
            print(f"{task}: scored {len(new)} structures", file=sys.stderr, flush=True)


def write_preset(model: str) -> None:
    """Put the structure that is found for the model, its first task and seed 0, into the package."""
    from peft.tuners.denas.structure import PRESETS, write_structure

    suite = SUITES[model]
    structure = Bench(suite, next(iter(suite.tasks))).config_of("found-layer").structure
    write_structure(structure, PRESETS / f"{PRESET_NAMES[model]}.json")


# ---- Tables ----


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; ties get their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def interval(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap of `spearman`."""
    rng = np.random.default_rng(0)
    samples = (rng.integers(0, len(a), len(a)) for _ in range(draws))
    values = [spearman(a[i], b[i]) for i in samples if len(np.unique(a[i])) > 1 and len(np.unique(b[i])) > 1]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def correlations(results: Results) -> str:
    """A Markdown table: what each predictor's order of the random structures has to do with that of their losses."""
    columns = [(task, kind) for task in results.suite.tasks for kind in ("wide", "narrow")]
    losses = {column: random_losses(results, *column) for column in columns}
    header = ["predictor", *(f"{task}, {len(losses[task, kind])} {kind}" for task, kind in columns)]
    lines = [header, ["---"] + ["---"] * len(columns)]
    scores = {task: results.scores(task) for task in results.suite.tasks}
    for predictor in dict.fromkeys(name for task in scores for name in scores[task]):
        cells = []
        for task, kind in columns:
            values, loss = scores[task].get(predictor, {}), losses[task, kind]
            both = sorted(values.keys() & loss.keys())
            cells.append(correlation([values[name] for name in both], [-statistics.mean(loss[name]) for name in both]))
        lines.append([predictor, *cells])
    again = [correlation(*second_seed(losses[column])) for column in columns]
    lines.append(["the loss itself, with another seed", *again])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def random_losses(results: Results, task: str, kind: str) -> dict[str, list[float]]:
    """Held-out losses of the random structures of a kind, by seed."""
    names = {cell.method for cell in results.cells if cell.method.startswith(kind)}
    losses = {name: [results.loss(cell) for cell in results.of(task, name)] for name in sorted(names)}
    return {name: found for name, found in losses.items() if found}


def second_seed(losses: dict[str, list[float]]) -> list[list[float]]:
    """Losses of the structures that have been trained with both seeds, by seed."""
    return [[both[seed] for both in losses.values() if len(both) == 2] for seed in (0, 1)]


def correlation(a: list[float], b: list[float]) -> str:
    """Spearman's correlation with its interval; empty where there are too few structures to say anything."""
    if len(a) < 8:
        return ""
    if len(set(a)) == 1:
        return "the same for all"
    a, b = np.array(a), np.array(b)
    low, high = interval(a, b)
    return f"{spearman(a, b):.2f} ({low:.2f} to {high:.2f})"


def contest(results: Results, task: str) -> str:
    """A Markdown table of what a user would choose and what a search finds."""
    header = ["", "trained", "held-out loss", "seeds", "CPU s/step", "× frozen", "MiB"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, label in CONTESTANTS.items():
        cells = results.of(task, name)
        lines.append([label, *(contest_row(results, cells) if cells else [""] * 6)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def contest_row(results: Results, cells: list[dict[str, Any]]) -> list[str]:
    losses = [results.loss(cell) for cell in cells]
    error = f" ± {standard_error(losses):.3f}" if len(losses) > 1 else ""
    return [
        f"{cells[0]['trained']:,}",
        f"{statistics.mean(losses):.3f}{error}",
        str(len(losses)),
        f"{statistics.median(cell['cpu_seconds_per_step'] for cell in cells):.2f}",
        f"{statistics.median(map(relative_time, cells)):.2f}",
        f"{(cells[0]['step_bytes'] + cells[0]['optimizer_bytes']) / 2**20:.0f}",
    ]


def page_with_tables(page: str, model: str, results: Results) -> str:
    """The page of DE-NAS with this model's tables."""
    page = fill_page(page, f"{model}, scores", correlations(results), "benchmarks/denas_proxy.py")
    tables = "\n\n".join(f"`{task}`:\n\n{contest(results, task)}" for task in results.suite.tasks)
    return fill_page(page, f"{model}, results", tables, "benchmarks/denas_proxy.py")


# ---- Command line ----


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUITES, default="minilm", help="default: minilm")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of the model's tasks; default: all")
    parser.add_argument("--part", choices=("all", "proxy", "pays"), default="all", help="random structures, or contest")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the contest (default: 3)")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="run at most so many cells now")
    parser.add_argument("--table", action="store_true", help="run nothing, only draw what there is")
    parser.add_argument("--score", action="store_true", help="fine-tune nothing, only compute predictors")
    parser.add_argument("--preset", action="store_true", help="only search, and put what is found into the package")
    parser.add_argument("--results", type=Path, help="folder of the cells; default: benchmarks/results/denas/MODEL")
    parser.add_argument("--pause-file", type=Path, help="while this file exists, the running cell is stopped")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args(arguments)
    for task in args.tasks or ():
        if task not in SUITES[args.model].tasks:
            parser.error(f"--tasks must be of {', '.join(SUITES[args.model].tasks)}, got {task}")
    own_folder = args.results is None
    args.results = args.results or RESULTS / args.model
    if args.here:
        if args.preset:
            write_preset(args.model)
        else:
            if not args.score:
                work(args)
            score(args)
        return 0
    if not args.table:
        command = [sys.executable, __file__, *(arguments or sys.argv[1:]), "--here"]
        if status := run_process(command, {**os.environ, **ENVIRONMENT}, args.pause_file):
            return status
    results = Results(args.model, args.results)
    page = page_with_tables(PAGE.read_text(encoding="utf-8"), args.model, results)
    if own_folder:
        PAGE.write_text(page, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
