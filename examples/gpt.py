"""A character GPT on the source of Python's standard library: validation loss at equal steps, per preconditioner.

Two blocks of width 64, 64 positions, batch 32, 400 steps. Every method starts at the same weights and sees the same
batches; one row of the table is a method at one step size. After the first seed of each row the best Adam and the best
row of the claim take the other seeds. The claim: DDPNOpt with the diagonal, the factored or the eigen-factored
preconditioner and an averaged direction ends below the best Adam. Prints a Markdown table, writes it with all figures
to examples/results/gpt.md and gpt.json, and exits with status 1 if the claim fails. Started again it goes on with the
trainings that are missing.

    python examples/gpt.py [--steps 400] [--seeds 3] [--device cuda]
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
from statistics import fmean, stdev
from typing import Any

import torch
from bench.models import GPT, positions
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.data import send
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import plain_step
from ddpn_fx.preconditioners import Diagonal, EigenFactored, Factored

WIDTH, HEADS, BLOCKS, POSITIONS, BATCH = 64, 4, 2, 64, 32
CHARACTERS = 3_300_000
TURNED = "DDPNOpt, eigen-factored, Nesterov 0.9"
CLAIMED = (*(f"DDPNOpt, {kind}, beta1 0.9" for kind in ("diagonal", "factored", "eigen-factored")), TURNED)


def library() -> str:
    """The source of the standard library's modules, by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "".join(p.read_text(encoding="utf-8", errors="ignore") for p in sorted(folder.glob("*.py")))[:CHARACTERS]


def text() -> tuple[Tensor, Tensor, int]:
    """(training codes, validation codes, size of the alphabet): characters."""
    source = library()
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
    for lr in (3e-3, 1e-2, 3e-2):
        turned = EigenFactored()
        yield Method("DDPNOpt, eigen-factored, beta1 0.9", lr, controlled(preconditioner=turned, nesterov=False))
        yield Method(TURNED, lr, controlled(preconditioner=turned))


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


class Rows:
    """The table's rows, each with its trainings by seed, kept in a file.

    Args:
        path: of the file. Its rows are taken in where they are of as many steps on as many characters.
        codes: as :func:`text`'s.
        steps: of a training.
        device: where it is trained.
    """

    def __init__(self, path: Path, codes: tuple[Tensor, Tensor, int], steps: int, device: str) -> None:
        self.path, self.codes, self.device = path, codes, device
        self.facts = {"steps": steps, "characters": len(codes[0])}
        self.rows: dict[tuple[str, float], dict[str, Any]] = {}
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            if all(record.get(k) == v for k, v in self.facts.items()):
                self.rows = {(r["method"], r["lr"]): r for r in record["results"]}

    def train(self, method: Method, seeds: int) -> float:
        """Train the seeds that a row lacks, and return the mean validation loss of all it has."""
        empty = {"method": method.name, "lr": method.lr, "validation": [], "loss": []}
        row = self.rows.setdefault((method.name, method.lr), empty)
        for seed in range(len(row["validation"]), seeds):
            loss, validation, seconds = train(method, self.codes, self.facts["steps"], seed, self.device)
            row["loss"].append(loss)
            row["validation"].append(validation)
            row.setdefault("seconds", seconds)
            print(f"{method.name} at {method.lr:g}, seed {seed}: {validation:.3f}", file=sys.stderr, flush=True)
            self.write()
        return fmean(row["validation"])

    def write(self, **more: object) -> dict[str, Any]:
        """Write the file; returns the machine and the versions of now."""
        environment = report.environment() | {"device": report.device(self.device)}
        record = environment | self.facts | more | {"results": list(self.rows.values())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return environment


def main() -> int:
    """Run the experiment and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3, help="of the best rows; the others have one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = Rows(options.out / "gpt.json", text(), options.steps, options.device)
    first = {method: rows.train(method, 1) for method in methods()}
    best = {}
    for who, names in (("Adam", ("Adam",)), ("DDPNOpt", CLAIMED)):
        method = min((m for m in first if m.name in names), key=lambda m: first[m])
        best[who] = method, rows.train(method, options.seeds)
    (adam, theirs), (claimed, ours) = best["Adam"], best["DDPNOpt"]
    holds = ours < theirs
    cells = [(r["method"], f"{r['lr']:g}", _figure(r["validation"])) for r in rows.rows.values()]
    table = report.markdown(("method", "step size", "validation loss"), cells)
    environment = rows.write(seeds=options.seeds, claim_holds=holds)
    page = (
        f"Character GPT ({BLOCKS} blocks, width {WIDTH}, {POSITIONS} positions), batch {BATCH}, {options.steps} steps, "
        f"{rows.facts['characters']:,} characters of Python's standard library. One seed; the best Adam and the best "
        f"row of the claim have {options.seeds}: mean ± sample deviation.\n\n{table}"
    )
    verdict = (
        f"The claim {'holds' if holds else 'FAILS'}: {claimed.name} at {claimed.lr:g} {ours:.3f}, Adam at {adam.lr:g} "
        f"{theirs:.3f}."
    )
    page += f"\n\n{verdict}\n\n{report.describe(environment)}\n"
    rows.path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return 0 if holds else 1


def _figure(losses: list[float]) -> str:
    return f"{fmean(losses):.3f}" + (f" ± {stdev(losses):.3f}" if len(losses) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
