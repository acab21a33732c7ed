"""Random networks in random modes equal the oracle, and their chains are the documented ones; then what no random net has.

A net is captured once and run in several modes, untraced and in float64. Its oracle is staged from its atoms, without
the compiler (`tests/random_nets.py`), so that equality in a nonlinear rollout says that the states are right as well.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.passes import verify
from tests import harness, oracle
from tests.models import CROSS_ENTROPY, Case
from tests.oracle import Settings, Stage
from tests.random_nets import Net, case_of, nets, reached, stage_atoms
from tests.test_modes import EXTRAS, RECURSIONS, TERMINALS

# A parameter repeated over the batch: see `test_capture_is_silent` in test_passes.py.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")

UNKNOWN_LOSS = {
    "curvature": {"curvature": 2.0},
    "curvature-2": {"curvature": 2.0, "rank": 2},
    "curvature-all": {"curvature": 2.0, "rank": None},
    "residual": {"terminal": "residual"},
    "gradient": {"terminal": "gradient", "lr": 0.1},
    "exact": {"terminal": "exact"},
}
WAYS = {**RECURSIONS, **EXTRAS}
NONLINEAR = {k: v for k, v in WAYS.items() if v.get("rollout") == "nonlinear"}


@st.composite
def modes(draw, loss: str, ways: dict) -> tuple[str, Settings]:
    terminals = UNKNOWN_LOSS if loss == "huber" else TERMINALS
    terminal = draw(st.sampled_from(sorted(terminals)))
    chosen = terminals[terminal]
    free_basis = chosen.get("rank", 1) is None or chosen.get("terminal") == "exact"  # a clip of y depends on the basis
    way = draw(st.sampled_from(sorted(k for k, v in ways.items() if not (free_basis and "trust" in v))))
    return f"{terminal}, {way}", Settings(**{**chosen, **ways[way]})


def check_chain(net: Net, chain) -> None:
    """The compiler's stages are the stager's: controls, tied parameters, and the shapes of the states in order."""
    verify(chain)
    staged = stage_atoms(net)
    assert [set(s.controls) for s in chain.stages] == [set(c) for c in staged.controls]
    assert [set(s.tied) for s in chain.stages] == [set(t) for t in staged.tied]
    assert [len(s.state_in) for s in chain.stages] == [0, *(len(names) for names in staged.live[:-1])]
    used = [p for s in chain.stages for p in s.controls]
    assert sorted(used) == sorted(chain.parameter_names) == sorted(set(used))
    assert set(used) <= net.trainable


def run(net: Net, data: st.DataObject, ways: dict, steps: int) -> None:
    """Three modes of one net, each on a batch of its own size."""
    case = case_of(net)
    try:
        for number in range(3):
            _, mode = data.draw(modes(net.loss, ways), label=f"mode {number}")
            if not net.trainable & {p for c in stage_atoms(net).controls for p in c} <= reached(net.atoms):
                # A parameter without a gradient (behind a detach): torch's optimisers leave it alone, and so does the
                # program, but the oracle's weight decay moves it.
                mode = replace(mode, weight_decay=0.0)
            batch = data.draw(st.integers(1, 5), label="batch")
            try:
                compiled, _ = harness.compare(case, mode, batch=batch, steps=steps, seed=number)
            except ValueError as error:  # the oracle's: after a large step the softmax is saturated to rounding
                assume("outside the range of the majorant" not in str(error))
                raise
        check_chain(net, compiled.chain)
    finally:
        harness._NETS.pop((case.name, torch.float64, None), None)


@given(nets(), st.data())
def test_random_nets_equal_oracle(net, data):
    run(net, data, WAYS, steps=2)


@given(nets(sizes=(4, 10)), st.data())
def test_random_nets_in_nonlinear_rollouts_equal_oracle(net, data):
    run(net, data, NONLINEAR, steps=1)


@given(nets(losses=("ce",), sizes=(8, 14)), st.data())
@settings(max_examples=max(2, settings.default.max_examples // 2))
def test_deeper_nets_equal_oracle(net, data):
    run(net, data, {k: v for k, v in WAYS.items() if k not in NONLINEAR}, steps=1)
