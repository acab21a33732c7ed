"""Fig. 3: time and memory of a step against the batch size, every method.

The steps of all methods alternate in one process on one thread; the table shows medians of the processor's time, which
leaves out what else the machine does. Memory is what the step adds to its tensors at its peak, from the allocations
that torch's profiler records: it is exact, and without what Python and torch's libraries hold. Vanilla DDP's matrices
do not fit on MNIST's network (its Q_uu alone has 25,120^2 numbers), so it is measured on that of DIGITS, as is E-MSA.
All run eagerly unless --backend says otherwise: what is compared is the work, not a compiler. Writes runtime.json,
runtime.md, runtime.png.

    python examples/paper/runtime.py --data FOLDER
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arena import Arenas, Task
from common import adjusted, facts, parser, progress, write_page
from methods import BASELINES, DEFAULT, METRICS, OPTIMAL_CONTROL, PAPERS_FORM, WHOLE_BOUND
from record import Record

from ddpn_fx.data import require
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import one_thread
from ddpn_fx.demo.timing import interleaved, peak_bytes

METHODS = [*BASELINES, *OPTIMAL_CONTROL, *PAPERS_FORM, DEFAULT, WHOLE_BOUND, *METRICS]
SETTINGS = [
    (Task("mnist", "mnist", (32,) * 4, "relu", "identity", 32, 8, 8, 1, backend="eager"), (32, 128, 512)),
    (Task("digits", "digits", (20,) * 4, "tanh", "identity", 16, 15, 15, 1, backend="eager"), (8, 16, 32)),
]
WARM = 3


def main() -> int:
    """Measure what is missing and write the page."""
    options = parser(__doc__).parse_args()
    tasks = adjusted([task for task, _ in SETTINGS], options)
    record = Record(options.out / "runtime.json", facts(tasks))
    arenas = Arenas(options.data)
    with one_thread(), progress(sum(len(batches) for _, batches in SETTINGS)) as bar:
        for task, (_, batches) in zip(tasks, SETTINGS, strict=True):
            for size in batches:
                key = f"{task.key} | batch {size} | {task.steps} repeats | backend {task.backend}"
                if key not in record.cells:
                    record.add(key, {"task": task.key, "batch_size": size, "methods": measure(arenas, task, size)})
                bar.update()
    parts = [
        "# Fig. 3: a step against the batch size",
        f"Medians of {tasks[0].steps} (MNIST) and {tasks[1].steps} (DIGITS) interleaved steps, processor time on one "
        f"thread, backend {tasks[0].backend}. MiB: the peak of the tensors that a step allocates.",
    ]
    found: dict[str, dict[int, Any]] = {}
    for task, (_, batches) in zip(tasks, SETTINGS, strict=True):
        of = {
            size: record.cells[f"{task.key} | batch {size} | {task.steps} repeats | backend {task.backend}"]["methods"]
            for size in batches
        }
        found[task.key] = of
        names = [m.name for m in METHODS if m.name in of[batches[0]]]
        header = ("method", *(f"{size}: ms" for size in batches), *(f"{size}: MiB" for size in batches))
        rows = [
            (
                name,
                *(f"{of[size][name]['median_ms']:.2f}" for size in batches),
                *(f"{of[size][name]['peak_bytes'] / 2**20:.2f}" for size in batches),
            )
            for name in names
        ]
        parts += [
            f"**{task.key}**, hidden layers {'-'.join(map(str, task.widths))}, batch size:",
            report.markdown(header, rows),
        ]
    picture(options.out / "runtime.png", found)
    parts.append("![time and memory](runtime.png)")
    write_page(options.out / "runtime.md", *parts)
    return 0


def measure(arenas: Arenas, task: Task, size: int) -> dict[str, Any]:
    """Median time and peak memory of each method's step at a batch size."""
    arena = arenas.of(replace(task, batch_size=size))()
    batches = list(arena.data.batches(size, 4))
    small = {m.name: min(m.grid) if m.unit == "step size" else max(m.grid) for m in METHODS}  # weights hardly move
    steps = {m.name: m.make(arena, small[m.name]) for m in METHODS if m.only is None or task.key in m.only}
    seconds = interleaved(steps, batches, task.steps, WARM, clock=time.process_time)
    found = {}
    for name, times in seconds.items():
        arena.model.zero_grad()  # gradients are the step's own
        found[name] = {"median_ms": round(1e3 * median(times), 4), "peak_bytes": peak_bytes(steps[name], *batches[0])}
    return found


def picture(path: Path, found: dict[str, dict[int, Any]]) -> None:
    """A row a network: time and memory against the batch size."""
    colors = require("matplotlib").colormaps["tab20"]
    of_name = {m.name: colors(i / 20) for i, m in enumerate(METHODS)}
    figure = require("matplotlib.figure").Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for row, (key, of) in zip(panels, found.items(), strict=True):
        sizes = list(of)
        for axes, (what, unit, scale) in zip(row, (("median_ms", "ms", 1), ("peak_bytes", "MiB", 2**20)), strict=True):
            for name in of[sizes[0]]:
                ours = name.startswith("DDPNOpt")
                style = "-o" if ours else "--s"
                values = [of[s][name][what] / scale for s in sizes]
                axes.plot(sizes, values, style, ms=3, lw=1.2, label=name, color=of_name[name])
            axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel=f"{unit} a step", title=key)
            axes.set_xticks(sizes, [str(s) for s in sizes])
            axes.set_xticks([], minor=True)
        row[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
