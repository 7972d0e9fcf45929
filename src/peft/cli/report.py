"""Tables and pictures: of a training run (metrics.json, loss.png, the summary) and of what an adapter changes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from .common import LAYER_NUMBER, format_table, notice
from .evaluate import METRICS_FILE, Measure

CURVE_FILE = "loss.png"


def write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    text = json.dumps(metrics, indent=2, allow_nan=False)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")


def draw_curve(losses: list[tuple[int, float]], title: str, folder: Path) -> None:
    """Draw training loss by update step, and its running mean, into loss.png.

    Without matplotlib, which is not a requirement of the package, there is a notice instead.
    """
    if importlib.util.find_spec("matplotlib") is None:
        notice(f"{CURVE_FILE} is not drawn: that needs matplotlib (pip install 'peft[demo]')")
        return
    from ..tuners.denas.report import new_figure, write_figure

    steps, values = zip(*losses)
    means, mean = [], values[0]
    for value in values:
        mean += (value - mean) / min(len(means) + 1, 20)
        means.append(mean)
    figure = new_figure(7, 4)
    axes = figure.add_subplot(xlabel="update step", ylabel="training loss")
    axes.set_title(printable(title), parse_math=False)
    axes.plot(steps, values, color="C0", alpha=0.3, linewidth=1)
    axes.plot(steps, means, color="C0", linewidth=2)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    write_figure(figure, folder / CURVE_FILE)


def printable(title: str) -> str:
    """A title without what is no Unicode, as the name of a file may hold; matplotlib would refuse it."""
    return title.encode(errors="replace").decode()


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """The table that a run ends with."""
    before, after = (Measure(metrics["metric"], metrics[when]) for when in ("before", "after"))
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    rows = [
        [f"held-out {metrics['metric']} before", before],
        [f"held-out {metrics['metric']} after", after],
        ["update steps", metrics["steps"]],
        ["training time", f"{metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s"],
        ["trained parameters", f"{trained:,} of {total:,} ({100 * trained / total:.2f} %)"],
        ["written to", folder],
    ]
    return format_table(rows)


# ---- What an adapter changes ----


@dataclasses.dataclass
class Delta:
    """What an adapter does to a weight, or to several."""

    trained: int
    """Numbers that were trained for it."""
    weights: int
    """Numbers that the base weight has."""
    norm: float | None
    """Frobenius norm of the change of the weight; None: cannot be known without the base weight."""
    base_norm: float | None
    """Frobenius norm of the base weight; None: it was not read."""

    @property
    def share(self) -> float:
        return self.trained / self.weights

    @property
    def relative(self) -> float | None:
        """Norm of the change by that of the weight."""
        return self.norm / self.base_norm if self.norm is not None and self.base_norm else None

    def __add__(self, other: Delta) -> Delta:
        """Both as one weight."""
        norms = ((self.norm, other.norm), (self.base_norm, other.base_norm))
        norm, base_norm = (None if None in pair else math.hypot(*pair) for pair in norms)
        return Delta(self.trained + other.trained, self.weights + other.weights, norm, base_norm)


def by_layer(deltas: dict[str, Delta]) -> dict[str, Delta]:
    """The deltas of all modules in a numbered layer as one, by the layer's name; modules in none stay by themselves."""
    layers: dict[str, list[Delta]] = {}
    for name, delta in deltas.items():
        match = LAYER_NUMBER.search(name)
        layers.setdefault(name[: match.end()] if match else name, []).append(delta)
    return {name: sum(rest, first) for name, (first, *rest) in layers.items()}


def delta_table(deltas: dict[str, Delta]) -> str:
    """A line for each delta; columns of which nothing is known are left out."""
    columns = {
        "trained": lambda delta: f"{delta.trained:,}",
        "share": lambda delta: f"{delta.share:.3%}",
        "norm": lambda delta: None if delta.norm is None else f"{delta.norm:.4g}",
        "relative norm": lambda delta: None if delta.relative is None else f"{delta.relative:.3%}",
    }
    cells = {title: [show(delta) for delta in deltas.values()] for title, show in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    rows = [[name, *("-" if cell is None else cell for cell in row)] for name, row in zip(deltas, zip(*cells.values()))]
    return format_table(rows, ["layer", *cells], right=range(1, len(cells) + 1))


def draw_deltas(deltas: dict[str, Delta], title: str, path: Path) -> None:
    """Draw share and norm of the deltas into a PNG file: a column per numbered layer, a row per kind of module."""
    import numpy as np

    from ..tuners.denas.report import new_figure, write_figure

    places = {}  # name -> its kind and the number of its layer; -1: it is in no numbered layer
    for name in deltas:
        match = LAYER_NUMBER.search(name)
        places[name] = (LAYER_NUMBER.sub("*", name, count=1), int(match[0]) if match else -1)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    numbers = sorted({number for _, number in places.values()})
    relative = any(delta.relative is not None for delta in deltas.values())
    panels = {"trained weights, % of the layer's": lambda delta: 100 * delta.share}
    if relative:
        panels["norm of the change, % of the weight's"] = lambda delta: 100 * delta.relative
    elif any(delta.norm is not None for delta in deltas.values()):
        panels["norm of the change"] = lambda delta: delta.norm

    figure = new_figure(3 + max(4, 0.3 * len(numbers)), 1 + (0.8 + 0.3 * len(kinds)) * len(panels))
    figure.suptitle(printable(title), parse_math=False)
    for axes, (label, value) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
        grid = np.full((len(kinds), len(numbers)), np.nan)
        for name, (kind, number) in places.items():
            grid[kinds.index(kind), numbers.index(number)] = value(deltas[name])
        image = axes.imshow(grid, aspect="auto", vmin=0)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xticks(range(len(numbers)), ["" if number < 0 else number for number in numbers])
        axes.set(xlabel="layer", title=label)
        figure.colorbar(image, ax=axes)
    write_figure(figure, path)
