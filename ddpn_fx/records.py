"""Records of a training, on their way out: CSV files and TensorBoard, and back from CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpn_fx.passes.figures import FIGURES
from ddpn_fx.passes.mode import STATISTICS

COLUMNS = ("step", *STATISTICS, "actual_decrease", "lr")
"""Columns of the CSV file: the step's number from 1 on, ``opt.stats``, the loss's actual decrease on the same batch
(empty where it was not evaluated), and the step size of the first parameter group."""

STAGE_COLUMNS = ("step", "stage", "controls", *FIGURES)
"""Columns of the stages' CSV file: step, index of the stage, its parameters with blanks between, and its figures (empty
where a mode does not have them)."""

Record = Mapping[str, Any]


@dataclass
class Records:
    """What was recorded.

    Attributes:
        steps: a mapping a step, by :data:`COLUMNS`.
        stages: a mapping a step and stage, by :data:`STAGE_COLUMNS`.
    """

    steps: Sequence[Record] = ()
    stages: Sequence[Record] = field(default_factory=list)

    def append_to(self, path: Path) -> None:
        """Append to the CSV file of the steps, and to the one of the stages beside it."""
        _append(path, COLUMNS, self.steps, {"actual_decrease"})
        if self.stages:
            _append(stages_path(path), STAGE_COLUMNS, self.stages, set(FIGURES))

    def show_on(self, board: Any) -> None:
        """Hand everything that has a value to ``add_scalar(tag, value, step)``."""
        for record in self.steps:
            _show(board, "ddpn_fx", COLUMNS[1:], record)
        for record in self.stages:
            _show(board, f"ddpn_fx/stage {record['stage']}", FIGURES, record)


def _show(board: Any, prefix: str, names: Sequence[str], record: Record) -> None:
    for name in names:
        if record[name] == record[name]:  # no NaN: what was not evaluated
            board.add_scalar(f"{prefix}/{name}", record[name], int(record["step"]))


def stages_rows(step: int, controls: Sequence[str], values: Sequence[float]) -> list[Record]:
    """One step's figures, row by row, as a record a stage."""
    width = len(FIGURES)
    return [
        dict(zip(STAGE_COLUMNS, (step, t, names, *values[t * width : (t + 1) * width]), strict=True))
        for t, names in enumerate(controls)
    ]


def stages_path(path: Path) -> Path:
    """Where the stages' file of a record is: ``training.csv`` -> ``training.stages.csv``."""
    return path.with_name(f"{path.stem}.stages{path.suffix}")


def last_step(path: Path, *, stages: bool) -> int:
    """The number of the last step in a recorder's file, 0 where there is none yet.

    Raises:
        FileExistsError: the file, or with ``stages`` the one beside it, is no record.
    """
    call = "ddpn_fx.Recorder"
    if stages:
        _rows(stages_path(path), STAGE_COLUMNS, call)
    rows = _rows(path, COLUMNS, call)
    last = rows[-1][0] if rows else "0"
    return int(last) if last.isdecimal() else 0


def read(path: Path, call: str = "ddpn_fx picture") -> Records:
    """A record from its CSV file, and from the stages' one where it is there.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: it is no record of a recorder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{call}: there is no file {str(path)!r}")
    found = Records()
    for target, columns, file in (("steps", COLUMNS, path), ("stages", STAGE_COLUMNS, stages_path(path))):
        rows = [dict(zip(columns, row, strict=True)) for row in _rows(file, columns, call)]
        setattr(found, target, [{name: _value(name, text) for name, text in row.items()} for row in rows])
    return found


def _value(name: str, text: str) -> Any:
    if name == "controls":
        return text
    return int(text) if name in ("step", "stage") else float(text or "nan")


def _rows(path: Path, columns: Sequence[str], call: str) -> list[list[str]]:
    """The lines below the header; none where there is no file yet."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        if tuple(next(rows, ())) != tuple(columns):
            raise FileExistsError(f"{call}: {str(path)!r} is no record of ddpn_fx; give another path")
        return [row for row in rows if row]


def _append(path: Path, columns: Sequence[str], records: Sequence[Record], empty: set[str]) -> None:
    """Append records; a NaN in a column of ``empty`` is an empty field."""
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        if fresh:
            out.writerow(columns)
        for record in records:
            out.writerow([_field(record[name], name in empty, name == "step") for name in columns])


def _field(value: Any, may_be_empty: bool, whole: bool) -> Any:
    if whole:
        return int(value)
    if isinstance(value, float):
        return "" if may_be_empty and value != value else repr(value)
    return value


def writer(tensorboard: Any) -> Any:
    """What takes scalars: the user's own writer, or TensorBoard's for a folder.

    Raises:
        ModuleNotFoundError: a folder, and TensorBoard is not installed.
    """
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
