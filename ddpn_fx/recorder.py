"""``Recorder``: what the optimiser does while it trains, as a CSV file, in TensorBoard, or in memory.

After each step the optimiser has its statistics as tensors (``opt.stats``). The recorder keeps those tensors as they
are, on their device, and reads them together every so many steps: one transfer then, and no synchronisation between.
Without a recorder nothing is kept, and a step costs what it costs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.batch import split_inputs
from ddpn_fx.optimizer import DDPNOpt
from ddpn_fx.passes.capture import borrowed
from ddpn_fx.passes.figures import FIGURES
from ddpn_fx.passes.mode import STATISTICS
from ddpn_fx.passes.numeric import whole
from ddpn_fx.passes.objective import Objective
from ddpn_fx.records import COLUMNS, Record, Records, last_step, read, stages_rows, writer

__all__ = ["COLUMNS", "Recorder"]


@dataclass
class _Step:
    """A step whose figures are still on their device: (T, len(FIGURES)), or None."""

    number: int
    stats: Sequence[Tensor]
    actual: Tensor | None
    lr: Any
    figures: Tensor | None = None
    controls: Sequence[str] = ()

    def tensors(self) -> list[Tensor]:
        """What is to be read, in the order of the columns: the statistics, the actual decrease, the figures."""
        like = self.stats[0]
        actual = torch.full_like(like, torch.nan) if self.actual is None else self.actual.to(like)
        return [torch.stack([*self.stats, actual]), *([] if self.figures is None else [self.figures])]


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
        stages: on every ``every``-th step also the figures of every stage (:data:`ddpn_fx.passes.figures.FIGURES`):
            norms of k and of the feedback part of du, y's distribution, trace, largest eigenvalue and effective
            dimension of the Gram. They go beside ``path``, into ``NAME.stages.csv``, a line a stage. Such a step is a
            program of its own, compiled once; the steps between are those of a training without a recorder.

    Attributes:
        history: the records so far as mappings by column, where neither ``path`` nor ``tensorboard`` is given.
        stages: likewise the figures so far, a mapping a step and stage: step, stage, controls (the names of its
            parameters), and the figures.

    Raises:
        TypeError: ``opt`` is no ``DDPNOpt``.
        ValueError: ``every`` is not a positive whole number; or ``stages``, and the batch comes in parts.
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
        stages: bool = False,
    ) -> None:
        if not isinstance(opt, DDPNOpt):
            raise TypeError(f"ddpn_fx.Recorder: opt is a {type(opt).__name__}, it must be a ddpn_fx.DDPNOpt")
        if not whole(every):
            raise ValueError(f"ddpn_fx.Recorder: every={every!r}, it must be a positive number of steps")
        if stages and opt._parts is not None:
            raise ValueError(
                "ddpn_fx.Recorder: stages=True needs the batch whole, which comes in parts here (accumulate=, "
                "process_group=); leave stages out"
            )
        self.every, self.actual = every, actual
        self.history: list[Record] = []
        self.stages: list[Record] = []
        self._steps, self._figures = 0, stages
        self._pending: list[_Step] = []
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._steps = last_step(self._path, stages=stages)
        self._board = writer(tensorboard)
        self._own_board = self._board is not tensorboard
        self._hooks = [opt.register_step_post_hook(self._after)]
        if stages:
            self._hooks.append(opt.register_step_pre_hook(self._before))

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
        for hook in self._hooks:
            hook.remove()
        self.flush()
        if self._own_board and self._board is not None:
            self._board.close()
            self._board = None

    def flush(self) -> None:
        """Read the records kept so far from their device, and write them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        parts = [part for step in pending for part in step.tensors()]
        values = torch.cat([part.flatten().to(parts[0].device) for part in parts]).double().tolist()  # the one transfer
        records, stages = [], []
        start = 0
        for step in pending:
            row = [*values[start : start + len(STATISTICS)], values[start + len(STATISTICS)], float(step.lr)]
            records.append(dict(zip(COLUMNS, (float(step.number), *row), strict=True)))
            start += len(STATISTICS) + 1
            if step.figures is not None:
                size = step.figures.numel()
                stages += stages_rows(step.number, step.controls, values[start : start + size])
                start += size
        found = Records(records, stages)
        if self._path is not None:
            found.append_to(self._path)
        if self._board is not None:
            found.show_on(self._board)
        if self._path is None and self._board is None:
            self.history += records
            self.stages += stages

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw what was recorded so far, over training.

        Args:
            path: what to write: ``.png``, ``.svg`` or ``.pdf``.

        Loss, predicted and actual decrease, clamps and skipped batches; with ``stages=True`` also a line a stage for
        norms, y and the effective dimension. On the command line: ``ddpn_fx picture training.csv training.png``.

        Raises:
            ValueError: nothing was recorded yet, or it went to TensorBoard alone; or an ending that matplotlib does
                not know.
            ModuleNotFoundError: matplotlib is not installed.
        """
        from ddpn_fx.picture import draw

        self.flush()
        if self._path is None and self._board is not None:
            raise ValueError(
                "ddpn_fx.Recorder.picture: the records went to TensorBoard alone; give the recorder a path= as well"
            )
        if self._path is not None and self._path.exists():
            draw(read(self._path), path, "ddpn_fx.Recorder.picture")
        else:
            draw(Records(self.history, self.stages), path, "ddpn_fx.Recorder.picture")

    def _before(self, opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ask for the figures of a step that is due."""
        if (self._steps + 1) % self.every == 0:
            opt._figures_wanted = True

    def _after(self, opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a step's statistics; ``args`` and ``kwargs`` are those of ``train_step``."""
        self._steps += 1
        due = self._steps % self.every == 0
        actual = self._decrease(opt, *args[1:], **kwargs) if self.actual and due else None
        lr = opt.param_groups[0]["lr"]
        lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
        step = _Step(self._steps, [opt.stats[name] for name in STATISTICS], actual, lr)
        if due and opt.stage_stats and self._figures:
            step.figures = torch.stack([opt.stage_stats[name] for name in FIGURES], 1)
            step.controls = tuple(" ".join(names) for names in opt._last.program.controls)
        self._pending.append(step)
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
