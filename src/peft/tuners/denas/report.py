"""What a search found, as files and pictures."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...config import write_atomically, write_text
from ...utils.constants import STRUCTURE_NAME
from ...utils.peft_types import PeftType
from .search import Record
from .space import SearchSpace
from .structure import SIZES, write_structure

COLUMNS = ("number", "score", "params", "latency_ms", "structure")


class SearchResult:
    """The best structure and the history of a search.

    Attributes:
        structure: the best one, as a JSON object.
        score, params, latency: its score, number of parameters, and milliseconds of a forward pass (None: not clocked).
        history: every candidate that was scored, in order: `{"number", "score", "params", "latency_ms", "structure"}`.
        front: those of the Pareto front (engine "nsga2"), by falling score; else None.
    """

    def __init__(
        self, space: SearchSpace, best: Record, history: list[Record], front: list[Record] | None, layer_name: str
    ):
        self._space, self._layer_name = space, layer_name
        self.method = space.method
        self.structure = space.to_dict(best.codes, layer_name)
        self.score, self.params, self.latency = best.score, best.params, best.latency
        rows = {record.codes.tobytes(): self._row(i, record) for i, record in enumerate(history)}
        self.history = list(rows.values())
        self.front = None if front is None else [rows[record.codes.tobytes()] for record in front]

    def _row(self, number: int, record: Record) -> dict[str, Any]:
        structure = self._space.to_dict(record.codes, self._layer_name)
        return dict(zip(COLUMNS, (number, record.score, record.params, record.latency, structure)))

    def config(self) -> Any:
        """The ordinary configuration of the best structure, for `get_peft_model` on the same base model."""
        from .structure import configure

        return configure(self._space.config, self._space.layout, self.structure, self._layer_name)

    def save(self, folder: str | os.PathLike, plots: bool = False) -> None:
        """Write `best_model_structure.txt`, `history.csv` and `history.json` into a folder, and the plots if wanted.

        Raises:
            ImportError: plots without matplotlib.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_structure(self.structure, folder / STRUCTURE_NAME)
        content = {"method": self.method.value, "history": self.history, "front": self.front}
        write_text(folder / "history.json", json.dumps(content) + "\n")
        write_atomically(folder / "history.csv", self._write_csv)
        if plots:
            self.plot_search(folder / "search.png")
            self.plot_structure(folder / "structure.png")

    def _write_csv(self, path: str) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in self.history:
                writer.writerow([json.dumps(row[name]) if name == "structure" else row[name] for name in COLUMNS])

    # Pictures

    def plot_search(self, path: str | os.PathLike) -> None:
        """Draw score over evaluations, and, after "nsga2", score over parameters with the Pareto front."""
        figure = new_figure(9 if self.front else 6, 4)
        panels = figure.subplots(1, 2 if self.front else 1, squeeze=False)[0]
        scores = [row["score"] for row in self.history]
        panels[0].plot(scores, ".", label="structure")
        panels[0].step(range(len(scores)), np.maximum.accumulate(scores), where="post", label="best so far")
        panels[0].set(xlabel="structures scored", ylabel="score")
        panels[0].legend()
        if self.front:
            front = sorted(self.front, key=lambda row: row["params"])
            panels[1].plot([row["params"] for row in self.history], scores, ".", label="structure")
            panels[1].plot(
                [row["params"] for row in front], [row["score"] for row in front], "o-", label="Pareto front"
            )
            panels[1].set(xlabel="trained parameters", ylabel="score")
            panels[1].legend()
        write_figure(figure, path)

    def plot_structure(self, path: str | os.PathLike) -> None:
        """Draw the size of every layer's delta as bars (rank, share, or on and off), a row for each type of module."""
        name = SIZES[self.method][0] if SIZES[self.method] else self._layer_name
        sizes, on = self.structure[name], self.structure[self._layer_name]
        if not isinstance(on, dict):
            sizes, on = {"": sizes}, {"": on}
        figure = new_figure(3 + 0.25 * self._space.layout.layers, 1 + 1.6 * len(on))
        for axes, kind in zip(figure.subplots(len(on), squeeze=False)[:, 0], on):
            axes.bar(range(len(on[kind])), [size * used for size, used in zip(sizes[kind], on[kind])])
            axes.set(ylabel={"r": "rank", "share": "share"}.get(name, "on"), title=kind, xlabel="layer")
        figure.suptitle(f"{PeftType(self.method).value}: {self.params:,} parameters, score {self.score:.4g}")
        write_figure(figure, path)


def new_figure(width: float, height: float):
    """A figure of so many inches that no window of matplotlib's belongs to."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
