r"""Steps and seconds to a target: tuned SGD, momentum and Adam against DDPNOpt.

DDPNOpt is there at its defaults, in the metric "eigen-factored" at one setting, and tuned. A task's target is the merit
with which its best baseline ends, the mean over the seeds. What counts is the first evaluation at which a method's mean
over the seeds reaches it. Every baseline's step size, and DDPNOpt's setting in the row "tuned", are chosen by one
training of each on other held-out data than those that are reported. Seconds are steps times the mean of twenty steps,
ten in a row, measured in turn at the end. A baseline is charged its whole step as one compiled program, its update too.

With ``--peers`` SOAP (of `heavyball`, in the `bench` extra) and Muon (torch's) are trained too, their step sizes tuned
over Adam's grid. They are rows beside, charged their own step around a compiled model; the target stays that of the
three.

    python examples/bench/target.py --data FOLDER                     all tasks, hours on one core; it is resumed
    python examples/bench/target.py --data FOLDER --tasks mnist-128   a part, and the page of all that is there

The same trainings with steps timed on another device, for some rows:

    python examples/bench/target.py --data FOLDER --trainings examples/results/bench/target.json \
        --device cuda --mode reduce-overhead --out examples/results/bench/target_cuda.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from step import TURNED, compiled_baseline, muon, soap
from tasks import TASKS, Loaded, Task
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.data import require
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import one_thread, plain_step
from ddpn_fx.demo.timing import interleaved
from ddpn_fx.preconditioners import Diagonal, EigenFactored, Factored

RESULTS = Path(__file__).resolve().parents[1] / "results/bench/target.json"
SEEDS, EVALUATIONS = 3, 20
Optimizers = Callable[[nn.Module, float], list[torch.optim.Optimizer]]  # of a model, at a step size
BASELINES: dict[str, Optimizers] = {
    "SGD": lambda model, lr: [torch.optim.SGD(model.parameters(), lr=lr)],
    "momentum": lambda model, lr: [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)],
    "Adam": lambda model, lr: [torch.optim.Adam(model.parameters(), lr=lr)],
}
PEERS: dict[str, Optimizers] = {"SOAP": soap, "Muon": muon}  # rows beside, which set no target
OPTIMIZERS = BASELINES | PEERS
DEFAULT = "DDPNOpt"
GROUPS = "coupling 64"  # a row of its own where the batch is larger: the cheaper form for large batches
EIGEN = "eigen-factored, Nesterov 0.9, lr 0.01"  # a row of its own: the other setting that is one for all tasks
EIGEN_GROUPS = f"{EIGEN}, coupling 64"  # the same in smaller groups
EIGEN_WHOLE = f"{EIGEN}, whole batch"  # the same in no groups, where the batch is larger than EIGEN's
EIGEN_CG = f"{EIGEN}, cg 5"  # the same by conjugate gradients, on large batches of what is not dear
EIGEN_QR = f"{EIGEN}, qr"  # the same with bases renewed as on a GPU
EIGEN_PLAIN = "eigen-factored, beta1 0.9, lr 0.01"  # without Nesterov's form
ADAM_LIKE = Diagonal(decay=0.99, bias_correction=True, relative_eps=0.01)
# DDPNOpt's settings; the row "tuned" chooses from all but the last two: name -> (lr, options).
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    DEFAULT: (1.0, {}),
    GROUPS: (1.0, {"coupling": 64}),
    EIGEN: (0.01, TURNED),
    EIGEN_GROUPS: (0.01, TURNED | {"coupling": 64}),
    EIGEN_WHOLE: (0.01, TURNED | {"coupling": "batch"}),
    EIGEN_CG: (0.01, TURNED | {"cg_iterations": 5}),
    "eigen-factored, Nesterov 0.9, lr 0.003": (0.003, TURNED),
    "lr 0.3": (0.3, {}),
    "lr 3": (3.0, {}),
    "lr 10": (10.0, {}),
    "factored, beta1 0.9, lr 0.01": (0.01, {"preconditioner": Factored(), "beta1": 0.9}),
    "diagonal, beta1 0.9, lr 0.01": (0.01, {"preconditioner": ADAM_LIKE, "beta1": 0.9}),
    EIGEN_QR: (0.01, TURNED | {"preconditioner": EigenFactored(solver="qr")}),
    EIGEN_PLAIN: (0.01, TURNED | {"nesterov": False}),
}


TRIED_WHERE_DEAR = (DEFAULT, EIGEN, EIGEN_GROUPS, EIGEN_WHOLE, "lr 3")
TUNED = "DDPNOpt, tuned"
Chosen = dict[str, tuple[str, float]]  # row -> the method and value that were chosen for it


ROWS = (DEFAULT, GROUPS, EIGEN, EIGEN_GROUPS, EIGEN_WHOLE, EIGEN_CG, TUNED)
BESIDE = (EIGEN_QR, EIGEN_PLAIN)  # rows that are shown where they are asked for


def ours(chosen: Chosen) -> list[str]:
    """DDPNOpt's rows."""
    return [row for row in (*ROWS, *BESIDE) if row in chosen]


class Record:
    """Trainings by name in a JSON file, written anew whenever one is added; another process's are kept.

    With ``trainings``, a file of another run, the trainings are that one's and the times alone are of this file.
    """

    def __init__(self, path: Path, trainings: Path | None = None) -> None:
        self.path, self.trainings = path, trainings
        self.cells: dict[str, Any] = {}
        self.times: dict[str, dict[str, float]] = {}
        self._read()

    def _read(self) -> None:
        if self.trainings is not None:
            self.cells = json.loads(self.trainings.read_text(encoding="utf-8"))["cells"] | self.cells
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.cells = found.get("cells", {}) | self.cells
            self.times = found["step_ms"] | self.times

    def write(self, **more: Any) -> None:
        """Write all; a stop in the middle leaves the old file."""
        self._read()
        other = self.path.with_suffix(".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cells = {"cells": self.cells} if self.trainings is None else {}
        report.write_json(other, report.environment() | {"step_ms": self.times} | cells | more)
        os.replace(other, self.path)


class Bench:
    """One task's data, a module that all trainings share, and the record; with peers that are trained or recorded.

    Attributes:
        rows: DDPNOpt's that are shown.
        device: where steps are timed; trainings are on the CPU.
        mode: of ``torch.compile``, for the timed steps.
    """

    def __init__(
        self,
        task: Task,
        folder: str | None,
        record: Record,
        peers: Sequence[str] = (),
        *,
        rows: Sequence[str] = ROWS,
        device: str = "cpu",
        mode: str | None = None,
    ) -> None:
        self.task, self.record, self.rows, self.device, self.mode = task, record, rows, device, mode
        last = [c["method"] for c in record.cells.values() if c["task"] == task.key and c["seed"] == SEEDS - 1]
        recorded = last if record.trainings is None else ()  # elsewhere a peer may not be installed
        self.peers = [name for name in PEERS if name in peers or name in recorded]
        self.loaded: Callable[[], Loaded] = cache(lambda: task.load(folder))
        self._net: Any = None

    def net(self) -> ddpn_fx.CompiledModule:
        """The module as DDPNOpt takes it, so that a program is compiled once for all its trainings."""
        if self._net is None:
            self._net = ddpn_fx.compile(self.loaded().build().to(self.device), loss=self.task.loss, mode=self.mode)
        return self._net

    def cell(self, method: str, value: float, seed: int) -> dict[str, Any]:
        """A training: the merit on both held-out parts at every evaluation, from the record or run now."""
        key = self.key(method, value, seed)
        if key not in self.record.cells:
            if self.record.trainings is not None:
                sys.exit(f"target.py: {self.record.trainings} has no training {key!r}; name other --tasks or --rows")
            self.record.cells[key] = self._train(method, value, seed)
            self.record.write()
            print(f"{key}: {self.record.cells[key]['curve'][-1]}", file=sys.stderr, flush=True)
        return self.record.cells[key]

    def key(self, method: str, value: float, seed: int) -> str:
        """A training's name in the record."""
        return f"{self.task.key} | {self.task.steps} steps | {method} | {value:g} | seed {seed}"

    def _train(self, method: str, value: float, seed: int) -> dict[str, Any]:
        step, model, _ = self.begin(method, value, seed)
        (found,) = self.follow(method, value, seed, step, model)
        return found

    def follow(
        self, method: str, value: float, seed: int, step: Callable[..., Tensor], *models: nn.Module
    ) -> list[dict[str, Any]]:
        """Take the steps of a training: for each of the models its merit on both held-out parts, as it goes."""
        task = self.task
        curves: list[list[list[float | None]]] = [[] for _ in models]
        for taken, (x, y) in enumerate(self.loaded().batches(task.batch, task.steps, seed), start=1):
            loss = step(x, y)
            if taken % max(1, task.steps // EVALUATIONS) == 0 or taken == task.steps:
                for curve, model in zip(curves, models, strict=True):
                    curve.append([taken, *self.merits(model)])
                if not math.isfinite(float(loss)):
                    break
        about = {"task": task.key, "method": method, "value": value, "seed": seed}
        return [about | {"curve": curve} for curve in curves]

    def begin(
        self, method: str, value: float, seed: int
    ) -> tuple[Callable[..., Tensor], nn.Module, list[torch.optim.Optimizer]]:
        """A training's step, its model with a seed's weights, and what updates it."""
        torch.manual_seed(seed)
        weights = self.loaded().build().state_dict()
        if method not in SETTINGS:
            model = self.loaded().build().to(memory_format=torch.channels_last)
            model.load_state_dict(weights)
            optimizers = OPTIMIZERS[method](model, value)
            return plain_step(model, *optimizers, loss=self.task.loss), model, optimizers
        self.net().load_state_dict(weights)
        lr, options = SETTINGS[method]
        opt = ddpn_fx.DDPNOpt(self.net(), lr=lr, **options)
        return opt.train_step, self.net(), [opt]

    def merits(self, model: nn.Module) -> list[float | None]:
        """On the part that chooses and on the one that is reported; None where it is not finite."""
        found = []
        model.eval()
        for x, y in self.loaded().held_out:
            with torch.no_grad():
                output = torch.cat([model(part) for part in x.split(500)])
            found.append(self.loaded().merit(output, y))
        model.train()
        return [m if math.isfinite(m) else None for m in found]

    def run(self, *, timed: bool = True) -> Chosen:
        """All trainings that are missing, and the times of the steps."""
        chosen: Chosen = {}
        for name, values in (*self.task.grids.items(), *((name, self.task.grids["Adam"]) for name in self.peers)):
            chosen[name] = name, max(values, key=lambda v, name=name: self._choice(name, v))
        # The batch from which a setting is tried.
        least = {GROUPS: 65, EIGEN_GROUPS: 65, EIGEN_WHOLE: 257, EIGEN_CG: 512}
        settings = [s for s in SETTINGS if self.task.batch >= least.get(s, 1)]
        if self.task.dear:
            settings = [s for s in settings if s in (*TRIED_WHERE_DEAR, *BESIDE)]
        if TUNED in self.rows:
            tuned = max((s for s in settings if s not in BESIDE), key=lambda s: self._choice(s, SETTINGS[s][0]))
            chosen[TUNED] = tuned, SETTINGS[tuned][0]
        chosen |= {row: (row, SETTINGS[row][0]) for row in self.rows if row in settings}
        for row in (self.rival(chosen), *self.peers, *ours(chosen)):
            for seed in range(SEEDS):
                self.cell(*chosen[row], seed)
        if timed:
            self.time(chosen)
        return chosen

    def rival(self, chosen: Chosen) -> str:
        """The best of the tuned baselines."""
        return max(self.task.grids, key=lambda n: self._choice(*chosen[n]))

    def _choice(self, method: str, value: float) -> float:
        """The choosing part's merit at the end of one training (seed 0), upwards."""
        taken, merit, _ = self.cell(method, value, 0)["curve"][-1]
        if merit is None or taken < self.task.steps:
            return -math.inf
        return merit if self.task.higher else -merit

    def time(self, chosen: Chosen) -> None:
        """Milliseconds of a step, in turn: the best baseline's, the peers', and DDPNOpt's settings."""
        names, rival = dict.fromkeys(chosen[row][0] for row in ours(chosen)), self.rival(chosen)
        if {rival, *self.peers, *names} <= set(self.record.times.get(self.task.key, {})):
            return
        loaded = self.loaded()
        batches = [(x.to(self.device), y.to(self.device)) for x, y in loaded.batches(self.task.batch, 4, 0)]
        model, rate = loaded.build().to(self.device), chosen[rival][1]
        baseline = compiled_baseline(model, self.task.loss, "inductor", rival, rate, self.mode)
        steps: dict[str, Any] = {rival: baseline}
        for name in self.peers:
            model = torch.compile(loaded.build().to(self.device), dynamic=False, mode=self.mode)
            steps[name] = plain_step(model, *PEERS[name](model, chosen[name][1]), loss=self.task.loss)
        for name in names:
            lr, options = SETTINGS[name]
            steps[name] = ddpn_fx.DDPNOpt(self.net(), lr=lr, **options).train_step
        # A mean, of two runs in each of which the bases are renewed once, after their early renewals.
        seconds = interleaved(steps, batches, repeats=20, warm=10, run=10)
        self.record.times[self.task.key] = {k: 1e3 * statistics.fmean(v) for k, v in seconds.items()}
        self.record.write()

    def curve(self, method: str, value: float) -> list[tuple[int, float]]:
        """(steps, mean reported merit over the seeds), as far as every seed goes."""
        runs = [self.cell(method, value, seed)["curve"] for seed in range(SEEDS)]
        found = []
        for points in zip(*runs, strict=False):
            merits = [p[2] for p in points]
            if any(m is None for m in merits):
                break
            found.append((points[0][0], statistics.fmean(merits)))
        return found


def reached(curve: list[tuple[int, float]], target: float, higher: bool) -> int | None:
    """Steps at the first evaluation that is as good as the target."""
    return next((s for s, m in curve if (m >= target if higher else m <= target)), None)


def summary(bench: Bench, chosen: Chosen) -> dict[str, Any]:
    """The target, and for the best baseline and each row of DDPNOpt's: steps, seconds, merit at the end."""
    task, times = bench.task, bench.record.times[bench.task.key]
    rival = bench.rival(chosen)
    target = bench.curve(*chosen[rival])[-1][1]
    rows = {}
    for row in (rival, *bench.peers, *ours(chosen)):
        curve = bench.curve(*chosen[row])
        steps = reached(curve, target, task.higher)
        setting = chosen[row][0] if row in ours(chosen) else f"{row} {chosen[row][1]:g}"
        ms = times[chosen[row][0]]
        end = curve[-1][1] if curve and curve[-1][0] == task.steps else None
        seconds = None if steps is None else steps * ms / 1e3
        rows[row] = {"setting": setting, "steps": steps, "seconds": seconds, "step_ms": ms, "end": end}
    return {"about": task.about, "batch": task.batch, "target": target, "unit": task.unit, "rival": rival, "rows": rows}


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """A line for each row of a task: the setting, steps and seconds over the best baseline's, the merit at the end."""
    header = ("task", "target", "setting", "steps", "over the baseline's", "ms a step", "seconds over the baseline's",
              "merit at the end")  # fmt: skip
    lines = []
    for key, s in summaries.items():
        rival = s["rows"][s["rival"]]
        for name, row in s["rows"].items():
            first = row is rival
            line = [key, f"{s['target']:.2f} {s['unit']}"] if first else ["", ""]
            setting = row["setting"] + ("" if first or name != TUNED else " (tuned)")
            steps = "" if row["steps"] is None else str(row["steps"])
            line += [setting, steps, _ratio(row["steps"], rival["steps"]), f"{row['step_ms']:.1f}"]
            line += [_ratio(row["seconds"], rival["seconds"])]
            line += ["diverged" if row["end"] is None else f"{row['end']:.2f}"]
            lines.append(line)
    return report.markdown(header, lines)


def _ratio(mine: float | None, theirs: float) -> str:
    return "not reached" if mine is None else f"{mine / theirs:.2f}"


def verdict(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """On how many tasks the default reaches the target in so many steps and seconds, as the figures are."""

    def count(row: str, name: str, most: float) -> int:
        plain = EIGEN if row in (EIGEN_GROUPS, EIGEN_WHOLE) else DEFAULT  # the same thing where the batch is a group
        rows = [s["rows"] | {"baseline": s["rows"][s["rival"]]} for s in summaries.values()]
        found = [(r[row if row in r else plain][name], r["baseline"][name]) for r in rows if {row, plain} & {*r}]
        return sum(mine is not None and mine <= most * theirs for mine, theirs in found)

    return [
        f"{what}, of {len(summaries)} tasks: at most 0.6 of the best tuned baseline's steps on "
        f"{count(row, 'steps', 0.6)}, at most 1.1 on {count(row, 'steps', 1.1)}; at most 0.75 of its seconds on "
        f"{count(row, 'seconds', 0.75)}, at most 1.1 on {count(row, 'seconds', 1.1)}."
        for row, what in (
            (DEFAULT, "The default, one setting for all"),
            (EIGEN, "eigen-factored, one setting for all"),
            (EIGEN_QR, "eigen-factored with bases renewed as on a GPU"),
            (EIGEN_PLAIN, "eigen-factored without Nesterov's form"),
            (GROUPS, "The default in groups of 64"),
            (EIGEN_GROUPS, "eigen-factored in groups of 64"),
            (EIGEN_WHOLE, "eigen-factored with the batch whole"),
        )
        if any(row in s["rows"] for s in summaries.values())
    ]


def picture(path: Path, benches: list[tuple[Bench, Chosen]]) -> None:
    """A panel a task: mean merit against steps."""
    figure = require("matplotlib.figure").Figure(figsize=(4.2 * min(4, len(benches)), 3.2 * -(-len(benches) // 4)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(-(-len(benches) // 4), min(4, len(benches)), squeeze=False).flatten()
    for axes, (bench, chosen) in zip(panels, benches, strict=False):
        rival = bench.rival(chosen)
        colors = {rival: "#0072b2", DEFAULT: "#c1272d", GROUPS: "#009e73", EIGEN: "#9467bd", TUNED: "#e69f00"}
        colors |= {EIGEN_PLAIN: "#e377c2", EIGEN_QR: "#000000", EIGEN_WHOLE: "#17becf"}
        colors |= {EIGEN_GROUPS: "#8c564b", EIGEN_CG: "#bcbd22"} | {"SOAP": "#777777", "Muon": "#56b4e9"}
        for row in (rival, *bench.peers, *ours(chosen)):
            curve = bench.curve(*chosen[row])
            label = row if row in ours(chosen) else f"{row}, tuned"
            axes.plot(*zip(*curve, strict=True), color=colors[row], label=label)
        values = [m for _, m in bench.curve(*chosen[rival])]
        low, high = sorted((values[len(values) // 5], values[-1]))
        axes.set_ylim(low - 0.3 * (high - low), high + 0.8 * (high - low)) if bench.task.higher else axes.set_ylim(
            low - 0.8 * (high - low), high + 0.3 * (high - low)
        )
        axes.set_title(bench.task.key, fontsize=9)
        axes.legend(fontsize=7)
    for axes in panels[len(benches) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def complete(record: Record) -> Iterator[Task]:
    """The tasks whose trainings are all there."""
    for task in TASKS:
        done = {c["method"] for c in record.cells.values() if c["task"] == task.key and c["seed"] == SEEDS - 1}
        if DEFAULT in done and task.key in record.times:
            yield task


def main() -> None:
    """Run what is missing of the chosen tasks, write the page of all complete ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of the .npz files (see ddpn_fx.data)")
    parser.add_argument("--tasks", nargs="+", choices=[t.key for t in TASKS], default=[t.key for t in TASKS])
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=[], help="rows beside; recorded ones are shown anyway"
    )
    parser.add_argument("--train-only", action="store_true", help="no times, no page: the machine is not at rest")
    parser.add_argument(
        "--trainings", metavar="FILE", type=Path, help="take the trainings of this file, time steps alone"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=(*ROWS, *BESIDE), default=ROWS, help="of DDPNOpt's (default: all but the last two)"
    )
    parser.add_argument("--device", default="cpu", help="where steps are timed (default: cpu); needs --trainings")
    parser.add_argument("--mode", help="of torch.compile, for the timed steps; on a GPU: reduce-overhead")
    parser.add_argument("--out", metavar="FILE", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.trainings is None and options.device != "cpu":
        parser.error("--device: trainings are run on the CPU; name recorded ones by --trainings")
    if options.trainings is not None and options.train_only:
        parser.error("--train-only: with --trainings nothing is trained")
    ddpn_fx.keep_freed_memory()  # for all methods alike, where the C library has it
    torch._dynamo.config.recompile_limit = 64  # every task's baseline is the same function to Dynamo
    record = Record(options.out, options.trainings)
    shown = {"rows": options.rows, "device": options.device, "mode": options.mode}
    with one_thread():
        for task in TASKS:
            if task.key in options.tasks:
                Bench(task, options.data, record, options.peers, **shown).run(timed=not options.train_only)
        if options.train_only:
            return
        benches = [(b := Bench(t, options.data, record, **shown), b.run()) for t in complete(record)]
    summaries = {b.task.key: summary(b, chosen) for b, chosen in benches}
    record.write(tasks=summaries)
    about = (
        "# Steps and seconds to the best tuned baseline's own merit\n\n"
        f"Mean over {SEEDS} seeds, evaluated some {EVALUATIONS} times a training. Steps and seconds of DDPNOpt are "
        "over the baseline's. Seconds are steps times a step's mean; a baseline's whole step is one compiled "
        "program, its update in it."
    )
    if options.trainings is None:
        picture(options.out.with_suffix(".png"), benches)
        ending = f"![merit against steps]({options.out.stem}.png)"
        about += " Freed host memory is kept for all (`ddpn_fx.keep_freed_memory`)."
    else:
        ending = f"Steps are those of the trainings of `{options.trainings.name}`, on a CPU; they were timed on "
        ending += f"{report.device(options.device)}, mode {options.mode or 'default'} of `torch.compile` for all."
    pages = [about, table(summaries), *verdict(summaries), ending]
    page = "\n\n".join([*pages, report.describe(report.environment())]) + "\n"
    options.out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
