"""Spare: whether what is traced is to spare memory, where it may choose what it keeps for later (``recompute=``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_asked: ContextVar[bool] = ContextVar("asked", default=False)


@contextmanager
def sparing(asked: bool) -> Iterator[None]:
    """Run what is inside with memory spared, or not."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def spares() -> bool:
    """Whether memory is to be spared here."""
    return _asked.get()
