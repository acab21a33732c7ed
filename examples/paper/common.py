"""What the commands of the paper's experiments share: their arguments, the progress, the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from arena import Task

from ddpn_fx.data import FOLDER_VARIABLE, require
from ddpn_fx.demo import report

RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every experiment takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", metavar="DIR", help=f"folder of the .npz files (default: the variable {FOLDER_VARIABLE})"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--seeds", metavar="N", type=int, help="trainings of each, in the place of each task's own")
    parser.add_argument(
        "--steps", metavar="N", type=int, help="steps of every training, in the place of each task's own"
    )
    parser.add_argument("--backend", help="of torch.compile, in the place of each task's own")
    return parser


def adjusted(tasks: Sequence[Task], options: argparse.Namespace) -> list[Task]:
    """The tasks with what the command line says of steps and backend."""
    changes: dict[str, Any] = {}
    if options.steps:
        changes |= {"steps": options.steps, "search_steps": options.steps}
    if options.seeds:
        changes["seeds"] = options.seeds
    if options.backend:
        changes["backend"] = options.backend
    return [replace(task, **changes) for task in tasks]


def progress(total: int) -> Any:
    """A tqdm bar on standard error; lines of their own in a file."""
    return require("tqdm").tqdm(total=total, unit="cell", disable=not sys.stderr.isatty())


def write_page(path: Path, *parts: str) -> None:
    """Write a Markdown page of paragraphs, the machine last, and print it."""
    page = "\n\n".join([*parts, report.describe(report.environment())]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(page)


def facts(tasks: Sequence[Task], **more: Any) -> dict[str, Any]:
    """What a record says beside its cells."""
    return {"tasks": [asdict(task) for task in tasks], **more}
