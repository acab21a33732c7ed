"""The written specification of the IR, as a check that runs: :func:`verify`.

The invariants of a chain:

1. every chain node before phi lies in exactly one stage, after what it reads;
2. a stage reads only its own nodes, its state, parameters, context and noise;
3. a state holds every chain value that is live across its cut; the state a stage reads is the state
   the stage before it leaves; the first reads data alone; the last leaves x_T;
4. every state tensor has the batch, and nothing else, as dimension 0 (x_T may have several rows a sample);
5. every use of a trainable parameter by a chain node is one :class:`ParamUse` of its stage, with
   all of its parameter arguments; controls partition the used parameters, in order of first use;
6. phi reads x_T, context and noise alone.
"""

from __future__ import annotations

from torch import fx

from ddpn_fx.passes.classify import has_gradient
from ddpn_fx.passes.errors import StagingError
from ddpn_fx.passes.ir import HELD, Chain, Kind, Layout
from ddpn_fx.passes.provenance import describe


def verify(chain: Chain) -> Chain:
    """Check the invariants; returns the chain.

    Raises:
        StagingError: listing every violation, each with module path and source line.
    """
    if not chain.stages:
        raise StagingError("the chain is not well formed:\n- it has no stages")
    faults: list[str] = []
    placed: dict[fx.Node, int] = {}
    made: set[object] = set()
    for stage in chain.stages:
        inside = set(stage.nodes)
        seen: set[object] = set()
        for node in stage.nodes:
            seen.add(node)
            if node in placed:
                faults.append(f"{describe(node)} lies in stages {placed[node]} and {stage.index}")
            placed[node] = stage.index
            for a in node.all_input_nodes:
                kind = chain.kinds[a]
                if a in inside and a not in seen:
                    faults.append(f"stage {stage.index}: {describe(node)} comes before {describe(a)}, which it reads")
                if kind is Kind.CHAIN and a not in inside and a not in stage.state_in:
                    faults.append(
                        f"stage {stage.index}: {describe(node)} reads {describe(a)}, which is not in its state"
                    )
                if kind in HELD and a not in inside and a not in made:
                    faults.append(f"stage {stage.index}: {describe(node)} reads {kind.value} that is made later")
        made |= {n for n in stage.nodes if chain.kinds[n] in HELD}
    for before, after in zip(chain.stages, chain.stages[1:], strict=False):
        if before.state_out != after.state_in:
            faults.append(f"stage {after.index} reads another state than stage {before.index} leaves")
        for node in after.state_in:
            if chain.layouts.get(node) != Layout(0, 1):
                faults.append(f"state of stage {after.index}: {describe(node)} has no batch dimension 0")
    if chain.stages[0].state_in:
        faults.append("the first stage reads a state: x_0 is data")
    if chain.stages[-1].state_out != chain.terminal:
        faults.append("the last stage does not leave x_T")
    faults += uncovered(chain) + _states(chain, placed)
    owned = [p for s in chain.stages for p in s.controls]
    if len(owned) != len(set(owned)):
        faults.append("a parameter is the control of two stages")
    phi = set(chain.phi)
    for node in chain.phi:
        for a in node.all_input_nodes:
            if chain.kinds[a] is Kind.CHAIN and a not in phi and a not in chain.terminal:
                faults.append(f"phi: {describe(node)} reads {describe(a)}, which is not in x_T")
    faults = faults or _controls(chain)  # what follows from a fault above is not listed beside it
    if faults:
        raise StagingError("the chain is not well formed:\n" + "\n".join(f"- {f}" for f in faults))
    return chain


def _states(chain: Chain, placed: dict[fx.Node, int]) -> list[str]:
    """Chain nodes that no stage evaluates, and values that are live across a cut but in no state there."""
    dead, phi = _dead(chain), set(chain.phi)
    walked = [n for n, k in chain.kinds.items() if k in (Kind.CHAIN, *HELD) and n not in dead and n not in phi]
    faults = [f"{describe(n)} lies in no stage" for n in walked if n not in placed and n is not chain.loss]
    last_use = {n: max((placed[u] for u in n.users if u in placed), default=-1) for n in placed}
    last_use |= {n: len(chain.stages) for n in chain.terminal}
    for node in (n for n in walked if chain.kinds[n] is Kind.CHAIN and n in placed):
        for stage in chain.stages[placed[node] : max(last_use[node], placed[node])]:
            if node not in stage.state_out:
                faults.append(f"{describe(node)} is live after stage {stage.index}, but not in the state it leaves")
    return faults


def _controls(chain: Chain) -> list[str]:
    """Uses that lie in another stage or twice, and controls that are not the parameters of first use."""
    faults: list[str] = []
    owned: list[str] = []
    for stage in chain.stages:
        nodes = [u.node for u in stage.uses]
        faults += [f"stage {stage.index}: {describe(n)} is another stage's" for n in nodes if n not in stage.nodes]
        faults += [f"stage {stage.index}: {describe(n)} is used twice" for n in set(nodes) if nodes.count(n) > 1]
        used = dict.fromkeys(p for u in stage.uses for names in u.parameters for p in names)
        expected = tuple(p for p in used if p not in owned)
        if stage.controls != expected:
            faults.append(f"stage {stage.index}: its controls are {stage.controls}, its first uses {expected}")
        owned += expected
    if chain.parameter_names != tuple(owned):
        faults.append(f"parameter_names is {chain.parameter_names}, the controls in order are {tuple(owned)}")
    return faults


def uncovered(chain: Chain) -> list[str]:
    """Every use of a trainable parameter that no stage's rule covers, with its place in the model."""
    covered = {(u.node, a) for s in chain.stages for u in s.uses for a in u.arguments}
    dead = _dead(chain)
    return [
        f"parameter use not covered: {describe(node)} uses {describe(a)}"
        for node in chain.graph.nodes
        if chain.kinds.get(node) in (Kind.CHAIN, Kind.STATISTIC) and node not in dead
        for a in node.all_input_nodes
        if chain.kinds.get(a) is Kind.PARAMETER and has_gradient(a) and (node, a) not in covered
    ]


def _dead(chain: Chain) -> set[object]:
    """Chain nodes that neither the loss nor x_T needs."""
    needed: set[object] = set()
    for node in reversed(list(chain.graph.nodes)):
        if node is chain.loss or node in chain.terminal or any(u in needed for u in node.users):
            needed.add(node)
    return {n for n in chain.graph.nodes if n not in needed}
