"""A batch in parts (``accumulate=``, ``process_group=``): what it does to training, and what it costs.

A batch of 512 of CIFAR-10, target.py's CNN and 300 steps: the batch whole, in 2 to 16 parts one after another, and in 4
parts side by side, in processes of their own; DDPNOpt at its defaults and in the metric "eigen-factored". Momentum's
gradient, accumulated over as many parts, is the yardstick of time and memory.

    python examples/bench/parts.py --data FOLDER --keep-freed-memory

Writes the figures as JSON and a Markdown table: merit at the end, means over the seeds; the median of a step's time and
the peak of its memory, over those of the whole batch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import TURNED
from tasks import TASKS, Loaded, Task
from torch import Tensor

import ddpn_fx
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import one_thread
from ddpn_fx.demo.timing import interleaved, peak_bytes

RESULTS = Path(__file__).resolve().parents[1] / "results/bench/parts.json"
TASK, COUNTS, RANKS, SEEDS = "cifar-cnn-512", (1, 2, 4, 8, 16), 4, 3
METRICS: dict[str, dict[str, Any]] = {"DDPNOpt": {}, "eigen-factored": TURNED | {"coupling": "batch"}}
Step = Callable[[Tensor, Tensor], Tensor]


def rows() -> dict[str, dict[str, Any]]:
    """DDPNOpt's options by the name of a row."""
    return {
        row(metric, count): {**options, "accumulate": count} for metric, options in METRICS.items() for count in COUNTS
    }


def row(method: str, count: int) -> str:
    """The name of a row."""
    return f"{method}, whole" if count == 1 else f"{method}, {count} parts"


def ours(task: Task, loaded: Loaded, options: dict[str, Any], seed: int) -> tuple[ddpn_fx.CompiledModule, Step]:
    """A compiled model with the seed's weights, and its step."""
    torch.manual_seed(seed)
    net = ddpn_fx.compile(loaded.build(), loss=task.loss)
    return net, ddpn_fx.DDPNOpt(net, **options).train_step


def momentum(task: Task, loaded: Loaded, count: int) -> Step:
    """torch's own loop with the gradient accumulated over parts; the model compiled."""
    model = loaded.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compiled = torch.compile(lambda x, y: task.loss(model(x), y) / count)

    def step(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(())
        for own_x, own_y in zip(x.chunk(count), y.chunk(count), strict=True):
            loss = compiled(own_x, own_y)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def train(task: Task, loaded: Loaded, options: dict[str, Any], seed: int, rank: int = 0, ranks: int = 1) -> float:
    """The merit at the end of a training, on what target.py reports."""
    net, step = ours(task, loaded, options, seed)
    mine = slice(rank * task.batch // ranks, (rank + 1) * task.batch // ranks)
    for x, y in loaded.batches(task.batch, task.steps, seed):
        step(x[mine], y[mine])
    net.eval()
    x, y = loaded.held_out[1]
    with torch.no_grad():
        return loaded.merit(torch.cat([net(part) for part in x.split(500)]), y)


def side_by_side(folder: str | None, metric: str, seed: int) -> float:
    """The same of a training in several processes."""
    with tempfile.TemporaryDirectory() as shared:
        torch.multiprocessing.spawn(_process, (folder, metric, seed, shared), nprocs=RANKS)
        return float((Path(shared) / "merit").read_text(encoding="utf-8"))


def _process(rank: int, folder: str | None, metric: str, seed: int, shared: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{shared}/store", rank=rank, world_size=RANKS)
    task = next(t for t in TASKS if t.key == TASK)
    options = {**METRICS[metric], "process_group": dist.group.WORLD}
    merit = train(task, task.load(folder), options, seed, rank, RANKS)
    if rank == 0:
        (Path(shared) / "merit").write_text(str(merit), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def costs(task: Task, loaded: Loaded, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds and peak bytes of a step, all rows in turn."""
    batches = list(loaded.batches(task.batch, 4, 0))
    kept = []
    steps: dict[str, Step] = {}
    for name, options in rows().items():
        net, steps[name] = ours(task, loaded, options, 0)
        kept.append(net)
    steps |= {row("momentum", count): momentum(task, loaded, count) for count in COUNTS}
    seconds = interleaved(steps, batches, repeats, 3)
    return {
        name: {"ms": 1e3 * statistics.median(seconds[name]), "peak_bytes": peak_bytes(step, *batches[0])}
        for name, step in steps.items()
    }


def page(found: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = []
    for method in (*METRICS, "momentum"):
        whole = found["costs"][row(method, 1)]
        names = [row(method, count) for count in COUNTS] + [f"{method}, {RANKS} processes"]
        for name in [n for n in names if n in found["costs"] or n in found["merits"]]:
            merit = _mean(found["merits"].get(name, {}).values())
            over = [f"{cost[k] / whole[k]:.2f}" for k in whole] if (cost := found["costs"].get(name)) else ["", ""]
            lines.append([name, merit, *over])
    table = report.markdown(("", "test accuracy, %", "time", "peak memory"), lines, numbers_from=1)
    kept = "freed memory kept" if found["keep_freed_memory"] else "freed memory given back"
    return f"{table}\n\n{kept}, {report.describe(found)}\n"


def _mean(merits: Iterable[float]) -> str:
    found = list(merits)
    return f"{statistics.fmean(found):.1f} ({min(found):.1f} to {max(found):.1f})" if found else ""


def main() -> None:
    """Train what is not there yet, time all, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data sets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--train-only", action="store_true", help="leave out the times")
    parser.add_argument("--keep-freed-memory", action="store_true", help="call ddpn_fx.keep_freed_memory() first")
    chosen = parser.parse_args()
    if chosen.keep_freed_memory and not ddpn_fx.keep_freed_memory():
        sys.exit("parts.py: --keep-freed-memory: this C library has no such setting")
    task = next(t for t in TASKS if t.key == TASK)
    loaded = task.load(chosen.data)
    found: dict[str, Any] = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.is_file() else {}
    merits = found.setdefault("merits", {})
    trainings = {
        name: lambda seed, options=options: train(task, loaded, options, seed) for name, options in rows().items()
    }
    for metric in METRICS:
        trainings[f"{metric}, {RANKS} processes"] = lambda seed, m=metric: side_by_side(chosen.data, m, seed)
    with one_thread():
        for seed in range(chosen.seeds):
            for name, run in trainings.items():
                cells = merits.setdefault(name, {})
                if str(seed) not in cells:
                    cells[str(seed)] = run(seed)
                    print(f"{name}, seed {seed}: {cells[str(seed)]:.1f}", file=sys.stderr, flush=True)
                    report.write_json(chosen.out, report.environment() | found)
        if chosen.train_only:
            return
        found["costs"] = costs(task, loaded, chosen.repeats)
        found["keep_freed_memory"] = chosen.keep_freed_memory
    found = report.environment() | found
    report.write_json(chosen.out, found)
    text = page(found)
    chosen.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
