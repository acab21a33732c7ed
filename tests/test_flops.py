"""The work of a step: multiplications and additions of the generated graph against a law written down here.

A training step of SGD is a forward pass, a cotangent and a weight gradient of every layer. The closed loop adds the
Grams, in the cheaper of two ways: of inputs and of cotangents, or of per-sample gradients, which then stand in for the
weight's gradient as well. A pass that starts to do work twice shows here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ddpn_fx
from ddpn_fx.demo import relu_network
from ddpn_fx.preconditioners import EigenFactored

TOLERANCE = 0.03


def gram(n: int) -> int:
    """Products of a Gram of n vectors for each of their elements: on a CPU a large one is worked out by halves."""
    return n**2 if n < 128 else 2 * gram(n // 2) + (n // 2) ** 2


@dataclass(frozen=True)
class Product:
    """A layer of outer products: inputs and outputs of a position, positions of a sample, whether it is the first."""

    inputs: int
    outputs: int
    positions: int = 1
    first: bool = False

    def work(self, batch: int, columns: int, forwards: int, *, contractions: int = 1, form: bool = False) -> int:
        """FLOPs of a layer in a step: forward passes, cotangents, its Gram, its contractions."""
        one = self.inputs * self.outputs
        n = batch * columns
        whole = batch * self.positions * one
        total = forwards * whole + (0 if self.first else columns * whole)
        if self.positions == 1 and not form:
            total += gram(batch) * self.inputs + gram(n) * self.outputs + contractions * whole
        else:
            total += columns * whole + gram(n) * one + contractions * n * one
        return 2 * total


def convolutions() -> tuple[nn.Module, list[Product]]:
    """Two convolutions and two dense layers on 3x16x16 images."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return model, [
        Product(27, 16, 256, first=True),
        Product(144, 32, 64),
        Product(512, 64),
        Product(64, 10),
    ]


class Sequence(nn.Module):
    """Dense layers over 32 positions, around a residual, and a mean over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(24, 48), nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 10)

    def forward(self, x):
        x = self.a(x)
        return self.d((x + self.c(F.gelu(self.b(x)))).mean(1))


def dense() -> tuple[nn.Module, list[Product]]:
    widths = (200, 160, 160, 10)
    return relu_network(*widths), [Product(i, o, first=k == 0) for k, (i, o) in enumerate(pairwise(widths))]


def sequence() -> tuple[nn.Module, list[Product]]:
    layers = [Product(24, 48, 32, first=True), Product(48, 96, 32), Product(96, 48, 32), Product(48, 10)]
    return Sequence(), layers


MODELS = {
    "dense": (dense, (200,)),
    "convolutions": (convolutions, (3, 16, 16)),
    "sequence": (sequence, (32, 24)),
}


def flops(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measured(name: str, batch: int, **options) -> tuple[int, list[Product]]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, layers = make()
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager"), lr=0.01, **options)
    for _ in range(2):  # after these a preconditioner may renew its bases
        opt.train_step(x, y)
    return flops(lambda: opt.train_step(x, y)), layers


@pytest.mark.cases(3)
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_sgd_costs_what_the_law_says(name, batch):
    """So that the law's forward pass, cotangents and gradients are those that torch itself counts."""
    make, shape = MODELS[name]
    model, layers = make()
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    want = sum(2 * batch * p.positions * p.inputs * p.outputs * (2 if p.first else 3) for p in layers)
    assert flops(lambda: F.cross_entropy(model(x), y).backward()) == pytest.approx(want, rel=TOLERANCE)
    assert measured(name, batch, feedback=False)[0] == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.cases(2)
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_costs_what_the_law_says(name, rollout, batch):
    got, layers = measured(name, batch, rollout=rollout)
    forwards = 2 if rollout == "nonlinear" else 1
    want = sum(p.work(batch, 1, forwards) for p in layers)
    if rollout == "nonlinear":  # the last stage has nothing after it
        want -= 2 * batch * layers[-1].positions * layers[-1].inputs * layers[-1].outputs
    assert got == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.parametrize("batch", [128, 512])
def test_a_large_batch_costs_less_than_the_whole_gram(batch):
    got, layers = measured("dense", batch)
    want = sum(p.work(batch, 1, 1) for p in layers)
    whole = want + sum(2 * (batch**2 - gram(batch)) * (p.inputs + p.outputs) for p in layers)
    assert got == pytest.approx(want, rel=TOLERANCE)
    assert want < (1 - TOLERANCE) * whole


def test_a_step_of_full_rank_costs_what_the_law_says():
    got, layers = measured("dense", 16, rank=None)
    assert got == pytest.approx(sum(p.work(16, 9, 1) for p in layers), rel=TOLERANCE)


@pytest.mark.cases(1)
@pytest.mark.parametrize("options", [{}, {"preconditioner": "factored"}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_an_iteration_costs_a_forward_pass_and_a_weight_gradient(name, iterations, options):
    """The gradient of a metric is the first of the weight gradients, the update's own the sum of all."""
    batch = 64
    got, layers = measured(name, batch, cg_iterations=iterations, **options)
    whole = [2 * batch * p.positions * p.inputs * p.outputs for p in layers]
    want = sum(w * (2 * iterations + (1 if p.first else 2)) for w, p in zip(whole, layers, strict=True))
    want += sum(whole) if "weight_decay" in options else 0  # what it alone does to the last state
    assert got == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["convolutions", "sequence"])
def test_a_metric_costs_one_more_contraction(name):
    """Its moments are those of the gradient. Where per-sample gradients are formed, both contractions are with them."""
    got, layers = measured(name, 16, preconditioner="factored")
    want = sum(p.work(16, 1, 1, contractions=2) for p in layers)
    assert got == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("feedback", [False, True])
def test_ekfac_of_dense_layers_turns_factors_and_forms_no_column_for_its_moments(feedback, batch):
    """Turned are inputs, cotangents and the direction; products of columns are those of K alone."""
    got, layers = measured("dense", batch, preconditioner="eigen-kronecker", feedback=feedback)
    want = 0
    for p in layers:
        one, squares = p.inputs * p.outputs, p.inputs**2 + p.outputs**2
        factors = batch * squares + batch * p.outputs**2  # E[x x^T], E[h h^T] and that of the bias
        turned = batch * squares + 2 * batch * p.outputs**2  # the bias's for its moment and for K
        solved = 2 * one * (p.inputs + p.outputs) + 2 * p.outputs**2
        contracted = (2 if feedback else 1) * batch * one
        plain = batch * one * (1 if p.first else 2)
        want += 2 * (plain + contracted + factors + turned + batch * one + solved)
        if feedback:
            want += 2 * batch**2 * (one + p.outputs)
        else:
            want -= 2 * batch * p.outputs**2
    assert got == pytest.approx(want, rel=TOLERANCE)


def test_an_elementwise_metric_forms_the_columns_of_every_weight():
    got, layers = measured("sequence", 16, preconditioner="diagonal")
    assert got == pytest.approx(sum(p.work(16, 1, 1, contractions=2, form=True) for p in layers), rel=TOLERANCE)


def summed(n: int) -> int:
    """How many sums of neighbours are left of a side that is multiplied away in a second moment: 64 or more."""
    return min(n // m for m in range(1, n + 1) if n % m == 0 and (m == 1 or n // m >= 64))


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [16, 64])
def test_eigen_factored_in_the_open_loop_turns_the_direction_alone(batch):
    """Into the frame and out of it, with its moments there; one contraction serves the step and what it predicts."""
    got, layers = measured("dense", batch, preconditioner="eigen-factored", feedback=False)
    want = sum(2 * batch * p.inputs * p.outputs * (2 if p.first else 3) for p in layers)
    for p in layers:
        for n, other in ((p.inputs, p.outputs), (p.outputs, p.inputs)):
            size = 10 if p.outputs == 10 else n // 2
            want += 2 * (2 * p.inputs * p.outputs * size + n * size * summed(other))
    assert got == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("lagged", [False, True])
def test_eigen_factored_of_dense_layers_turns_inputs_and_cotangents_alone(batch, lagged):
    """Beside the factored metric's work: both sides turned for K, the direction's moments, the change turned back.

    A bias is one more input of its layer. A lagged step, as the third one is, has one product of inputs and cotangents
    less.
    """
    got, layers = measured("dense", batch, preconditioner=EigenFactored(exact_every=4 if lagged else 1))
    want = sum(p.work(batch, 1, 1, contractions=1 if lagged else 2) for p in layers)
    for p in layers:
        for n, other in ((p.inputs, p.outputs), (p.outputs, p.inputs)):
            size = 10 if p.outputs == 10 else n // 2  # parts: at most 128, and at most the other side
            want += 2 * (batch * n * size + p.inputs * p.outputs * size + n * size * summed(other))
    assert got == pytest.approx(want, rel=TOLERANCE)


def sketched(p: Product, batch: int, size: int, contractions: int = 1, columns: bool = False) -> int:
    """FLOPs of a layer whose K is from a sketch, if it has several positions: no side is as short as the sketch.

    Of columns, where they are formed for the directions, else of inputs and cotangents.
    """
    if p.positions == 1:
        return p.work(batch, 1, 1, contractions=contractions)
    one = p.inputs * p.outputs
    whole = batch * p.positions * one
    thinned = one + p.outputs * size if columns else p.positions * (p.inputs + p.outputs + size)
    total = whole * (1 if p.first else 2) + batch * size * thinned + batch**2 * size**2
    return 2 * (total + (whole + contractions * batch * one if columns else contractions * whole))


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("name", ["convolutions", "sequence"])
def test_a_sketch_costs_by_its_size(name, batch):
    """Inputs, cotangents and the Gram; the weight's gradient is the batch's own."""
    got, layers = measured(name, batch, sketch=8)
    assert got == pytest.approx(sum(sketched(p, batch, 8) for p in layers), rel=TOLERANCE)


class Words(nn.Module):
    """A table of 200 rows, a dense layer at 16 positions, and a head whose weight may be the table."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table, self.mid, self.head = nn.Embedding(200, 24), nn.Linear(24, 24), nn.Linear(24, 200, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.table(x)))).flatten(0, 1)


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_costs_its_cotangents_times_the_sketchs_size(tied, batch):
    """Its rows of signs are looked up. Of a tied table the sketches of both uses are added before their Gram."""
    torch.manual_seed(0)
    net = ddpn_fx.compile(Words(tied=tied), loss=lambda o, t: F.cross_entropy(o, t.flatten()), backend="eager")
    opt, size = ddpn_fx.DDPNOpt(net, sketch=8), 8
    x, y = torch.randint(200, (2, batch, 16))
    opt.train_step(x, y)
    layers = sum(sketched(Product(24, outputs, 16), batch, size) for outputs in (24, 200))
    table = 16 * batch * (24 * size + size**2) + (0 if tied else batch**2 * size**2)
    want = layers + 2 * table
    assert flops(lambda: opt.train_step(x, y)) == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("lagged", [False, True])
def test_a_sketch_in_a_frame_turns_signs_and_directions_alone(batch, lagged):
    """The directions of the moments and of the step come from columns at hand, and are turned by themselves.

    In a lagged step they are one, and no column is formed for it.
    """
    metric, directions = EigenFactored(exact_every=4 if lagged else 1), 1 if lagged else 2
    got, layers = measured("sequence", batch, preconditioner=metric, sketch=8)
    want = sum(sketched(p, batch, 8, contractions=directions, columns=not lagged) for p in layers)
    for p in layers:
        one = p.inputs * p.outputs
        last = p.outputs == 10  # the classes, which keep their coordinates
        for n, other in ((p.inputs, p.outputs), (p.outputs, p.inputs)):
            size = max(d for d in range(1, n + 1) if n % d == 0 and d <= min(128, other))
            if last and n == p.outputs:
                continue
            turned = batch * n * size if p.positions == 1 else directions * one * size + n * size * 8
            want += 2 * (turned + one * size + n * size * summed(other))
    assert got == pytest.approx(want, rel=TOLERANCE)
