"""Beside: K of a bias with that of its layer's weight, where K may be approximate.

A column of a dense layer with one position is ``h x^T`` of the weight and h of the bias, so that in one metric of both
the bias would be one more input, of size 1: ``(x . x' + 1) (h . h')``. In two metrics it needs a Gram of its own, of h
as it sees it, though what two columns have in common there is next to what they have in common for the weight. So it
stays one more input, of the size that gives each sample its own K:

    (K_t)_kl = (x_i . x_j + e_i e_j) (h_k . h_l),    e_i^2 = |h_i|^2 of the bias / |h_i|^2 of the weight,

each in its metric, i and j the samples of k and l, |h_i|^2 summed over a sample's columns. That is positive
semidefinite, and of one column exact on the diagonal. With narrow layers and many samples the Grams are a third of a
step: a bias took one for the weight's two.

As with sketches (:mod:`ddpn_fx.passes.sketch`) omega alone is touched, and so where these are wanted this is; but
theirs is K in the mean, and this is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping

from torch import Tensor

from ddpn_fx.passes.gamma import Gamma
from ddpn_fx.passes.ir import Chain, Stage
from ddpn_fx.passes.metric import Metric
from ddpn_fx.passes.rules import Blocks


def biases(
    chain: Chain,
    stage: Stage,
    gammas: Mapping[str, Gamma],
    metrics: Mapping[str, Metric],
    sketched: Container[str],
    group: Mapping[str, int],
    blocks: Blocks,
) -> dict[str, str]:
    """The weights of a stage whose K is a product of two Grams, and the biases that come with them.

    In the identity the two share the Gram of h, where it is exact. One of sums is the weight's alone, and there a bias
    comes with its weight as it does in a metric.

    Args:
        chain: the chain.
        stage: one of its stages.
        gammas: of the stage's parameters, by name.
        metrics: of K by parameter name; none for the identity.
        sketched: names of the parameters whose K comes from a sketch.
        group: parameter name -> index of its parameter group: they have one step size.
        blocks: the blocks of K.
    """
    return {
        weight: bias
        for weight, bias in _layers(chain, stage)
        if {weight, bias} <= gammas.keys()
        and group[weight] == group[bias]
        and (weight in sketched or (weight in metrics and metrics[weight].sides is not None))
        and gammas[weight].plain.positions_of() == 1
        and gammas[weight].plain.factors(blocks) is not None
    }


def squares(bias: Gamma, metric: Metric | None) -> Tensor:
    """|h_i|^2 of a bias in its metric (None: the identity): (B,)."""
    columns = bias.columns()
    whitened = (columns if metric is None else metric.whiten(columns)).flatten(1)
    return (whitened * whitened).sum(1)


def _layers(chain: Chain, stage: Stage) -> Iterator[tuple[str, str]]:
    """Weight and bias of the linear layers of a stage that no other operator of the chain uses."""
    uses = Counter(name for s in chain.stages for use in s.uses for names in use.parameters for name in names)
    for use in stage.uses:
        if use.rule == "linear" and len(use.arguments) == 2 and all(a.op == "placeholder" for a in use.arguments):
            (weight,), (bias,) = use.parameters
            if uses[weight] == uses[bias] == 1:
                yield weight, bias
