"""Accuracy against step size over three decades: all methods, and all models of the loss that DDPNOpt knows, on DIGITS.

Beyond the paper. Each method's decades are its own: those of the adaptive ones lie lower, as in Table 4. Writes
step_size.json, step_size.md and step_size.png. Stopped and started again it goes on with what is missing.

    python examples/paper/step_size.py       some ten minutes on one core, backend eager
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

import torch
from arena import Arenas, Method, Task
from common import adjusted, facts, parser, progress, write_page
from methods import ddpnopt, paper, plain
from record import Record, Runner

from ddpn_fx.data import require
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import one_thread

TASK = Task("digits", "digits", (20,) * 4, "tanh", "identity", 16, 200, 200, 2, backend="eager")
WIDE = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
LOW = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MIDDLE = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
GROUPS = {
    "the identity": [
        Method("SGD", WIDE, plain(torch.optim.SGD)),
        Method("SGD, momentum 0.9", MIDDLE, plain(torch.optim.SGD, momentum=0.9)),
        Method("DDPNOpt, paper's form", WIDE, paper()),
        Method("DDPNOpt", WIDE, ddpnopt()),
        Method("DDPNOpt, nonlinear rollout", WIDE, ddpnopt(rollout="nonlinear")),
    ],
    "from the paper's form to ours": [
        Method("DDPNOpt, paper's form", WIDE, paper()),
        Method("the same, batch coupling", WIDE, paper(coupling="batch")),
        Method("the same, Gauss-Newton Q_uu", WIDE, paper(quu="gauss-newton")),
        Method("the same, both", WIDE, paper(coupling="batch", quu="gauss-newton")),
        Method("DDPNOpt, nonlinear rollout", WIDE, ddpnopt(rollout="nonlinear")),
        Method("DDPNOpt", WIDE, ddpnopt()),
    ],
    "models of the loss": [
        Method("DDPNOpt", WIDE, ddpnopt()),
        Method("bound, all columns", WIDE, ddpnopt(rank=None)),
        Method("residual", WIDE, ddpnopt(terminal="residual")),
        Method("gradient", WIDE, ddpnopt(terminal="gradient")),
        Method("exact", WIDE, ddpnopt(terminal="exact")),
        Method("sampled", WIDE, ddpnopt(terminal="sampled")),
    ],
    "metrics": [
        Method("RMSprop", LOW, plain(torch.optim.RMSprop)),
        Method("Adam", LOW, plain(torch.optim.Adam)),
        Method("DDPNOpt, paper's form, diagonal", LOW, paper(preconditioner="diagonal")),
        Method("DDPNOpt, diagonal", LOW, ddpnopt(preconditioner="diagonal")),
        Method("DDPNOpt, factored", LOW, ddpnopt(preconditioner="factored")),
        Method("EKFAC", MIDDLE, ddpnopt(preconditioner="eigen-kronecker", feedback=False)),
        Method("DDPNOpt, eigen-kronecker", MIDDLE, ddpnopt(preconditioner="eigen-kronecker")),
    ],
}


def main() -> int:
    """Run what is missing and write the page."""
    options = parser(__doc__).parse_args()
    (task,) = adjusted([TASK], options)
    record = Record(options.out / "step_size.json", facts([task]))
    arena = Arenas(options.data).of(task)
    methods = list({m.name: m for group in GROUPS.values() for m in group}.values())
    means: dict[str, dict[float, float]] = {}
    fell: dict[tuple[str, float], int] = {}
    with one_thread(), progress(sum(task.seeds * len(m.grid) for m in methods)) as bar:
        runner = Runner(record, bar)
        for m in methods:
            for lr in m.grid:
                cells = [runner.cell(arena, task, m, lr, s, steps=task.steps) for s in range(task.seeds)]
                means.setdefault(m.name, {})[lr] = fmean(c["accuracy"] for c in cells)
                fell[m.name, lr] = sum(c.get("diverged", False) for c in cells)
    parts = [
        "# Accuracy against step size, DIGITS",
        f"Test accuracy in per cent, mean of {task.seeds} seeds; {task.describe(search=False)}. † marks a loss "
        "that was not finite.",
    ]
    for grid, title in ((WIDE, "0.03 to 30"), (MIDDLE, "0.003 to 3"), (LOW, "0.0001 to 0.1")):
        rows = [
            (
                m.name,
                *(f"{means[m.name][lr]:.1f}{'†' if fell[m.name, lr] else ''}" for lr in grid),
                f"{width(means[m.name]):d}",
            )
            for m in methods
            if m.grid == grid
        ]
        header = (f"step size {title}", *(f"{lr:g}" for lr in grid), "within 2 points of its best")
        parts.append(report.markdown(header, rows))
    parts.append(
        '"The same" is the paper\'s form with one thing changed: the batch as one system, Q_uu with its curvature, or '
        'both; what is left between "both" and DDPNOpt with the nonlinear rollout is the model of the loss.'
    )
    picture(options.out / "step_size.png", means)
    parts.append("![accuracy against step size](step_size.png)")
    write_page(options.out / "step_size.md", *parts)
    return 0


def width(found: dict[float, float]) -> int:
    """Number of the step sizes whose accuracy is within two points of the best."""
    return sum(v >= max(found.values()) - 2.0 for v in found.values())


def picture(path: Path, means: dict[str, dict[float, float]]) -> None:
    """A panel a group of methods."""
    figure = require("matplotlib.figure").Figure(figsize=(15, 3.8), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, len(GROUPS), sharey=True), GROUPS.items(), strict=True):
        for m in group:
            found = means[m.name]
            style = {"lw": 2.5} if m.name == "DDPNOpt" else {"lw": 1.3}
            axes.plot(list(found), list(found.values()), marker="o", ms=3, label=m.name, **style)
        axes.set(xscale="log", xlabel="step size", title=title, ylim=(0, 100))
        axes.grid(axis="y", color="#dddddd", lw=0.8)
        axes.legend(frameon=False, fontsize=6, loc="lower left")
    figure.supylabel("test accuracy, %")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    sys.exit(main())
