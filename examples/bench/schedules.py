"""Does the gain last beyond a constant step size? Trainings of target.py with averaged weights, and with a schedule.

A training at a constant step size ends in the noise of its batches. So its end says little of a method whose user
averages the weights (``torch.optim.swa_utils``, a moving average over some fifty steps) or lets the step size fall to
0. Here all methods have the same: momentum and Adam tuned anew for each of the three, over target.py's grids and one
step size beyond, and DDPNOpt's two settings as they are. (SGD was the best on none of target.py's tasks.)

    python examples/bench/schedules.py --data FOLDER                     all tasks, hours on one core; it is resumed
    python examples/bench/schedules.py --data FOLDER --tasks mnist-128   a part, and the page of all that is there
    python examples/bench/schedules.py --data FOLDER --times 8 --kinds decayed --out FILE   eight times as long
    ... --kinds decayed regularized   and once more with weight decay: DDPNOpt's at one value, the baselines' tuned

Writes the trainings as JSON and a Markdown table: the reported merit at the end, means over the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from target import DEFAULT, EIGEN, SEEDS, SETTINGS, Bench, Chosen, Record, reached
from tasks import TASKS, Task
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpn_fx
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import one_thread

RESULTS = Path(__file__).resolve().parents[1] / "results/bench/schedules.json"
CONSTANT, AVERAGED, DECAYED = KINDS = "constant", "averaged", "decayed"
REGULARIZED = "regularized"  # a falling step size, and weight decay
DECAY = 0.98  # of the moving average of the weights
OURS = (DEFAULT, EIGEN)
# Weight decay: one for each of DDPNOpt's settings, decoupled; for the baselines a grid, at the step size that is best
# without (momentum's in the gradient, as torch.optim.SGD has it, Adam's decoupled, AdamW's).
WEIGHT_DECAY = {DEFAULT: (0.0003,), EIGEN: (0.1,), "momentum": (0.0001, 0.0005, 0.002), "Adam": (0.01, 0.1, 0.5)}


class Scheduled(Bench):
    """A task's trainings of one of ``KINDS``. A training at a constant step size gives two: as it is, and averaged.

    Those of ``times`` as many steps may want smaller step sizes: there the baselines have one on either side.
    """

    def __init__(self, task: Task, folder: str | None, record: Record, kind: str, times: int = 1) -> None:
        grids = {name: (*values, 3 * max(values)) for name, values in task.grids.items() if name != "SGD"}
        if times > 1:
            grids = {name: (round(min(values) / 3, 4), *values) for name, values in grids.items()}
        super().__init__(replace(task, grids=grids, steps=times * task.steps), folder, record, rows=OURS)
        self.kind = kind
        self.without = Scheduled(task, folder, record, DECAYED, times) if kind == REGULARIZED else None

    def run(self, *, timed: bool = True) -> Chosen:
        """All trainings that are missing. With weight decay a baseline is the best of it at the best step size."""
        if self.without is None:
            return super().run(timed=timed)
        plain = self.without.run(timed=False)
        self.without.loaded.cache_clear()
        chosen: Chosen = {}
        for row, (method, value) in plain.items():
            names = [f"{method} + weight decay {w:g}" for w in WEIGHT_DECAY[method]]
            best = names[0] if row in OURS else max(names, key=lambda name, value=value: self._choice(name, value))
            chosen[row] = best, value
        for method, value in (chosen[self.rival(chosen)], *(chosen[row] for row in OURS)):
            for seed in range(SEEDS):
                self.cell(method, value, seed)
        return chosen

    def last(self) -> tuple[str, float]:
        """The method that is trained last, and its step size."""
        decay = f" + weight decay {WEIGHT_DECAY[EIGEN][0]:g}" if self.kind == REGULARIZED else ""
        return EIGEN + decay, SETTINGS[EIGEN][0]

    def begin(
        self, method: str, value: float, seed: int
    ) -> tuple[Callable[..., Tensor], nn.Module, list[torch.optim.Optimizer]]:
        """As a constant step's; with the weight decay that the method's name ends in."""
        plain, _, decay = method.partition(" + weight decay ")
        step, model, optimizers = super().begin(plain, value, seed)
        for optimizer in optimizers if decay else ():
            if isinstance(optimizer, ddpn_fx.DDPNOpt):
                optimizer.decoupled = True
            for group in optimizer.param_groups:
                group["weight_decay"] = float(decay)
                if isinstance(optimizer, torch.optim.Adam):
                    group["decoupled_weight_decay"] = True
        return step, model, optimizers

    def key(self, method: str, value: float, seed: int, kind: str | None = None) -> str:
        """A training's name in the record."""
        return f"{super().key(method, value, seed)} | {kind or self.kind}"

    def _train(self, method: str, value: float, seed: int) -> dict[str, Any]:
        step, model, optimizers = self.begin(method, value, seed)
        if self.kind in (DECAYED, REGULARIZED):
            schedules = [LambdaLR(optimizer, lambda taken: 1 - taken / self.task.steps) for optimizer in optimizers]

            def decayed(x: Tensor, y: Tensor) -> Tensor:
                loss = step(x, y)
                for schedule in schedules:
                    schedule.step()
                return loss

            (found,) = self.follow(method, value, seed, decayed, model)
            return found
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

        def averaged(x: Tensor, y: Tensor) -> Tensor:
            loss = step(x, y)
            average.update_parameters(model)
            return loss

        both = dict(zip((CONSTANT, AVERAGED), self.follow(method, value, seed, averaged, model, average), strict=True))
        self.record.cells |= {self.key(method, value, seed, kind): cell for kind, cell in both.items()}
        return both[self.kind]


def ends(bench: Scheduled, chosen: Chosen) -> dict[str, Any]:
    """The best baseline and DDPNOpt's settings: merit at the end, and steps to the baseline's end over its own."""
    rival = bench.rival(chosen)
    curves = {row: bench.curve(*chosen[row]) for row in (rival, *OURS)}
    target, higher = curves[rival][-1][1], bench.task.higher
    own = reached(curves[rival], target, higher)
    rows = {}
    for row in OURS:
        steps = reached(curves[row], target, higher)
        complete = bool(curves[row]) and curves[row][-1][0] == bench.task.steps
        rows[row] = {"end": curves[row][-1][1] if complete else None, "steps": steps and steps / own}
    method, value = chosen[rival]
    return {"rival": f"{rival} {value:g}{method.removeprefix(rival)}", "target": target, "rows": rows}


def table(found: Mapping[str, Mapping[str, Any]], about: Mapping[str, Task]) -> str:
    """The figures as a Markdown table, a line a task and kind."""
    lines = []
    for key, kinds in found.items():
        for i, (kind, figures) in enumerate(kinds.items()):
            line = ["" if i else f"{key}, {about[key].unit}", kind]
            line += [f"{figures['rival']}: {figures['target']:.2f}"]
            for row in OURS:
                end, steps = (figures["rows"][row][k] for k in ("end", "steps"))
                line += ["diverged" if end is None else f"{end:.2f}", "-" if steps is None else f"{steps:.2f}"]
            lines.append(line)
    header = ["task", "step size or weights", "best of momentum and Adam"]
    header += ["DDPNOpt", "of the steps", EIGEN, "of the steps"]
    return report.markdown(header, lines)


def verdict(found: Mapping[str, Mapping[str, Any]], about: Mapping[str, Task]) -> list[str]:
    """On how many tasks DDPNOpt's settings end ahead, and in at most 0.6 of the steps."""
    pages = []
    for row in OURS:
        counts = []
        for kind in dict.fromkeys(kind for kinds in found.values() for kind in kinds):
            figures = [(about[key].higher, kinds[kind]) for key, kinds in found.items() if kind in kinds]
            ahead = sum(
                (end := f["rows"][row]["end"]) is not None and (end > f["target"] if higher else end < f["target"])
                for higher, f in figures
            )
            few = sum((steps := f["rows"][row]["steps"]) is not None and steps <= 0.6 for _, f in figures)
            part = "" if len(figures) == len(found) else f" of {len(figures)}"
            counts.append(f"{kind} {ahead} and {few}{part}")
        what = f"{row}, of {len(found)} tasks ahead at the end, and there in 0.6 of the steps"
        pages.append(f"{what}: {', '.join(counts)}.")
    return pages


def main() -> None:
    """Run what is missing of the chosen tasks, write the page of all that is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of the .npz files (see ddpn_fx.data)")
    parser.add_argument("--tasks", nargs="+", choices=[t.key for t in TASKS], default=[t.key for t in TASKS])
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, REGULARIZED), default=KINDS)
    parser.add_argument("--times", metavar="N", type=int, default=1, help="as many steps as target.py's (default: 1)")
    parser.add_argument("--out", metavar="FILE", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.times < 1:
        parser.error(f"--times {options.times}: a training has at least as many steps as target.py's")
    if options.out == RESULTS and (options.times, tuple(options.kinds)) != (1, KINDS):
        parser.error("--kinds, --times: name a file of its own by --out; the recorded one has all kinds, once as long")
    ddpn_fx.keep_freed_memory()
    record = Record(options.out)
    with one_thread():
        for task in TASKS:
            for kind in options.kinds if task.key in options.tasks else ():
                Scheduled(task, options.data, record, kind, options.times).run(timed=False)
    found: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        benches = [Scheduled(task, options.data, record, kind, options.times) for kind in options.kinds]
        complete = [b for b in benches if b.key(*b.last(), SEEDS - 1) in record.cells]
        if complete:
            found[task.key] = {b.kind: ends(b, b.run(timed=False)) for b in complete}
    about = {task.key: task for task in TASKS}
    record.write(tasks=found)
    longer = "" if options.times == 1 else f" of {options.times} times as many steps as in target.md"
    pages = [
        "# With averaged weights, and with a step size that falls to 0",
        f"Merit on the reported part at the end{longer}, means over {SEEDS} seeds; the part of the baseline's steps in "
        f"which DDPNOpt reaches the baseline's end. Averaged: a moving average of the weights, {DECAY}. Decayed: the "
        "step size falls linearly to 0, for all. Regularized: and weights decay, by "
        + "; ".join(f"{name} {', '.join(f'{w:g}' for w in values)}" for name, values in WEIGHT_DECAY.items())
        + ".",
        table(found, about),
        *verdict(found, about),
        report.describe(report.environment()),
    ]
    options.out.with_suffix(".md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    print("\n\n".join(pages))


if __name__ == "__main__":
    main()
