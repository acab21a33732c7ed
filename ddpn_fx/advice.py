"""Advice: where the identity, DDPNOpt's default metric, is known to fall behind, said when a step is compiled for it.

In the trainings of ``examples/bench/target.py`` and in those of docs/notes.md ("On other models") the default is a
method for classifiers of dense and convolutional layers. On language, regression, many labels and batch norms it ended
behind Adam nearly everywhere, and ``"eigen-factored"`` ahead. Nothing is wrong with such a step, so that it is a
warning in the log, once in a process, and a line of ``explain``.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import fx

from ddpn_fx.passes.ir import Chain

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt

_log = logging.getLogger(__name__)
aten = torch.ops.aten


def advise(opt: DDPNOpt, chain: Chain) -> None:
    """Say what :func:`advice` says, once in a process."""
    text = advice(opt, chain)
    if text:
        _say(text)


@cache
def _say(text: str) -> None:
    _log.warning("%s", text)


def advice(opt: DDPNOpt, chain: Chain) -> str:
    """What is known of the optimizer's metric on such a model; empty where there is nothing to say."""
    if opt.preconditioner is not None or not opt.feedback or opt.quu != "gauss-newton":
        return ""
    found = [*(["batch norms"] if chain.has_statistics else []), *_of_loss(chain)]
    if not found:
        return ""
    return (
        f'DDPNOpt: with {" and ".join(found)} preconditioner="identity", the default, ends behind Adam on most models '
        'that were tried, and preconditioner="eigen-factored" ahead (docs/notes.md)'
    )


def _of_loss(chain: Chain) -> list[str]:
    loss = chain.loss_node
    if loss is None:
        return []
    outputs = loss.args[0]
    assert isinstance(outputs, fx.Node)
    shape = chain.sizes[outputs]
    each = math.prod(shape) // chain.captured.batch  # of a sample
    if loss.target is aten.mse_loss.default:
        return ["a regression"]
    if loss.target is aten.cross_entropy_loss.default:
        return ["classes at many positions of a sample"] if each > shape[min(1, len(shape) - 1)] else []
    return ["many labels of a sample"] if each > 1 else []
