"""What ``explain`` says, said as it happens: into the log, and as artifacts of torch's structured trace.

``TORCH_LOGS="ddpn_fx"`` shows a line a pass, how a model was captured, what was compiled for what, and what the fast
path does not cover; ``TORCH_LOGS="+ddpn_fx"`` also the stages with their rules and cuts. ``TORCH_TRACE=FOLDER`` leaves
for ``tlparse`` the graph after each pass (:mod:`ddpn_fx.passes.artifacts`), and from here the stages and the whole
report, as text and as JSON. Without either nothing is made.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING

from ddpn_fx.passes.artifacts import artifact, traced

if TYPE_CHECKING:
    from ddpn_fx.explanation import Explanation
    from ddpn_fx.module import CompiledModule
    from ddpn_fx.optimizer import DDPNOpt

_log = logging.getLogger(__name__)


def captured(net: CompiledModule) -> None:
    """Say how a model was captured, into which stages, and what is special about it."""
    if not (_log.isEnabledFor(logging.INFO) or traced()):
        return
    from ddpn_fx.explanation import explain

    found = explain(net)
    _log.info("%s: %s", found.model, found.captured)
    if _log.isEnabledFor(logging.DEBUG):
        for line in found.stage_lines():
            _log.debug("%s", line)
    for line in found.limits():
        _log.info("not on the fast path: %s", line.strip())
    artifact("stages", lambda: str(net.chain))
    _report(found)


def compiled(opt: DDPNOpt) -> None:
    """Say what a step was compiled for."""
    if not (_log.isEnabledFor(logging.INFO) or traced()):
        return
    from ddpn_fx.explanation import explain

    found = explain(opt)
    latest = found.programs[-1]
    shapes = ", ".join(map(str, latest.shapes))
    _log.info("step %d for batch %d, shapes %s: %s", len(found.programs), latest.batch, shapes, latest.trigger)
    _report(found)


def _report(found: Explanation) -> None:
    artifact("explain", lambda: str(found))
    artifact("explain_data", lambda: json.dumps(dataclasses.asdict(found), default=str, indent=1), "json")
