"""Errors of the compiler: each names the call, the value, the place in the user's model and the way out."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """The model could not be captured as a graph that computes what the model computes."""


class StagingError(RuntimeError):
    """The captured graph could not be cut into a chain of stages that covers every parameter use."""


class LossError(ValueError):
    """The loss does not fit what the terminal factor needs."""
