"""A training drawn: what a recorder kept, over the steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpn_fx.data import require
from ddpn_fx.records import Record, Records

# Panels of the steps: title, scale of y, (column, label, colour) of each line.
_STEPS = (
    ("loss before the step", "log", (("loss", "loss", "#c1272d"),)),
    (
        "decrease of the loss on the batch",
        "linear",
        (("predicted_decrease", "predicted", "#0072b2"), ("actual_decrease", "actual", "#e69f00")),
    ),
    (
        "out of the ordinary, so far",
        "linear",
        (("skipped", "skipped batches", "#c1272d"), ("clamps", "clamps", "#6b6b6b"), ("clipped", "clips", "#009e73")),
    ),
)
# Panels of the stages: title, scale, column.
_STAGES = (
    ("|k|, the open part of du", "log", "k_norm"),
    ("|feedback part of du|", "log", "feedback_norm"),
    ("mean |y|, what a stage sees of those before", "log", "y_mean"),
    ("y: from its 10 to its 90 % quantile", "linear", "y_high"),
    ("largest eigenvalue of the Gram D K D", "log", "gram_max"),
    ("effective dimension", "linear", "effective_dimension"),
)
_SUMMED = {"skipped", "clamps", "clipped"}


def draw(records: Records, path: str | os.PathLike[str], call: str = "ddpn_fx picture") -> None:
    """Draw records into a picture: a panel a figure, over the steps; with stages a line a stage, dark for the first.

    Args:
        records: what was recorded.
        path: what to write; its ending says what kind: ``.png``, ``.svg`` or ``.pdf``.
        call: whose records, for the messages.

    Raises:
        ValueError: there is nothing to draw, or an ending that matplotlib does not know.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figures = require("matplotlib.figure")
    if not records.steps:
        raise ValueError(f"{call}: nothing was recorded yet, so there is nothing to draw")
    rows = 1 + 2 * bool(records.stages)
    figure = figures.Figure(figsize=(12, 3.2 * rows), layout="constrained")
    axes = [*figure.subplots(rows, 3).flat]
    for panel, (title, scale, lines) in zip(axes, _STEPS, strict=False):
        for column, label, colour in lines:
            x, y = _line(records.steps, column, summed=column in _SUMMED)
            panel.plot(x, y, label=label, color=colour, linewidth=1, marker="." if len(x) < 30 else "")
        _finish(panel, title, scale)
        if len(lines) > 1:
            panel.legend(fontsize=8, frameon=False)
    if records.stages:
        _draw_stages(figure, axes[3:], records.stages)
    kind = Path(path).suffix.removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{call}: {str(path)!r} has the ending {kind!r}; matplotlib writes {', '.join(sorted(known))}")
    figure.savefig(path, dpi=130)


def _draw_stages(figure: Any, axes: Sequence[Any], records: Sequence[Record]) -> None:
    """A panel a figure, a line a stage."""
    cm, colors = require("matplotlib.cm"), require("matplotlib.colors")
    stages = sorted({record["stage"] for record in records})
    colours = cm.ScalarMappable(colors.Normalize(stages[0], max(stages[-1], stages[0] + 1)), "viridis")
    for panel, (title, scale, column) in zip(axes, _STAGES, strict=True):
        for stage in stages:
            own = [record for record in records if record["stage"] == stage]
            colour = colours.to_rgba(stage)
            x, y = _line(own, column)
            if column == "y_high":
                _, low = _line(own, "y_low")
                panel.fill_between(x, low, y, color=colour, alpha=0.25, linewidth=0)
                panel.plot(*_line(own, "y_median"), color=colour, linewidth=1)
                continue
            # The first stage reacts to nothing, and a logarithm has no place for zero.
            shown = [(a, b) for a, b in zip(x, y, strict=True) if b > 0 or scale != "log"]
            x, y = [a for a, _ in shown], [b for _, b in shown]
            panel.plot(x, y, color=colour, linewidth=1, marker="." if len(x) < 30 else "")
        _finish(panel, title, scale)
    bar = figure.colorbar(colours, ax=list(axes), label="stage", fraction=0.02, pad=0.01)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)


def _line(records: Sequence[Record], column: str, *, summed: bool = False) -> tuple[list[int], list[float]]:
    """Steps and values, without those that were not evaluated."""
    points = [(int(r["step"]), float(r[column])) for r in records if r[column] == r[column]]
    values = [value for _, value in points]
    if summed:
        total = 0.0
        values = [total := total + value for value in values]
    return [step for step, _ in points], values


def _finish(panel: Any, title: str, scale: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("step", fontsize=8)
    panel.tick_params(which="both", labelsize=8)
    has = any(len(line.get_ydata()) and min(line.get_ydata()) > 0 for line in panel.lines)
    if scale == "log" and has:
        panel.set_yscale("log")
    panel.grid(alpha=0.3)
