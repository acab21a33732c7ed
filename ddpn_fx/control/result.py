"""What `solve` returns, and its log as a table.

Shapes: B problems (absent for one problem), T stages, n state, m control, I rows of the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

COLUMNS = ("cost", "expected_improvement", "step_size", "regularization", "gradient_norm")
HEADINGS = ("iteration", "cost", "expected", "step size", "regularization", "gradient")


@dataclass(frozen=True)
class History:
    """One row for each iteration, as it began; the last row is the trajectory returned. On the CPU.

    Rows of a problem that has finished before the others are NaN.

    Attributes:
        cost: (I,) or (I, B).
        expected_improvement: what the model promises for step size 1; NaN where Quu was not positive definite.
        step_size: the one taken; 0 where none was.
        regularization: mu of the backward pass.
        gradient_norm: largest element of Qu in absolute value; NaN where Quu was not positive definite.
    """

    cost: Tensor
    expected_improvement: Tensor
    step_size: Tensor
    regularization: Tensor
    gradient_norm: Tensor

    def __len__(self) -> int:
        return len(self.cost)

    def table(self, problem: int | None = None) -> str:
        """The log as text; `problem` picks one of a batch."""
        if self.cost.ndim == 2 and problem is None:
            return "\n\n".join(f"problem {b}\n{self.table(b)}" for b in range(self.cost.shape[1]))
        rows = torch.stack([getattr(self, name) for name in COLUMNS], dim=1)
        rows = rows[..., problem] if rows.ndim == 3 else rows
        lines = [line(i, row[:, None]) for i, row in enumerate(rows) if not row[0].isnan()]
        return "\n".join([heading(), *lines])


@dataclass(frozen=True)
class Solution:
    """A locally optimal trajectory and the policy around it.

    For one problem the batch dimension B is absent, `iterations` and `converged` are an int and a bool, and `status` is
    one string.

    Attributes:
        xs: (B, T + 1, n), the states; xs[..., 0, :] is x0.
        us: (B, T, m), the controls.
        cost: (B,), the sum of the stage costs and the terminal cost.
        k: (B, T, m), open gains of the last backward pass that succeeded: zero to the tolerance once converged.
        K: (B, T, m, n), feedback gains: ``us[t] + K[t] (x - xs[t])`` is the locally optimal policy.
        iterations: (B,) int64, backward passes that were followed by a line search or failed.
        converged: (B,) bool.
        status: for each problem "converged", "iteration limit" or "regularization limit".
        history: the log.
    """

    xs: Tensor
    us: Tensor
    cost: Tensor
    k: Tensor
    K: Tensor
    iterations: int | Tensor
    converged: bool | Tensor
    status: str | list[str]
    history: History = field(repr=False)

    def table(self, problem: int | None = None) -> str:
        """Iteration, cost, expected improvement, step size, regularisation and gradient norm, a line each."""
        return self.history.table(problem)

    def __str__(self) -> str:
        if isinstance(self.status, str):
            return f"{self.status} after {self.iterations} iterations, cost {self.cost.item():.10g}"
        rows = zip(self.status, torch.as_tensor(self.iterations).tolist(), self.cost.tolist(), strict=True)
        return "\n".join(f"{b}: {s} after {i} iterations, cost {c:.10g}" for b, (s, i, c) in enumerate(rows))


def heading(batched: bool = False) -> str:
    """The table's first line."""
    first, *rest = HEADINGS
    return f"{first:>9}" + (f"{'running':>9}" if batched else "") + "".join(f"{name:>16}" for name in rest)


def line(iteration: int, row: Tensor, batched: bool = False) -> str:
    """One row of the table from the values of COLUMNS (columns, B).

    Of a batch: how many problems still run, and over these the mean cost, the smallest step size and the largest of
    the others.
    """
    values = [column[~column.isnan()] for column in row]
    values = [column if len(column) else torch.full((1,), torch.nan) for column in values]
    cost, expected, step, mu, gradient = values
    numbers = (expected.max().item(), step.min().item(), mu.max().item(), gradient.max().item())
    running = f"{int((~row[0].isnan()).sum()):>9}" if batched else ""
    return f"{iteration:>9}{running}{cost.mean().item():>16.9g}" + "".join(f"{number:>16.3g}" for number in numbers)
