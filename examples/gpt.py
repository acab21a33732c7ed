"""A character GPT on the source of Python's standard library: validation loss at equal steps, per preconditioner.

Two blocks of width 64, 64 positions, batch 32, 400 steps. Every method starts at the same weights and sees the same
batches; one row of the table is a method at one step size. Prints a Markdown table, writes it with all figures to
examples/results/gpt.md and gpt.json, and exits with status 1 if the claim fails: DDPNOpt with the diagonal or the
factored preconditioner and an averaged direction ends below the best Adam.

    python examples/gpt.py [--steps 400] [--seeds 1] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from bench.models import GPT, positions
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.data import send
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import plain_step
from ddpn_fx.preconditioners import Diagonal, Factored

WIDTH, HEADS, BLOCKS, POSITIONS, BATCH = 64, 4, 2, 64, 32
CHARACTERS = 3_300_000


def text() -> tuple[Tensor, Tensor, int]:
    """(training codes, validation codes, size of the alphabet): the modules of the standard library by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    source = "".join(p.read_text(encoding="utf-8", errors="ignore") for p in sorted(folder.glob("*.py")))[:CHARACTERS]
    alphabet = sorted(c for c in set(source) if c.isascii())
    code = {c: i for i, c in enumerate(alphabet)}
    codes = torch.tensor([code[c] for c in source if c in code])
    cut = int(0.9 * len(codes))
    return codes[:cut], codes[cut:], len(alphabet)


def draw(codes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, POSITIONS) characters and the ones that follow them."""
    start = torch.randint(len(codes) - POSITIONS - 1, (count,), generator=generator)
    rows = codes[start[:, None] + torch.arange(POSITIONS + 1)]
    return rows[:, :-1], rows[:, 1:]


@dataclass(frozen=True)
class Method:
    """A row: its name, step size, and what makes the training step of a model."""

    name: str
    lr: float
    make: Callable[[nn.Module, float], Callable[[Tensor, Tensor], Tensor]]


def plain(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module, float], Callable[..., Tensor]]:
    """The usual training step."""

    def make(model: nn.Module, lr: float) -> Callable[..., Tensor]:
        return plain_step(model, optimizer(model.parameters(), lr=lr), loss=positions)

    return make


def controlled(**options: object) -> Callable[[nn.Module, float], Callable[..., Tensor]]:
    """DDPNOpt's compiled step."""

    def make(model: nn.Module, lr: float) -> Callable[..., Tensor]:
        return ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=positions), lr=lr, **options).train_step  # type: ignore[arg-type]

    return make


ADAM_LIKE = Diagonal(decay=0.99, bias_correction=True, relative_eps=0.01)


def methods() -> Iterator[Method]:
    """The rows of the table."""
    yield Method("SGD", 0.3, plain(torch.optim.SGD))
    for lr in (1e-3, 3e-3, 1e-2):
        yield Method("Adam", lr, plain(torch.optim.Adam))
    yield Method("DDPNOpt, identity", 1.0, controlled())
    yield Method("DDPNOpt, diagonal", 1e-2, controlled(preconditioner=ADAM_LIKE))
    for lr in (1e-2, 2e-2):
        yield Method("DDPNOpt, diagonal, beta1 0.9", lr, controlled(preconditioner=ADAM_LIKE, beta1=0.9))
    for lr in (1e-2, 2e-2):
        yield Method("DDPNOpt, factored, beta1 0.9", lr, controlled(preconditioner=Factored(), beta1=0.9))


def train(
    method: Method, codes: tuple[Tensor, Tensor, int], steps: int, seed: int, device: str
) -> tuple[float, float, float]:
    """(last training loss, validation loss, median seconds a step)."""
    torch.manual_seed(seed)
    model = GPT(BLOCKS, WIDTH, HEADS, POSITIONS, codes[2]).to(device)
    step = method.make(model, method.lr)
    generator = torch.Generator().manual_seed(seed)
    seconds = []
    for _ in range(steps):
        x, y = (send(t, device) for t in draw(codes[0], BATCH, generator))
        start = time.perf_counter()
        loss = float(step(x, y))
        seconds.append(time.perf_counter() - start)
    held_out = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        batches = [[send(t, device) for t in draw(codes[1], 64, held_out)] for _ in range(16)]
        validation = fmean(float(positions(model(x), y)) for x, y in batches)
    return loss, validation, sorted(seconds)[len(seconds) // 2]


def main() -> int:
    """Run the experiment and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    codes, rows = text(), []
    for method in methods():
        runs = [train(method, codes, options.steps, seed, options.device) for seed in range(options.seeds)]
        row = {"method": method.name, "lr": method.lr, "validation": [r[1] for r in runs], "loss": [r[0] for r in runs]}
        rows.append({**row, "seconds": runs[0][2]})
        print(f"{method.name} at {method.lr:g}: {fmean(r[1] for r in runs):.3f}", file=sys.stderr, flush=True)

    def best(*names: str) -> float:
        return min(fmean(r["validation"]) for r in rows if r["method"] in names)

    ours = best("DDPNOpt, diagonal, beta1 0.9", "DDPNOpt, factored, beta1 0.9")
    holds = ours < best("Adam")
    cells = [(r["method"], f"{r['lr']:g}", f"{fmean(r['validation']):.3f}") for r in rows]
    table = report.markdown(("method", "step size", "validation loss"), cells)
    environment = report.environment()
    page = (
        f"Character GPT ({BLOCKS} blocks, width {WIDTH}, {POSITIONS} positions), batch {BATCH}, {options.steps} steps, "
        f"{options.seeds} seed(s), {len(codes[0]):,} characters of Python's standard library.\n\n{table}"
    )
    verdict = f"The claim {'holds' if holds else 'FAILS'}: DDPNOpt {ours:.3f}, best Adam {best('Adam'):.3f}."
    page += f"\n\n{verdict}\n\n{report.describe(environment)}\n"
    options.out.mkdir(parents=True, exist_ok=True)
    environment["device"] = report.device(options.device)
    record = environment | {"steps": options.steps, "seeds": options.seeds, "claim_holds": holds, "results": rows}
    (options.out / "gpt.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (options.out / "gpt.md").write_text(page, encoding="utf-8")
    print(page)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
