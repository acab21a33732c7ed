"""Guards: what a pass borrows while it runs a model, and gives back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def random_state(values: Iterable[Any]) -> Iterator[None]:
    """Give back the random state of the CPU and of every CUDA device that holds one of the tensors."""
    devices = {t.device for t in values if isinstance(t, Tensor) and t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices})):
        yield
