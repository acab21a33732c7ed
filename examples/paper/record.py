"""Results that are resumed, and the search for a step size.

A **cell** is one training (task, method, step size, seed, part); it is written to the record when it ends, and a rerun
of the same command continues with the cells that are missing. Step sizes are chosen on a validation split of the
training set and reported on the test set, trained on all of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from arena import Arena, Method, Task

from ddpn_fx.demo import report


class Record:
    """The cells of an experiment in a JSON file, written anew whenever one is added."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.cells: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Take in the cells of the file, which another process may have added."""
        if self.path.is_file():
            self.cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"] | self.cells

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Keep a cell and write the file; a stop in the middle leaves the old one."""
        self.cells[key] = cell
        self.write()

    def write(self) -> None:
        """Write all cells, those that another process has added included, with the machine and the versions of now."""
        self.read()
        record = report.environment() | self.facts | {"cells": self.cells}
        other = self.path.with_suffix(".tmp")
        report.write_json(other, record)
        os.replace(other, self.path)


def key_of(task: Task, method: Method, value: float, seed: int, *, steps: int, search: bool = False) -> str:
    """The cell's name: all that its result depends on, so that a changed setting is run anew."""
    net = "cnn" if task.convolutional else "-".join(map(str, task.widths))
    part = "search" if search else "test"
    shape = f"{net} {task.activation} {task.output} batch {task.batch_size}"
    return f"{task.key} | {shape} | {method.name} | {value:g} | seed {seed} | {part} {steps}"


class Runner:
    """Runs the cells that a record lacks, with progress."""

    def __init__(self, record: Record, bar: Any) -> None:
        self.record, self.bar = record, bar

    def cell(
        self,
        arena: Callable[[], Arena],
        task: Task,
        method: Method,
        value: float,
        seed: int,
        *,
        steps: int,
        search: bool = False,
        every: int = 0,
    ) -> dict[str, Any]:
        """A cell from the record, or trained now; `arena` is called in the latter case alone."""
        key = key_of(task, method, value, seed, steps=steps, search=search)
        if key not in self.record.cells:
            place = arena()
            self.bar.set_description(f"{task.key}: {method.name} {value:g}")
            cell = place.train(method, value, seed, steps=steps, search=search, every=every)
            about = {"task": task.key, "data": place.data.name, "method": method.name, "value": value}
            self.record.add(key, about | {"seed": seed, "search": search} | cell)
            if not sys.stderr.isatty():
                print(f"{key}: {cell['accuracy']:.2f} % in {cell['seconds']:.1f} s", file=sys.stderr, flush=True)
        self.bar.update()
        return self.record.cells[key]

    def search(self, arena: Callable[[], Arena], task: Task, method: Method) -> float:
        """The value of the grid with the best mean validation accuracy; the first of equals."""
        steps = task.search_steps
        for value in method.grid_on(task):
            for seed in range(task.search_seeds):
                self.cell(arena, task, method, value, seed, steps=steps, search=True)
        return chosen(self.record, task, method)


def chosen(record: Record, task: Task, method: Method) -> float:
    """The value of the grid with the best mean validation accuracy in the record; a diverged training counts less."""

    def merit(value: float) -> float:
        cells = trials(record, task, method, value)
        return fmean(-1.0 if c.get("diverged") else c["accuracy"] for c in cells) if cells else -2.0

    return max(method.grid_on(task), key=merit)


def trials(record: Record, task: Task, method: Method, value: float) -> list[dict[str, Any]]:
    """The trainings of the search at one value, measured on the validation split."""
    keys = (
        key_of(task, method, value, seed, steps=task.search_steps, search=True) for seed in range(task.search_seeds)
    )
    return [record.cells[k] for k in keys if k in record.cells]
