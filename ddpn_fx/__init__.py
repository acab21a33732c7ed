"""ddpn_fx: train any ``nn.Module`` as an optimal-control problem, by compiled Differential Dynamic Programming."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpn_fx import control, preconditioners
    from ddpn_fx.entry import compile
    from ddpn_fx.explanation import explain
    from ddpn_fx.feedback_matrices import policies
    from ddpn_fx.inspect import export
    from ddpn_fx.memory import keep_freed_memory
    from ddpn_fx.optimizer import DDPNOpt
    from ddpn_fx.passes.errors import CaptureError, LossError, StagingError
    from ddpn_fx.recorder import Recorder

__version__ = "0.1.0.dev0"
__all__ = [
    "CaptureError",
    "DDPNOpt",
    "LossError",
    "Recorder",
    "StagingError",
    "__version__",
    "compile",
    "control",
    "explain",
    "export",
    "keep_freed_memory",
    "policies",
    "preconditioners",
]


# torch is imported with the first of these names, so that the command line's help is quick.
_HOMES = {
    "compile": "ddpn_fx.entry",
    "DDPNOpt": "ddpn_fx.optimizer",
    "explain": "ddpn_fx.explanation",
    "export": "ddpn_fx.inspect",
    "keep_freed_memory": "ddpn_fx.memory",
    "policies": "ddpn_fx.feedback_matrices",
    "Recorder": "ddpn_fx.recorder",
    "CaptureError": "ddpn_fx.passes.errors",
    "LossError": "ddpn_fx.passes.errors",
    "StagingError": "ddpn_fx.passes.errors",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("control", "preconditioners"):
        return import_module(f"ddpn_fx.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ddpn_fx' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
