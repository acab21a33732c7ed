"""The log while a solve runs: a row an iteration, printed, sent to ``logging`` at DEBUG, and kept for the result.

Shapes: B problems.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ddpn_fx.control.result import COLUMNS, History, heading, line

log = logging.getLogger(__name__)


class Report:
    """The log while it grows: rows are complete, and printed, once the next iteration has told their step size."""

    def __init__(self, verbose: bool, batched: bool) -> None:
        self.verbose, self.batched = verbose, batched
        self.rows: list[Tensor] = []  # (columns, B)
        self._say(heading(batched))

    def add(self, row: Tensor) -> None:
        """Append a row whose step size is that of the row before it."""
        step = COLUMNS.index("step_size")
        if self.rows:
            last = self.rows[-1]
            last[step] = torch.where(last[0].isnan(), torch.nan, row[step])
            self._tell()
        row = row.clone()
        row[step] = torch.where(row[0].isnan(), torch.nan, 0.0)
        self.rows.append(row)

    def close(self, summary: str) -> None:
        """Print the last row and the outcome."""
        self._tell()
        self._say(summary)

    def history(self) -> History:
        """The rows as columns."""
        columns = torch.stack(self.rows, dim=1)
        return History(*(columns if self.batched else columns[..., 0]))

    def _tell(self) -> None:
        if self.verbose or log.isEnabledFor(logging.DEBUG):
            self._say(line(len(self.rows) - 1, self.rows[-1], self.batched))

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text)
        log.debug("%s", text)
