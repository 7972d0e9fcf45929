"""What a training run leaves besides the adapter: metrics.json, loss.png, and the table on the screen."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from .common import format_table, notice
from .evaluate import METRICS_FILE, Measure

CURVE_FILE = "loss.png"


def write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")


def draw_curve(losses: list[tuple[int, float]], title: str, folder: Path) -> None:
    """Draw training loss by update step, and its running mean, into loss.png.

    Without matplotlib, which is not a requirement of the package, there is a notice instead.
    """
    if importlib.util.find_spec("matplotlib") is None:
        notice(f"{CURVE_FILE} is not drawn: that needs matplotlib (pip install 'peft[demo]')")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, values = zip(*losses)
    means, mean = [], values[0]
    for value in values:
        mean += (value - mean) / min(len(means) + 1, 20)
        means.append(mean)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="update step", ylabel="training loss", title=title)
    axes.plot(steps, values, color="C0", alpha=0.3, linewidth=1)
    axes.plot(steps, means, color="C0", linewidth=2)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(folder / CURVE_FILE, dpi=120)


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
