"""iLQR and DDP on three classic problems: iterations, cost and time, beside Crocoddyl where it is installed.

Prints a Markdown table and writes it, with all figures, to examples/results/control.md and control.json. Exits with
status 1 if a solve does not converge, misses its goal, or costs over 1 % more than Crocoddyl's.

    python examples/control/compare.py                    the table
    python examples/control/compare.py --backend eager    without torch.compile
    pip install ddpn-fx[control]                          brings Crocoddyl
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from problems import TASKS, Task
from torch import Tensor

from ddpn_fx import control
from ddpn_fx.demo import report

HEADINGS = ("problem", "T", "method", "iterations", "cost", "gradient", "first solve, CPU s", "next solve, CPU s")
TOLERANCE = 0.01  # of Crocoddyl's cost


def gradient_norm(task: Task, us: Tensor) -> float:
    """Largest element of the total cost's gradient in the controls, by autograd through a plain rollout."""
    us = us.clone().requires_grad_()
    x, cost = task.x0, torch.zeros((), dtype=us.dtype)
    for t, u in enumerate(us):
        cost, x = cost + task.stage_cost(x, u, torch.tensor(t)), task.f(x, u, torch.tensor(t))
    (slope,) = torch.autograd.grad(cost + task.terminal_cost(x), us)
    return slope.abs().max().item()


def ours(task: Task, second_order: bool, backend: str, max_iterations: int) -> tuple[dict[str, Any], Tensor]:
    """Solve twice, the second time without tracing and compiling."""
    compile = False if backend == "eager" else backend
    solver = control.Solver(*task.functions, second_order=second_order, compile=compile, max_iterations=max_iterations)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        r = solver(task.x0, task.us)
        seconds.append(time.process_time() - start)
    row = {
        "problem": task.name,
        "T": len(task.us),
        "method": "DDP" if second_order else "iLQR",
        "iterations": r.iterations,
        "steps": int((r.history.step_size > 0).sum()),
        "cost": r.cost.item(),
        "gradient": gradient_norm(task, r.us),
        "first_seconds": seconds[0],
        "next_seconds": seconds[1],
        "converged": r.converged,
        "reached": task.reached(r.xs[-1]),
        "largest_control": r.us.abs().amax(0).tolist(),
    }
    return row, r.us


def theirs(task: Task, solution: Tensor, max_iterations: int) -> list[dict[str, Any]]:
    """Crocoddyl from the same first guess, and from our solution, where it should find nothing left to gain."""
    import crocoddyl_reference

    rows = []
    for name, start in (("SolverDDP", None), ("SolverFDDP", None), ("SolverDDP", solution)):
        r = crocoddyl_reference.solve(task, start, solver=name, max_iterations=max_iterations)
        rows.append(
            {
                "problem": task.name,
                "T": len(task.us),
                "method": f"Crocoddyl {name}" + (" from our DDP" if start is not None else ""),
                "iterations": r.iterations,
                "cost": r.cost,
                "gradient": gradient_norm(task, r.us),
                "next_seconds": r.seconds,
                "converged": r.converged,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""

    def text(row: dict[str, Any]) -> tuple[str, ...]:
        first = f"{row['first_seconds']:.1f}" if "first_seconds" in row else ""
        iterations = f"{row['iterations']}" + ("" if row["converged"] else " (limit)")
        return (
            *(row["problem"], str(row["T"]), row["method"], iterations),
            *(f"{row['cost']:.7g}", f"{row['gradient']:.1e}", first, f"{row['next_seconds']:.2f}"),
        )

    return report.markdown(HEADINGS, map(text, rows))


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What of the claim does not hold."""
    found = []
    for row in rows:
        name = f"{row['method']} on {row['problem']}"
        if "reached" not in row:
            continue
        if not row["converged"]:
            found.append(f"{name} did not converge")
        if not row["reached"]:
            found.append(f"{name} misses its goal")
        rivals = [r["cost"] for r in rows if r["problem"] == row["problem"] and "reached" not in r]
        if rivals and row["cost"] > (1.0 + TOLERANCE) * min(rivals):
            found.append(f"{name} costs {row['cost']:.6g}, Crocoddyl {min(rivals):.6g}")
    return found


def main() -> int:
    """Run the comparison and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="of torch.compile, or eager (default: inductor)")
    parser.add_argument("--max-iterations", metavar="N", type=int, default=500)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(__file__).parent.parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small

    reference = importlib.util.find_spec("crocoddyl") is not None
    rows: list[dict[str, Any]] = []
    for maker in TASKS:
        task = maker()
        for second_order in (False, True):
            row, us = ours(task, second_order, options.backend, options.max_iterations)
            rows.append(row)
            print(f"{row['problem']}, {row['method']}: {row['cost']:.7g}", file=sys.stderr)
        if reference:
            rows += theirs(task, us, options.max_iterations)

    wrong = failures(rows)
    against = f"no solve costs over {TOLERANCE:.0%} more than Crocoddyl's"
    if not reference:
        against = "Crocoddyl is not installed, so that its rows are missing"
    verdict = f"The claim FAILS: {'; '.join(wrong)}." if wrong else f"All converge and reach their goals; {against}."
    environment = report.environment()
    backend = "without torch.compile" if options.backend == "eager" else f"compiled by {options.backend}"
    page = (
        f"`ddpn_fx.control` on `examples/control/problems.py`, float64, one thread, {backend}. "
        "An iteration is a backward pass, also one that meets an indefinite Quu; gradient: largest element of dJ/du. "
        "The first solve traces and compiles. "
        "Crocoddyl's C++ solvers run on Python models here, whose derivatives are most of their time.\n\n"
        f"{table(rows)}\n\n{verdict}\n\n{report.describe(environment)}\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "control.md").write_text(page)
    report.write_json(options.out / "control.json", environment | {"backend": options.backend, "rows": rows})
    print(page)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
