"""Tables, the picture and the record of an experiment."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddpn_fx.data import require
from ddpn_fx.demo.compare import Summary

STYLES = {"Adam": ("#6b6b6b", "^"), "SGD": ("#0072b2", "s"), "DDPNOpt": ("#c1272d", "o")}  # the last is drawn on top
PACKAGES = ("ddpn-fx", "torch", "numpy", "scikit-learn")


def environment() -> dict[str, Any]:
    """Say on what an experiment ran: machine, versions and date, without names of hosts, users or folders."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": versions,
    }


def device(name: str) -> str:
    """Say what a device is: a GPU by its maker's name for it, anything else as it is."""
    return torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else name


def describe(record: dict[str, Any]) -> str:
    """Return the machine and the versions of `environment` in one line."""
    machine, versions = record["machine"], record["versions"]
    return (
        f"{machine['system']} {machine['architecture']}, {machine['processor']}, {machine['cpus']} CPUs, "
        f"torch {versions['torch']}, Python {versions['python']}, {record['date']}"
    )


def table(summaries: Sequence[Summary]) -> str:
    """Return a Markdown table: a line a method and step size."""
    rows = [(summary.method, f"{summary.lr:g}", str(summary)) for summary in summaries]
    return markdown(("method", "step size", "test accuracy, %"), rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int | None = None) -> str:
    """Return a Markdown table, as wide in a terminal as on a page.

    Args:
        header: the columns' titles.
        rows: cells, as many as there are titles.
        numbers_from: columns from this one on are set to the right.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = [numbers_from is not None and column >= numbers_from for column in range(len(header))]
    lines.insert(1, ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as readable JSON, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_picture(path: Path, summaries: Sequence[Summary]) -> None:
    """Draw test accuracy against step size, one line a method; a cross marks a step size at which a seed diverged."""
    matplotlib = require("matplotlib")
    figure_module = require("matplotlib.figure")
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = figure_module.Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for name, (color, marker) in STYLES.items():
            points = [summary for summary in summaries if summary.method == name]
            lrs, means = [point.lr for point in points], [point.mean for point in points]
            deviations = [point.deviation for point in points]
            axes.errorbar(lrs, means, deviations, color=color, marker=marker, lw=2, elinewidth=1, capsize=3, label=name)
            for point in points:
                if point.diverged:
                    axes.plot(point.lr, point.mean, "x", color=color, ms=13, mew=2)
        if any(summary.diverged for summary in summaries):
            axes.plot([], [], "x", color="#444444", ms=9, mew=2, label="loss not finite")
        axes.set(xscale="log", ylim=(0, 103), xlabel="step size", ylabel="test accuracy, %")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", color="#dddddd", lw=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 0.08), reverse=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)


def _processor() -> str:
    """The processor's name; Linux tells it in a file, other systems through `platform`."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
