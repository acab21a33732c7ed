"""`python -m tests.zoo.exported [NAME ...]`: where the nodes of a family's graphs come from, and if these run alone.

For each family: the share of the nodes from the user's model that carry module path and source line, over every graph
that was generated, and how many of the written Python files give the live graph's bits, run by themselves.
With names (parts of family names) only those; `--all` takes every family, else the ten of TEN.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import ddpn_fx
from ddpn_fx.origins import Share, share
from tests.zoo import FAMILIES
from tests.zoo.checks import bench

TEN = (
    "MLP, BatchNorm1d, dropout",
    "GPT, tied head",
    "Llama: RoPE, RMSNorm, SwiGLU, grouped queries",
    "LSTM",
    "U-Net, transposed convolution",
    "VQ-VAE, straight-through codes",
    "ResNet, basic, BatchNorm",
    "message passing, edge list without a batch dimension",
    "complex-valued weights",
    "binarised layers by autograd.Function, weights inside",
)
"""Ten different kinds: norms, attention, loops, convolutions, sparse reads, own backwards, complex values."""

QUICK = ("MLP, BatchNorm1d, dropout", "complex-valued weights")
"""Those of the default tier."""

# Runs every file as `python FILE --check` would, each in a namespace of its own, but in one process.
_RUNNER = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--check"]
    runpy.run_path(path, run_name="__main__")
"""


def stepped(name: str) -> Any:
    """The family's compiled module (backend eager) after one step."""
    b = bench(name)
    b.reset()
    b.step(b.optimizer(b.traced, feedback=b.family.mixes != "other"))
    return b.traced


def shares(net: Any) -> list[Share]:
    """One share for each generated graph."""
    return [share(name, module) for name, module in net.graphs.items()]


def total(found: list[Share]) -> float:
    """The share over all graphs together."""
    return sum(s.known for s in found) / max(1, sum(s.nodes for s in found))


def run_alone(net: Any, folder: Path) -> tuple[int, list[str]]:
    """Export as Python and run every file with --check: how many there are, and what failed."""
    ddpn_fx.export(net, folder, "python")
    checked = [str(p) for p in sorted(folder.glob("*.py"))]
    done = subprocess.run([sys.executable, "-c", _RUNNER, *checked], capture_output=True, text=True, timeout=600)
    agreed = done.stdout.count("are equal bit for bit")
    failures = [] if done.returncode == 0 else [(done.stderr or done.stdout)[-2000:]]
    if agreed != len(checked) and not failures:
        failures.append(f"{agreed} of {len(checked)} files said that they are equal")
    return len(checked), failures


def main() -> int:
    """Print a line for each family."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    words = [w for w in sys.argv[1:] if not w.startswith("-")]
    names = [n for n in FAMILIES if any(w.lower() in n.lower() for w in words)] or (
        list(FAMILIES) if "--all" in sys.argv else list(TEN)
    )
    worst, failed = 1.0, 0
    for name in names:
        torch.manual_seed(0)
        try:
            net = stepped(name)
            found = shares(net)
            with tempfile.TemporaryDirectory() as folder:
                count, failures = run_alone(net, Path(folder))
        except Exception as error:
            failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        worst, failed = min(worst, total(found)), failed + bool(failures)
        print(
            f"{name}: {total(found):.2%} of {sum(s.nodes for s in found)} nodes in {len(found)} graphs; "
            f"{count} files {'FAIL: ' + failures[0][-300:] if failures else 'equal bit for bit'}",
            flush=True,
        )
        for each in found:
            if each.share < 0.98:
                print(f"    {each}")
    print(f"{len(names)} families, the least share {worst:.2%}, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
