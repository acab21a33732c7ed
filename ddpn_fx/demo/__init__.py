"""The demonstration: one network on real digits, over step sizes that SGD does not survive.

``python -m ddpn_fx demo`` trains a ReLU network on the 1,797 handwritten digits that come with scikit-learn, with
DDPNOpt, SGD and Adam over a grid of step sizes, and writes a table, a picture, the figures and the generated graphs.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from torch import nn

import ddpn_fx
from ddpn_fx.data import load, require
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import Comparison, Summary, adam, ddpnopt, one_thread, sgd

WIDTHS = (64, 32, 32, 32, 10)
BATCH_SIZE = 64
METHODS = [*ddpnopt(0.1, 0.3, 1, 3, 10), *sgd(0.1, 0.3, 1, 3, 10), *adam(1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]


def relu_network(*widths: int) -> nn.Sequential:
    """Return a feed-forward network of linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@one_thread()
def run(
    out: Path, *, seeds: int = 5, steps: int = 300, backend: str = "inductor", stream: TextIO | None = None
) -> list[Summary]:
    """Run the demonstration.

    Args:
        out: folder for ``accuracy.png``, ``results.json`` and ``graphs/``.
        seeds: trainings for each method and step size, each from other weights.
        steps: steps a training takes.
        backend: what `torch.compile` is given; ``"eager"`` runs the generated graphs as they are.
        stream: where to print, standard output by default; a terminal gets a progress bar, a file plain lines.

    Returns:
        The summaries, a method and step size each, in the order of the table.

    Raises:
        ModuleNotFoundError: scikit-learn, matplotlib or tqdm is missing.
    """
    stream = stream or sys.stdout
    tqdm = require("tqdm").tqdm
    require("matplotlib")  # before the work, not after it
    started = time.perf_counter()
    data = load("digits", flat=True)
    out.mkdir(parents=True, exist_ok=True)

    print(f"{data.name}: {len(data.x_train):,} training and {len(data.x_test):,} test images.", file=stream)
    print(f"ReLU network {'-'.join(map(str, WIDTHS))}, batch {BATCH_SIZE}, {steps} steps, seeds: {seeds}.", file=stream)
    print(f"Compiling DDPNOpt's step (backend {backend}) ...", file=stream, flush=True)
    comparison = Comparison(lambda: relu_network(*WIDTHS), data, batch_size=BATCH_SIZE, steps=steps, backend=backend)
    comparison.warm_up()
    compile_seconds = time.perf_counter() - started
    print(f"... done in {compile_seconds:.1f} s; every step size and seed below runs this one program.", file=stream)

    summaries = []
    terminal = stream.isatty()
    with tqdm(total=len(METHODS) * seeds * steps, unit="step", file=stream, disable=not terminal) as bar:
        for summary in comparison.trainings(METHODS, seeds, tick=bar.update):
            summaries.append(summary)
            if terminal:
                bar.set_description(f"{summary.method} {summary.lr:g}")
            else:
                print(f"{summary.method} at {summary.lr:g}: {summary} %", file=stream, flush=True)

    picture, figures, graphs = out / "accuracy.png", out / "results.json", out / "graphs"
    record = report.environment() | {
        "data": {"name": data.name, "train": len(data.x_train), "test": len(data.x_test)},
        "network": {"widths": WIDTHS, "activation": "ReLU"},
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "seeds": list(range(seeds)),
        "backend": backend,
        "seconds": {"compile": round(compile_seconds, 2), "all": round(time.perf_counter() - started, 2)},
        "results": [summary.as_dict() for summary in summaries],
    }
    report.write_json(figures, record)
    report.write_picture(picture, summaries)
    ddpn_fx.export(comparison.opt, graphs)

    print(f"\nMean ± deviation, seeds: {seeds}\n", file=stream)
    print(report.table(summaries), file=stream)
    print(f"\n{time.perf_counter() - started:.0f} s in all. Written:", file=stream)
    print(f"  picture           {picture}\n  figures           {figures}\n  generated graphs  {graphs}", file=stream)
    return summaries
