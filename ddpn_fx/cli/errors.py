"""What a command fails with, and the exit statuses."""

from __future__ import annotations

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


class CommandError(Exception):
    """What went wrong, in a line for the user, with the exit status to leave with."""

    def __init__(self, message: str, status: int = FAILURE) -> None:
        """Store the message and the exit status."""
        super().__init__(message)
        self.status = status


def cannot(verb: str, factory: tuple[str, str], error: Exception) -> str:
    """What to say where a model of the user's cannot be run, compiled or trained."""
    return f"cannot {verb} {':'.join(factory)}: {one_line(error)}"


def one_line(error: Exception) -> str:
    """Return an error's message without its traceback."""
    text = str(error).strip() or "no message"
    return f"{text} ({type(error).__name__}; --traceback shows where)"
