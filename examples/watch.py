"""Watch a training: a recorder keeps the figures of every stage, and draws them.

python examples/watch.py                        # on scikit-learn's digits: training.csv, training.stages.csv, .png
python examples/watch.py --steps 1000 --out runs
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.data import load


def main() -> None:
    """Train, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of training (default: 300)")
    parser.add_argument("--every", type=int, default=5, help="steps between two records of the stages (default: 5)")
    parser.add_argument("--out", type=Path, default=Path(), help="where to write (default: here)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = load("digits", flat=True)
    widths = (64, 32, 32, 32)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    net = ddpn_fx.compile(nn.Sequential(*hidden, nn.Linear(32, 10)), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    path = options.out / "training.csv"
    with ddpn_fx.Recorder(opt, path, every=options.every, actual=True, stages=True) as recorder:
        for _ in range(options.steps):
            rows = torch.randint(len(data.x_train), (64,))
            opt.train_step(data.x_train[rows], data.y_train[rows])
        recorder.picture(path.with_suffix(".png"))
    print(f"Wrote {path}, the stages beside it, and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
