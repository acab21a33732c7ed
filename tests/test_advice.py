"""Advice on the metric: said where the default is known to fall behind, once, and nowhere else."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx import advice


class Words(nn.Module):
    """A class at each of five positions, of an index."""

    def __init__(self, classes_last):
        super().__init__()
        self.table, self.head, self.classes_last = nn.Embedding(7, 6), nn.Linear(6, 7), classes_last

    def forward(self, x):
        out = self.head(self.table(x))
        return out.flatten(0, 1) if self.classes_last else out.mT


def dense(outputs, *more):
    return nn.Sequential(nn.Linear(4, 6), *more, nn.Tanh(), nn.Linear(6, outputs))


X, CLASSES, INDEX = torch.randn(8, 4), torch.arange(8) % 3, torch.arange(40).reshape(8, 5) % 7
CASES = {
    "classes": (dense(3), F.cross_entropy, X, CLASSES, ""),
    "one label": (dense(1), F.binary_cross_entropy_with_logits, X, torch.ones(8, 1), ""),
    "a loss of one's own": (dense(3), lambda z, t: (z**2).sum(1).mean(), X, CLASSES, ""),
    "labels": (dense(3), F.binary_cross_entropy_with_logits, X, torch.ones(8, 3), "many labels of a sample"),
    "regression": (dense(2), F.mse_loss, X, torch.ones(8, 2), "a regression"),
    "batch norm": (dense(3, nn.BatchNorm1d(6)), F.cross_entropy, X, CLASSES, "batch norms"),
    "both": (dense(2, nn.BatchNorm1d(6)), F.mse_loss, X, torch.ones(8, 2), "batch norms and a regression"),
    "words": (Words(False), F.cross_entropy, INDEX, INDEX, "classes at many positions of a sample"),
    "words in rows": (
        Words(True),
        lambda z, t: F.cross_entropy(z, t.flatten()),
        INDEX,
        INDEX,
        "classes at many positions of a sample",
    ),
}


@pytest.fixture(autouse=True)
def unsaid():
    advice._say.cache_clear()
    yield
    advice._say.cache_clear()


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "ddpn_fx.advice" and r.levelno == logging.WARNING]


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", CASES)
def test_it_is_said_where_it_is_known(name, caplog):
    model, loss, x, y, what = CASES[name]
    options = {"curvature": 2.0} if name == "a loss of one's own" else {}
    for _ in range(2):  # once in a process
        opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=loss, backend="eager"), **options)
        opt.train_step(x, y)
    found = said(caplog)
    assert len(found) == bool(what)
    assert all(f"with {what} preconditioner" in text and 'preconditioner="eigen-factored"' in text for text in found)
    explained = ddpn_fx.explain(opt)
    assert explained.advice == "".join(found)
    assert explained.advice in str(explained)
    assert not ddpn_fx.explain(opt.net).advice  # of no optimizer


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "options",
    [
        {"preconditioner": "eigen-factored"},
        {"preconditioner": "diagonal"},
        {"feedback": False},
        {"quu": "preconditioner"},
    ],
)
def test_nothing_is_said_of_other_choices(options, caplog):
    model, loss, x, y, _ = CASES["regression"]
    ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=loss, backend="eager"), lr=0.01, **options).train_step(x, y)
    assert not said(caplog)
