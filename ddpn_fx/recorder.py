"""``Recorder``: what the optimiser does while it trains, as a CSV file, in TensorBoard, or in memory.

After each step the optimiser has its statistics as tensors (``opt.stats``). The recorder keeps those tensors as they
are, on their device, and reads them together every so many steps: one transfer then, and no synchronisation between.
Without a recorder nothing is kept, and a step costs what it costs.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.batch import split_inputs
from ddpn_fx.optimizer import DDPNOpt
from ddpn_fx.passes.capture import borrowed
from ddpn_fx.passes.mode import STATISTICS
from ddpn_fx.passes.objective import Objective

COLUMNS = ("step", *STATISTICS, "actual_decrease", "lr")
"""Columns of the CSV file: the step's number from 1 on, ``opt.stats``, the loss's actual decrease on the same batch
(empty where it was not evaluated), and the step size of the first parameter group."""


class Recorder:
    """Record every step of an optimiser.

    Args:
        opt: whose steps to record.
        path: a CSV file; one that a recorder wrote is continued. None: no file.
        every: after so many steps the records are read from their device and written.
        tensorboard: a folder for TensorBoard's event files (needs the package ``tensorboard``), or an object with
            ``add_scalar(tag, value, step)``. None: no TensorBoard.
        actual: evaluate the loss once more, after the update, on the batch of every ``every``-th step, for
            ``actual_decrease`` beside ``predicted_decrease``. That is one forward pass, in the model's mode; random
            operators draw anew, and buffers and the random state are as before.

    Attributes:
        history: the records so far as mappings by column, where neither ``path`` nor ``tensorboard`` is given.

    Raises:
        TypeError: ``opt`` is no ``DDPNOpt``.
        ValueError: ``every`` is not a positive whole number.
        FileExistsError: ``path`` holds something else.
        ModuleNotFoundError: ``tensorboard`` is a folder, and the package is not installed.

    It is a context manager; :meth:`close` writes what is left and lets go of the optimiser::

        with ddpn_fx.Recorder(opt, "training.csv", every=50):
            for x, y in loader:
                opt.train_step(x, y)
    """

    def __init__(
        self,
        opt: DDPNOpt,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int = 50,
        tensorboard: Any = None,
        actual: bool = False,
    ) -> None:
        if not isinstance(opt, DDPNOpt):
            raise TypeError(f"ddpn_fx.Recorder: opt is a {type(opt).__name__}, it must be a ddpn_fx.DDPNOpt")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"ddpn_fx.Recorder: every={every!r}, it must be a positive number of steps")
        self.every, self.actual = every, actual
        self.history: list[dict[str, float]] = []
        self._steps = 0
        self._pending: list[tuple[int, Sequence[Tensor], Tensor | None, Any]] = []
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._steps = _last_step(self._path)
        self._board = _writer(tensorboard)
        self._own_board = self._board is not tensorboard
        self._hook = opt.register_step_post_hook(self._after)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, also after an error: what was recorded before it is written."""
        self.close()

    def close(self) -> None:
        """Write what is left and record no more; a second call does nothing."""
        self._hook.remove()
        self.flush()
        if self._own_board and self._board is not None:
            self._board.close()
            self._board = None

    def flush(self) -> None:
        """Read the records kept so far from their device, and write them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        missing = torch.full((), float("nan"))
        rows = [
            torch.stack([*stats, missing.to(stats[0]) if actual is None else actual.to(stats[0])])
            for _, stats, actual, _ in pending
        ]
        values = torch.stack(rows).double().tolist()  # the one transfer
        records = [
            dict(zip(COLUMNS, (float(step), *row, float(lr)), strict=True))
            for (step, _, _, lr), row in zip(pending, values, strict=True)
        ]
        if self._path is not None:
            _append(self._path, records)
        if self._board is not None:
            for record in records:
                for name in COLUMNS[1:]:
                    if record[name] == record[name]:  # no NaN: an actual decrease that was not evaluated
                        self._board.add_scalar(f"ddpn_fx/{name}", record[name], int(record["step"]))
        if self._path is None and self._board is None:
            self.history += records

    def _after(self, opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a step's statistics; ``args`` and ``kwargs`` are those of ``train_step``."""
        self._steps += 1
        due = self._steps % self.every == 0
        actual = self._decrease(opt, *args[1:], **kwargs) if self.actual and due else None
        lr = opt.param_groups[0]["lr"]
        lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
        self._pending.append((self._steps, [opt.stats[name] for name in STATISTICS], actual, lr))
        if due:
            self.flush()

    @staticmethod
    def _decrease(opt: DDPNOpt, inputs: Any, target: Any = None) -> Tensor:
        """The loss before the update less the loss after it, on the same batch."""
        net = opt.net
        args, kwargs = split_inputs(inputs)
        loss = net._options["loss"]
        objective = Objective(net._original, loss, loss is None)
        targets = () if loss is None else (target,)
        with torch.no_grad(), borrowed(objective):
            after = pytree.tree_leaves(objective(args, dict(kwargs), targets))[0]
        return opt.stats["loss"] - after


def _last_step(path: Path) -> int:
    """The number of the last step in a recorder's file, 0 where there is none yet."""
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        if tuple(next(rows, ())) != COLUMNS:
            raise FileExistsError(f"ddpn_fx.Recorder: {str(path)!r} is no record of ddpn_fx; give another path")
        last = ["0"]
        for row in rows:
            last = row or last
    return int(last[0]) if last[0].isdecimal() else 0


def _append(path: Path, records: Sequence[Mapping[str, float]]) -> None:
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        for record in records:
            step, *values = (record[name] for name in COLUMNS)
            writer.writerow([int(step), *("" if v != v and n == "actual_decrease" else repr(v)
                                          for n, v in zip(COLUMNS[1:], values, strict=True))])  # fmt: skip


def _writer(tensorboard: Any) -> Any:
    """What takes scalars: the user's own writer, or TensorBoard's for a folder."""
    if tensorboard is None or hasattr(tensorboard, "add_scalar"):
        return tensorboard
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "ddpn_fx.Recorder: tensorboard is not installed: pip install tensorboard, "
            "or record into a CSV file with path="
        ) from error
    return SummaryWriter(os.fspath(tensorboard))
