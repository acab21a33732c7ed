"""How long a training script waits for its first steps: the first start on a machine, and the second.

Each start is a process of its own: import, make the model, and run two steps, of which the second is compiled too where
it is another program than the first ("eigen-factored"). The first start finds an empty compiler cache, the second the
cache of the first. DDPNOpt's step is held against a step of plain SGD that `torch.compile` has made.

    python examples/bench/start.py                        the table below: a quarter of an hour on two idle cores
    python examples/bench/start.py --only ResNet --methods default eigen-factored
    python examples/bench/start.py --device cuda

Figures are of these steps alone, capture and compilation in them. `CPU` are processor seconds, of the compiler's too
(it gets one process): where other work runs beside, they are the ones to compare. Writes JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compile_time import networks
from step import OPTIONS, compiled_baseline

import ddpn_fx
from ddpn_fx.demo import report

STARTS = ("first", "second")


def start(method: str, model: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run two steps in this process: seconds by the clock, processor seconds, seconds of each pass."""
    torch.manual_seed(0)
    build, x, y = networks(chosen.layers, chosen.width, chosen.batch)[model]
    net, x, y = build().to(chosen.device), x.to(chosen.device), y.to(chosen.device)
    clock, processor = time.perf_counter(), _processor_seconds()
    passes: dict[str, float] = {}
    if method == "SGD":
        step = compiled_baseline(net, F.cross_entropy, "inductor")
        float(step(x, y) + step(x, y))
    else:
        compiled = ddpn_fx.compile(net, loss=F.cross_entropy)
        opt = ddpn_fx.DDPNOpt(compiled, lr=0.01, **OPTIONS[method])
        float(opt.train_step(x, y) + opt.train_step(x, y))
        for record in (*compiled.chain.records, *(r for each in compiled._lowered.values() for r in each.records)):
            passes[record.name] = passes.get(record.name, 0.0) + record.seconds
    return {
        "seconds": time.perf_counter() - clock,
        "cpu": _processor_seconds() - processor,
        "passes": passes,
        "hits": torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"],
    }


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(model: str, chosen: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Both starts of each method on one model: method -> start -> figures."""
    methods = ["SGD", *chosen.methods]
    found: dict[str, dict[str, dict[str, Any]]] = {method: {} for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        for name in STARTS:
            for method in methods:
                environment = {
                    **os.environ,
                    "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / method),
                    "TRITON_CACHE_DIR": str(Path(folder) / method / "triton"),
                    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # then all that compiles is this process's to count
                }
                done = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], "--start", method, model],
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                found[method][name] = row = json.loads(done.stdout.splitlines()[-1])
                text = f"{model}, {method}, {name} start: {row['seconds']:.1f} s, {row['cpu']:.1f} s of CPU"
                print(text, file=sys.stderr, flush=True)
    return found


def table(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> str:
    """The figures as a Markdown table, a line a model and method."""
    lines = []
    for model, rows in results.items():
        for method, row in rows.items():
            line = [model, method]
            for unit in ("seconds", "cpu"):
                first, second = row["first"][unit], row["second"][unit]
                line += [f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}"]
            line += [f"{row[s]['cpu'] / rows['SGD'][s]['cpu']:.2f}" for s in STARTS]
            lines.append(line)
    header = ["model", "step", "first, s", "second, s", "second / first", "CPU: first, s", "second, s"]
    header += ["second / first", "first / SGD's", "second / SGD's"]
    return report.markdown(header, lines, numbers_from=2)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="TEXT", nargs="+", default=["MLP", "group norm", "transformer"], help="models with this name"
    )
    parser.add_argument(
        "--methods", metavar="METHOD", nargs="+", default=["default"], choices=OPTIONS, help="of step.py's, beside SGD"
    )
    parser.add_argument("--layers", type=int, default=12, help="of the transformer (default: 12)")
    parser.add_argument("--width", type=int, default=128, help="of the transformer (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="samples (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--device", default="cpu", help="where the step runs (default: cpu)")
    parser.add_argument("--start", nargs=2, metavar=("METHOD", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path(__file__).parents[1] / "results/bench/start.json"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and write the figures; or be one of the processes that are measured."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    if chosen.start:
        print(json.dumps(start(*chosen.start, chosen)))
        return
    known = networks(chosen.layers, chosen.width, chosen.batch)
    models = [m for m in known if any(text.lower() in m.lower() for text in chosen.only)]
    results = {}
    for model in models:
        results[model] = measure(model, chosen)
        write(results, chosen)  # after each: a run may be cut short
    print(f"\n{chosen.out.with_suffix('.md').read_text(encoding='utf-8')}", end="")


def write(results: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Write the figures as JSON and as a Markdown table."""
    environment = report.environment() | {"device": report.device(chosen.device)}
    text = f"{table(results)}\n\n{report.describe(environment)}, on {environment['device']}, "
    text += f"threads: {chosen.threads}, batch {chosen.batch}\n"
    setting = {k: v for k, v in vars(chosen).items() if k not in ("out", "start")}
    report.write_json(chosen.out, environment | {"setting": setting, "results": results})
    chosen.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
