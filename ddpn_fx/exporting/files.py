"""Names and writes the files of an export, and overwrites none that an export did not write.

`index.md` is the record of what was written: a file that exists and is not in it belongs to somebody else.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Content = str | bytes | dict[str, Any]
"""What a file holds: a text, bytes, or what `torch.save` writes."""

INDEX = "index.md"
SWITCHED_OFF = "Passes switched off: "
_MARK = "<!-- Written by ddpn_fx.export: the record of the files it may overwrite here. -->"
_LINK = re.compile(r"\]\(([^)]+)\)")
_TAKEN = {"chain", "index", "model", "model_explorer", "passes"}
_SHADOWS = sys.stdlib_module_names | {
    "filelock", "fsspec", "jinja2", "mpmath", "networkx", "numpy", "sympy", "torch", "typing_extensions",
}  # fmt: skip


def file_stems(names: Iterable[str]) -> dict[str, str]:
    """Turn graph names into file names without extension.

    Unknown characters become "_"; a name that would hide a module that the written file imports gets "_graph", and
    names that fall together (also where case does not count) get a number.

    Args:
        names: the graphs' names.

    Returns:
        name -> stem, all different.
    """
    stems: dict[str, str] = {}
    taken = set(_TAKEN)
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "graph"
        plain = f"{plain}_graph" if plain.lower() in _SHADOWS else plain
        stem, number = plain, 2
        while stem.lower() in taken:
            stem, number = f"{plain}_{number}", number + 1
        taken.add(stem.lower())
        stems[name] = stem
    return stems


def prepare_folder(folder: Path, names: Iterable[str]) -> list[str]:
    """Create the folder and see that the files may be written there.

    Args:
        folder: where to write.
        names: the files that will be written.

    Returns:
        Files of earlier exports that are there and will not be written now.

    Raises:
        NotADirectoryError: the folder, or one that it lies in, is a file.
        PermissionError: it cannot be written to.
        FileExistsError: one of the files exists and was not written by an export.
        OSError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"write_graphs: folder {str(folder)!r} is a file, or lies in one") from error
    except OSError as error:
        raise OSError(error.errno, f"write_graphs: cannot create folder {str(folder)!r}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"write_graphs: no permission to write in folder {str(folder)!r}")
    ours = _earlier_files(folder)
    names = list(names)
    foreign = [name for name in (INDEX, *names) if name not in ours and (folder / name).exists()]
    if foreign:
        raise FileExistsError(
            f"write_graphs: folder {str(folder)!r} has {', '.join(foreign)}, which no export wrote; give another folder"
        )
    return sorted(name for name in ours - {INDEX, *names} if (folder / name).exists())


def write_files(folder: Path, contents: Mapping[str, Content]) -> list[Path]:
    """Write files: texts as UTF-8, bytes as they are, dictionaries of tensors with `torch.save`.

    Args:
        folder: an existing folder.
        contents: file name -> contents.

    Returns:
        Their paths, in the order of `contents`.
    """
    paths = []
    for name, content in contents.items():
        path = folder / name
        if isinstance(content, str):
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8", newline="\n")
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        paths.append(path)
    return paths


def index_text(
    rows: Sequence[tuple[Sequence[str], int | None, int | None, str]],
    earlier: Sequence[str],
    skipped: Mapping[str, str] | None = None,
    remark: str = "",
) -> str:
    """Write `index.md`.

    Args:
        rows: for each graph its files, its number of nodes and of operations (None: not counted), and what it is.
        earlier: files of earlier exports that are still there.
        skipped: format or file -> why it was not written.
        remark: a line below the table.

    Returns:
        A table in Markdown.
    """
    lines = [_MARK, "# Generated graphs", "", "| file | nodes | ops | what it is |", "|---|---|---|---|"]
    for files, nodes, ops, about in rows:
        cells = [_links(files), *("" if count is None else str(count) for count in (nodes, ops)), _escaped(about)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", remark] if remark else []
    if skipped:
        lines += ["", "Not written:", "", *(f"- {name}: {_escaped(reason)}" for name, reason in skipped.items())]
    if earlier:
        lines += ["", f"Of earlier exports: {_links(earlier)}"]
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    return re.sub(r"([|\\`<])", r"\\\1", " ".join(text.split()))


def _links(names: Iterable[str]) -> str:
    return " ".join(f"[{name}]({name})" for name in names)


def _earlier_files(folder: Path) -> set[str]:
    index = folder / INDEX
    text = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    return {INDEX, *_LINK.findall(text)} if text.startswith(_MARK) else set()
