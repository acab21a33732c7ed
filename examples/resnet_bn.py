"""A ResNet with batch norm on CIFAR-10: does it train, and evaluate with its running statistics, as with SGD or better?

Eight layers (widths 8, 16, 32), batch 128, 300 steps. Each method starts at the same weights and sees the same
batches. Prints a Markdown table, writes it with all figures to examples/results/resnet_bn.md and .json, and exits with
status 1 if the claim fails: DDPNOpt's best accuracy in eval mode is at least that of the best SGD, and none diverges.

    python examples/resnet_bn.py --data FOLDER [--device cuda]

FOLDER is a folder with cifar10.npz; see `python -c "help('ddpn_fx.data')"`
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.models import Residual
from torch import nn

from ddpn_fx.demo.compare import Summary, adam, ddpnopt, sgd
from ddpn_fx.demo.experiment import arguments, run

METHODS = [
    *ddpnopt(0.3, 1, 3),
    *sgd(0.1, 0.3, 1.0),
    *sgd(0.03, 0.1, momentum=0.9),
    *adam(3e-3, 1e-2),
]


def network() -> nn.Module:
    """ResNet-8."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8, 1),
        Residual(8, 16, 2),
        Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def verdict(summaries: list[Summary]) -> tuple[bool, str]:
    """Tell whether the claim holds, and say it in a sentence."""

    def best(*names: str) -> Summary:
        return max((s for s in summaries if s.method in names), key=lambda s: s.mean)

    ours, plain, momentum, adam_ = best("DDPNOpt"), best("SGD"), best("SGD, momentum 0.9"), best("Adam")
    diverged = any(s.diverged for s in summaries if s.method == "DDPNOpt")
    holds = not diverged and ours.mean >= plain.mean
    return holds, (
        f"The claim {'holds' if holds else 'FAILS'}: best DDPNOpt {ours.mean:.1f} (at {ours.lr:g}), "
        f"best SGD {plain.mean:.1f} (at {plain.lr:g}); with momentum {momentum.mean:.1f} (at {momentum.lr:g}), "
        f"Adam {adam_.mean:.1f} (at {adam_.lr:g})."
    )


def main() -> int:
    """Run the experiment and return the exit status."""
    parser = arguments(__doc__, seeds=2, steps=300, batch_size=128)
    parser.set_defaults(out=Path(__file__).parent / "results")
    return run(
        parser,
        name="resnet_bn",
        data="cifar10",
        flat=False,
        network=network,
        describe="ResNet-8 with batch norm, widths 8, 16, 32",
        methods=METHODS,
        verdict=verdict,
        facts={"network": "ResNet-8, BatchNorm, widths 8, 16, 32"},
    )


if __name__ == "__main__":
    sys.exit(main())
