"""The compiler of ddpn_fx: an intermediate representation and passes over it, one idea a file.

Import it as ``ddpn_fx.passes``. Nothing here imports the face of the package (``ddpn_fx/``).
The pipeline in the order it runs: ``capture``, ``normalize``, ``stage`` (these three make a
:class:`~ddpn_fx.passes.ir.Chain`), then per batch shape ``program`` (which composes
``linearize``, ``bellman`` and ``feedback``), ``fuse`` and ``lower``.
"""

if __name__ == "passes":
    raise ImportError("this is the compiler of ddpn_fx: import it as `ddpn_fx.passes`, not as `passes`")

from ddpn_fx.passes.ir import Chain, ParamUse, Stage
from ddpn_fx.passes.pipeline import build_chain
from ddpn_fx.passes.verify import verify

__all__ = ["Chain", "ParamUse", "Stage", "build_chain", "verify"]
