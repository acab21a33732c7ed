"""MNIST: is DDPNOpt at its defaults as good as tuned baselines, over step sizes from 0.3 to 10?

A ReLU network 784-32x4-10, batch 64, 800 steps. Each method starts at the same weights and sees the same batches.
Prints a Markdown table, writes it with all figures to examples/results/mnist.md and mnist.json, and exits with status 1
if the claim fails: DDPNOpt is within 1 point of the best baseline at each of its step sizes, and its best is not below.

    python examples/mnist.py --data FOLDER [--device cuda]

FOLDER is a folder with mnist.npz; see `python -c "help('ddpn_fx.data')"`
"""

from __future__ import annotations

import sys
from pathlib import Path

from ddpn_fx.demo import relu_network
from ddpn_fx.demo.compare import Summary, adam, ddpnopt, one_thread, sgd
from ddpn_fx.demo.experiment import arguments, run

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
    parser = arguments(__doc__, seeds=5, steps=800, batch_size=64)
    parser.set_defaults(out=Path(__file__).parent / "results")
    return run(
        parser,
        name="mnist",
        data="mnist",
        flat=True,
        network=lambda: relu_network(*WIDTHS),
        describe=f"ReLU network {'-'.join(map(str, WIDTHS))}",
        methods=METHODS,
        verdict=verdict,
        facts={"network": {"widths": WIDTHS, "activation": "ReLU"}},
    )


if __name__ == "__main__":
    sys.exit(main())
