"""Fig. 4: what the feedback alone changes, over step sizes and weight decays, for each preconditioner, on DIGITS.

Feedback off is the plain method (Prop. 2): SGD, RMSprop, EKFAC. Beside it, with everything else the same, runs the
paper's form and ours. Writes ablation.json, ablation.md and two pictures: the difference in test accuracy over the
grid, and training curves at the largest step size. Stopped and started again it goes on with what is missing.

    python examples/paper/ablation.py        some ten minutes on one core, backend eager
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from arena import Arena, Arenas, Method, Task, TrainStep
from common import adjusted, facts, parser, progress, write_page
from record import Record, Runner

import ddpn_fx
from ddpn_fx.data import require
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import one_thread

TASK = Task("digits", "digits", (20,) * 4, "tanh", "identity", 16, 200, 200, 2, backend="eager")
DECAYS = (1e-4, 1e-3, 1e-2)
STEP_SIZES = {
    "identity": (0.03, 0.1, 0.3, 1.0),
    "diagonal": (0.001, 0.003, 0.01, 0.03),
    "eigen-kronecker": (0.01, 0.03, 0.1, 0.3),
}
PLAIN = {"identity": "SGD", "diagonal": "RMSprop", "eigen-kronecker": "EKFAC"}
FORMS = ("off", "paper's form", "ours")
EVERY = 20  # steps between two points of a curve


def method(form: str, metric: str, decay: float) -> Method:
    """A preconditioner and a weight decay, with feedback off, or on in one of the two forms."""
    options: dict[str, Any] = {"preconditioner": metric, "weight_decay": decay}

    def make(arena: Arena, lr: float) -> TrainStep:
        if form == "paper's form":
            return ddpn_fx.DDPNOpt.paper(arena.net, lr=lr, **options).train_step
        return ddpn_fx.DDPNOpt(arena.net, lr=lr, feedback=form == "ours", **options).train_step

    return Method(f"{metric}, decay {decay:g}, feedback {form}", STEP_SIZES[metric], make)


def main() -> int:
    """Run what is missing and write the page."""
    options = parser(__doc__).parse_args()
    (task,) = adjusted([TASK], options)
    record = Record(options.out / "ablation.json", facts([task]))
    arena = Arenas(options.data).of(task)
    work = [
        (metric, form, decay, lr, seed)
        for metric, lrs in STEP_SIZES.items()
        for form in FORMS
        for decay in DECAYS
        for lr in lrs
        for seed in range(task.seeds)
    ]
    cells: dict[Any, dict[str, Any]] = {}
    with one_thread(), progress(len(work)) as bar:
        runner = Runner(record, bar)
        for metric, form, decay, lr, seed in work:
            chosen = method(form, metric, decay)
            cells[metric, form, decay, lr, seed] = runner.cell(
                arena, task, chosen, lr, seed, steps=task.steps, every=EVERY
            )

    def mean(metric: str, form: str, decay: float, lr: float) -> float:
        return fmean(cells[metric, form, decay, lr, seed]["accuracy"] for seed in range(task.seeds))

    parts = [
        "# Fig. 4: feedback on minus feedback off, DIGITS",
        f"Test accuracy in points, mean of {task.seeds} seeds; {task.describe(search=False)}. In brackets the accuracy "
        "with feedback off. Both runs of a difference have the same step size, weight decay, weights and batches.",
    ]
    for form in FORMS[1:]:
        for metric, lrs in STEP_SIZES.items():
            rows = []
            for decay in DECAYS:
                off = [mean(metric, "off", decay, lr) for lr in lrs]
                on = [mean(metric, form, decay, lr) for lr in lrs]
                rows.append((f"{decay:g}", *(f"{b - a:+.1f} ({a:.1f})" for a, b in zip(off, on, strict=True))))
            gains = [mean(metric, form, d, lr) - mean(metric, "off", d, lr) for d in DECAYS for lr in lrs]
            better = sum(g > 0 for g in gains)
            parts += [
                f"**{form}, {metric}** over {PLAIN[metric]}: better at {better} of {len(gains)} settings, "
                f"mean {fmean(gains):+.1f}",
                report.markdown(("weight decay \\ step size", *(f"{lr:g}" for lr in lrs)), rows),
            ]
    heat(options.out / "ablation.png", mean)
    curves(options.out / "ablation_curves.png", cells, task)
    parts += [
        f"Clamps a step in the paper's form, of {task.batch_size} samples (a value function that is clamped at 0 stays "
        "0 in all stages below, so a sample counts once):",
        report.markdown(
            ("preconditioner", "step size", "clamps"),
            [
                (metric, f"{lr:g}", f"{fmean(_clamps(cells, metric, lr, task)):.1f}")
                for metric, lrs in STEP_SIZES.items()
                for lr in lrs
            ],
        ),
        "![differences](ablation.png)",
        "![training curves](ablation_curves.png)",
    ]
    write_page(options.out / "ablation.md", *parts)
    return 0


def _clamps(cells: dict[Any, dict[str, Any]], metric: str, lr: float, task: Task) -> list[float]:
    return [
        cells[metric, "paper's form", decay, lr, seed].get("clamps", 0.0)
        for decay in DECAYS
        for seed in range(task.seeds)
    ]


def heat(path: Path, mean: Callable[[str, str, float, float], float]) -> None:
    """A panel a form and preconditioner: blue where the feedback improves, red where it harms."""
    figure = require("matplotlib.figure").Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(2, len(STEP_SIZES), squeeze=False)
    for row, form in zip(panels, FORMS[1:], strict=True):
        for axes, (metric, lrs) in zip(row, STEP_SIZES.items(), strict=True):
            gain = [[mean(metric, form, d, lr) - mean(metric, "off", d, lr) for lr in lrs] for d in DECAYS]
            image = axes.imshow(gain, cmap="RdBu", vmin=-20, vmax=20, aspect="auto")
            for i, line in enumerate(gain):
                for j, value in enumerate(line):
                    color = "white" if abs(value) > 12 else "black"
                    axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=color)
            axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
            axes.set_yticks(range(len(DECAYS)), [f"{d:g}" for d in DECAYS])
            axes.set_title(f"{form}, {metric}, over {PLAIN[metric]}", fontsize=9)
    figure.supxlabel("step size")
    figure.supylabel("weight decay")
    figure.colorbar(image, ax=panels, label="points of test accuracy, feedback on - off")
    figure.savefig(path, dpi=160)


def curves(path: Path, cells: dict[Any, dict[str, Any]], task: Task) -> None:
    """The training loss at each preconditioner's largest step size and least decay, mean and range of the seeds."""
    figure = require("matplotlib.figure").Figure(figsize=(10, 3.2), layout="constrained")
    colors = {"off": "#0072b2", "paper's form": "#888888", "ours": "#c1272d"}
    for axes, (metric, lrs) in zip(figure.subplots(1, len(STEP_SIZES)), STEP_SIZES.items(), strict=True):
        for form in FORMS:
            runs = [cells[metric, form, DECAYS[0], lrs[-1], seed].get("curve", []) for seed in range(task.seeds)]
            points = [
                (step, [run[i][1] for run in runs])
                for i, (step, *_) in enumerate(min(runs, key=len))
                if all(run[i][1] is not None for run in runs)
            ]
            if not points:
                continue
            xs, means = [p[0] for p in points], [fmean(p[1]) for p in points]
            label = PLAIN[metric] if form == "off" else form
            axes.plot(xs, means, color=colors[form], label=label)
            low, high = [min(p[1]) for p in points], [max(p[1]) for p in points]
            axes.fill_between(xs, low, high, color=colors[form], alpha=0.2)
        axes.set(yscale="log", xlabel="step", title=f"{metric}, step size {lrs[-1]:g}")
        axes.legend(frameon=False, fontsize=8)
    figure.supylabel("training loss")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    sys.exit(main())
