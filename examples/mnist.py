"""MNIST: is DDPNOpt at its defaults as good as tuned baselines, over step sizes from 0.3 to 10?

A ReLU network 784-32x4-10, batch 64, 800 steps. Each method starts at the same weights and sees the same batches.
Prints a Markdown table, writes it with all figures to examples/results/mnist.md and mnist.json, and exits with status 1
if the claim fails: DDPNOpt is within 1 point of the best baseline at each of its step sizes, and its best is not below.

    python examples/mnist.py --data FOLDER      a folder with mnist.npz; see `python -c "help('ddpn_fx.data')"`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ddpn_fx.data import load
from ddpn_fx.demo import relu_network, report
from ddpn_fx.demo.compare import Comparison, Summary, adam, ddpnopt, one_thread, sgd

WIDTHS = (784, 32, 32, 32, 32, 10)
METHODS = [*ddpnopt(0.3, 1, 3, 10), *sgd(0.1, 0.3), *sgd(0.03, momentum=0.9), *adam(1e-3, 3e-3)]
TOLERANCE = 1.0  # points of test accuracy


def verdict(summaries: list[Summary]) -> tuple[bool, str]:
    """Tell whether the claim holds, and say it in a sentence."""
    ours = [summary for summary in summaries if summary.method == "DDPNOpt"]
    best = max((summary for summary in summaries if summary.method != "DDPNOpt"), key=lambda summary: summary.mean)
    worst_of_ours = min(summary.mean for summary in ours)
    best_of_ours = max(summary.mean for summary in ours)
    diverged = any(summary.diverged for summary in ours)
    holds = not diverged and worst_of_ours >= best.mean - TOLERANCE and best_of_ours >= best.mean
    text = (
        f"The claim {'holds' if holds else 'FAILS'}: DDPNOpt {worst_of_ours:.2f} to {best_of_ours:.2f}"
        f"{' (diverged)' if diverged else ''}; best baseline {best.mean:.2f} ({best.method} at {best.lr:g})."
    )
    return holds, text


@one_thread()
def main() -> int:
    """Run the experiment and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of mnist.npz (default: the variable DDPN_FX_DATA)")
    parser.add_argument("--seeds", metavar="N", type=int, default=5, help="trainings for each method (default: 5)")
    parser.add_argument("--steps", metavar="N", type=int, default=800, help="steps of a training (default: 800)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="samples a step (default: 64)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    try:
        data = load("mnist", options.data, flat=True)
    except FileNotFoundError as error:
        parser.error(str(error))

    print("compiling ...", file=sys.stderr)
    comparison = Comparison(
        lambda: relu_network(*WIDTHS),
        data,
        batch_size=options.batch_size,
        steps=options.steps,
        backend=options.backend,
    )
    summaries = []
    for summary in comparison.trainings(METHODS, options.seeds):
        print(f"{summary.method} at {summary.lr:g}: {summary} %", file=sys.stderr)
        summaries.append(summary)

    holds, text = verdict(summaries)
    environment = report.environment()
    setting = (
        f"{data.name}, ReLU network {'-'.join(map(str, WIDTHS))}, batch {options.batch_size}, {options.steps} steps, "
        f"mean ± deviation over {options.seeds} seeds, DDPNOpt at its defaults with backend {options.backend}."
    )
    page = f"{setting}\n\n{report.table(summaries)}\n\n{text}\n\n{report.describe(environment)}\n"
    record = environment | {
        "data": data.name,
        "network": {"widths": WIDTHS, "activation": "ReLU"},
        "batch_size": options.batch_size,
        "steps": options.steps,
        "seeds": list(range(options.seeds)),
        "backend": options.backend,
        "claim_holds": holds,
        "results": [summary.as_dict() for summary in summaries],
    }
    report.write_json(options.out / "mnist.json", record)
    (options.out / "mnist.md").write_text(page, encoding="utf-8")
    print(page)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
