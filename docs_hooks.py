"""MkDocs hook: the results that the documentation refers to are pages of the site, not links out of it.

In the repository `docs/paper.md` points at `../examples/results/...`, where the examples write; a reader on a code host
follows that. The built site has no such folder above it, so the results are added to it under the same names, and links
to them lose their `../`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parent
_RESULTS = "examples/results"
_KINDS = (".md", ".png")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages and pictures of the examples' results."""
    for path in sorted((_ROOT / _RESULTS).rglob("*")):
        if path.suffix in _KINDS:
            name = path.relative_to(_ROOT).as_posix()
            files.append(File(name, str(_ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point at them inside the site."""
    return re.sub(rf"\]\(\.\./({_RESULTS}/)", r"](\1", markdown)
