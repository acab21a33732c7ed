"""What preconditioners share: where moments come from, the check of options, the elementwise metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ddpn_fx.passes.metric import Site

MOMENTS = ("gradient", "value")


@dataclass(frozen=True)
class Base:
    """What all have: ``moments``, no work beside the step, and what DDPNOpt takes for options that are None.

    Attributes:
        default_coupling: DDPNOpt's coupling where it is None.
        default_sketch: DDPNOpt's sketch where it is None; None: K is exact.
        sketches: whether M is diagonal on rows and on columns, so that ``diagonals`` of its metric has both.
        needs_samples: whether M is made of the samples' own Q_u, not of the batch's alone.
    """

    default_lr: ClassVar[float] = 1.0
    default_beta1: ClassVar[float] = 0.0
    default_nesterov: ClassVar[bool] = False
    default_coupling: ClassVar[str | int] = "batch"
    default_sketch: ClassVar[int | None] = None
    sketches: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False

    @property
    def moments(self) -> str:
        """Where Q_u and V come from, one of ``MOMENTS``."""
        raise NotImplementedError

    def refresh(self, site: Site, state: dict[str, Tensor], step: int) -> None:
        """Nothing is done outside the compiled step."""

    def check(self, **rules: tuple[Any, str]) -> None:
        """Raise a ValueError for an option that breaks its rule: ``name=(holds, rule)``."""
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} must be {rule}")
        if self.moments not in MOMENTS:
            raise ValueError(f"{type(self).__name__}: moments={self.moments!r} must be one of {MOMENTS}")


@dataclass(frozen=True)
class Elementwise:
    """M = diag(scale), of the parameter's shape."""

    scale: Tensor
    sides: None = None

    def solve(self, direction: Tensor) -> Tensor:
        """M^-1 times a direction."""
        return direction.to(self.scale.dtype) / self.scale

    def whiten(self, columns: Tensor) -> Tensor:
        """Columns over the root of M."""
        return columns.to(self.scale.dtype) * self.scale.rsqrt()
