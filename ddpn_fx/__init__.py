"""ddpn_fx: train any ``nn.Module`` as an optimal-control problem, by compiled Differential Dynamic Programming."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpn_fx import control, preconditioners
    from ddpn_fx.module import compile
    from ddpn_fx.optimizer import DDPNOpt
    from ddpn_fx.passes.errors import CaptureError, LossError, StagingError

__version__ = "0.1.0.dev0"
__all__ = [
    "CaptureError",
    "DDPNOpt",
    "LossError",
    "StagingError",
    "__version__",
    "compile",
    "control",
    "export",
    "preconditioners",
]


# torch is imported with the first of these names, so that the command line's help is quick.
_HOMES = {
    "compile": "ddpn_fx.module",
    "DDPNOpt": "ddpn_fx.optimizer",
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


def export(net_or_opt: Any, folder: Any) -> list[Any]:
    """Write every graph generated so far into a folder, readable and runnable.

    Args:
        net_or_opt: what :func:`compile` returned, or a :class:`DDPNOpt` on it.
        folder: where to write; made if missing. Files of other names in it stay.

    Returns:
        The paths of the files written.

    Raises:
        TypeError: neither a compiled module nor a ``DDPNOpt``.
        RuntimeError: nothing was captured yet.
    """
    from ddpn_fx.exporting import write_graphs
    from ddpn_fx.inspect import graphs_with_inputs
    from ddpn_fx.module import CompiledModule
    from ddpn_fx.optimizer import DDPNOpt

    net = net_or_opt.net if isinstance(net_or_opt, DDPNOpt) else net_or_opt
    if not isinstance(net, CompiledModule):
        raise TypeError(
            f"ddpn_fx.export: give what ddpn_fx.compile returned or a DDPNOpt, not a {type(net_or_opt).__name__}"
        )
    chain = net.chain
    found = graphs_with_inputs(net)
    return write_graphs(
        {name: module for name, (module, _) in found.items()},
        folder,
        chain_table=str(chain),
        chain_rows=chain.rows(),
        example_inputs={name: inputs for name, (_, inputs) in found.items() if inputs is not None},
    )
