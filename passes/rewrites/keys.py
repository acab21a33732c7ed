"""Keys: the arguments of a call as something hashable, equal where the calls are."""

from __future__ import annotations

from typing import Any


def freeze(value: Any) -> Any:
    """A hashable form in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, freeze(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", freeze((value.start, value.stop, value.step)))
    return (type(value), repr(value) if isinstance(value, float) else value)
