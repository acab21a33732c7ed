"""Passes switched off by name: the same update by another graph, and every report says which are off."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx import cli
from ddpn_fx.exporting.compare import switched_off
from ddpn_fx.passes import catalogue, fuse
from ddpn_fx.passes.catalogue import CATALOGUE, optional
from tests.test_cli import models  # noqa: F401  the fixture

REWRITES = tuple(entry.name for entry in CATALOGUE if entry.part_of == "fuse")


class Net(nn.Module):
    """Something for every optional pass: a convolution, a bare product, layers of one structure."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(5, 3)
        self.weight = nn.Parameter(0.2 * torch.randn(27, 5))
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)])

    def forward(self, x):
        return self.head(self.body((self.conv(x).relu().flatten(1) @ self.weight).tanh()))


def train(off, disable=False, **options):
    """Two steps; (net, weights)."""
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randint(3, (4,))
    passes = dict.fromkeys(off, False)
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager", disable=disable, passes=passes)
    opt = ddpn_fx.DDPNOpt(net, **options)
    for _ in range(2):
        opt.train_step(x, y)
    return net, [p.detach().clone() for p in model.parameters()]


def step_of(net):
    (lowered,) = net._lowered.values()
    return lowered


def operators(net):
    return [str(n.target) for n in step_of(net).module.graph.nodes if n.op == "call_function"]


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu():
    """Rewrites for GPUs alone are held here too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "on_gpu", lambda graph: True)
        yield


@pytest.fixture(scope="module")
def whole():
    return train(())


@pytest.fixture(scope="module")
def other_whole():
    return train((), **OTHER)


OTHER = {"rank": 2, "rollout": "nonlinear", "preconditioner": "kronecker", "weight_decay": 0.1}


def assert_same(weights, others):
    for a, b in zip(weights, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", optional())
def test_without_a_pass_the_update_is_the_same_and_the_graph_is_not(name, whole):
    net, weights = train([name])
    assert_same(weights, whole[1])
    trace = step_of(net).records[0]
    if name == "derive-once":  # what it copies is what tracing would give
        assert operators(net) == operators(whole[0])
        assert trace.counts["stages copied"] == 0
        assert step_of(whole[0]).records[0].counts["stages copied"] == 3
    else:
        assert operators(net) != operators(whole[0])
    if name in ("fuse", *REWRITES) and name not in ("side-by-side", "alike"):  # which have more views
        assert len(operators(net)) > len(operators(whole[0]))


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", optional())
def test_the_same_in_another_mode(name, other_whole):
    net, weights = train([name], **OTHER)
    assert_same(weights, other_whole[1])
    # Of these the mode makes no use: no fold in a nonlinear rollout, no layout for several columns.
    assert (operators(net) == operators(other_whole[0])) == (name in ("derive-once", "fold", "channels-last"))


def test_all_at_once_untraced_and_traced(whole):
    assert_same(train(optional())[1], whole[1])
    untraced, weights = train(optional(), disable=True)
    assert step_of(untraced).module is None
    assert_same(weights, whole[1])


def test_fuse_is_all_of_its_rewrites():
    assert operators(train(["fuse"])[0]) == operators(train(REWRITES)[0])


def test_folding_is_one_solve(whole):
    def solves(net):
        return sum("cholesky_solve" in name for name in operators(net))

    assert solves(whole[0]) == 1
    stages = len(whole[0].chain.stages)
    # Backwards for b_t, forwards for the reaction to y_t (zero, but still there, in the first stage).
    assert solves(train(["fold"])[0]) == 2 * stages


def test_a_program_belongs_to_its_choice(whole):
    """Programs are kept by mode: another choice is not served one that was made for this."""
    mode = step_of(whole[0]).program.mode
    assert mode.off == ()
    assert dataclasses.replace(mode, off=("fuse",)) != mode
    assert hash(dataclasses.replace(mode, off=("fuse",))) != hash(mode)
    assert step_of(train(["share", "fuse"])[0]).program.mode.off == ("fuse", "share")


def test_true_is_the_default_also_for_a_pass_that_is_needed(whole):
    net = ddpn_fx.compile(Net(), loss=F.cross_entropy, passes={"fuse": True, "capture": True})
    assert net._options["off"] == ()


@pytest.mark.parametrize(
    ("passes", "error", "match"),
    [
        ({"fusee": False}, ValueError, r"passes=\{'fusee': False\}: there is no pass 'fusee'; did you mean 'fuse'\?"),
        ({"nonsense": True}, ValueError, r"there is no pass 'nonsense'; optional are linear-products, channels-last, "),
        ({3: False}, ValueError, "there is no pass 3; optional are"),
        ({"capture": False}, ValueError, "'capture' cannot be switched off: every other pass reads its graph; opt"),
        ({"lower": False}, ValueError, r'compile\(backend="eager"\) runs the graph as it is; optional are'),
        ({"fuse": 0}, TypeError, r"it is True \(runs\) or False \(switched off\), not a int"),
        (["fuse"], TypeError, "it must be a mapping of names to True or False"),
    ],
)
def test_what_cannot_be_switched_off_is_refused(passes, error, match):
    with pytest.raises(error, match=match) as raised:
        ddpn_fx.compile(Net(), loss=F.cross_entropy, passes=passes)
    assert str(raised.value).startswith("ddpn_fx.compile: ")


def test_the_catalogue_names_what_runs(whole):
    net, _ = whole
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names)
    assert {r.name for r in [*net.chain.records, *step_of(net).records]} <= set(names)
    assert {"fuse", "fold", "derive-once", "ghost-grams"} <= set(optional())
    assert all(entry.does.endswith(".") for entry in CATALOGUE)
    assert all(entry.part_of in ("", *names) for entry in CATALOGUE)
    with pytest.raises(AssertionError):
        catalogue.enabled("capture")


@pytest.mark.thorough
def test_explain_the_log_and_two_exports_say_what_is_off(tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="ddpn_fx"):
        net, _ = train(["share", "fold"])
    assert caplog.messages.count("switched off: fold, share") == 2, "once for the capture, once for the step"
    found = ddpn_fx.explain(net)
    assert found.off == ("fold", "share")
    assert found.programs[0].mode["off"] == ("fold", "share")
    text = str(found)
    assert "Switched off\n  fold " in text
    assert "Evaluates equal operators once" in text
    ddpn_fx.export(net, tmp_path / "a", "python")
    ddpn_fx.export(train(())[0], tmp_path / "b", "python")
    assert switched_off(tmp_path / "a") == ("fold", "share")
    assert switched_off(tmp_path / "b") == ()
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A was exported with passes switched off: fold, share\nbackward: ")
    assert "captured: no difference" in printed


def test_nothing_is_said_where_nothing_is_off(caplog, whole):
    with caplog.at_level(logging.INFO, logger="ddpn_fx"):
        train(())
    assert not any("switched off" in message for message in caplog.messages)
    assert "Switched off" not in str(ddpn_fx.explain(whole[0]))


# ---- the command line ----


def test_passes_are_listed(capsys):
    assert cli.main(["passes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fuse ") and " optional " in line for line in lines)
    assert any(line.startswith("capture ") and " required " in line for line in lines)
    assert max(map(len, lines)) <= 160


def test_the_command_line_switches_passes_off(models, capsys):  # noqa: F811
    assert cli.main(["explain", "models:with_target", "--disable-pass", "fuse", "--disable-pass", "fold"]) == 0
    assert "Switched off\n  fold " in capsys.readouterr().out
    assert cli.main(["chain", "models:with_inputs", "--disable-pass", "linear-products"]) == 0
    export = ["export", "models:with_target"]
    assert cli.main([*export, "a", "--format", "python", "--disable-pass", "dead-code"]) == 0
    assert switched_off("a") == ("dead-code",)
    capsys.readouterr()
    for command in ("chain", "explain"):
        assert cli.main([command, "models:with_target", "--disable-pass", "fusion"]) == 2
        assert "error: --disable-pass: there is no pass 'fusion'; did you mean 'fuse'?" in capsys.readouterr().err
    assert cli.main([*export, "b", "--disable-pass", "stage"]) == 2
    assert "'stage' cannot be switched off: without stages there is no control problem" in capsys.readouterr().err
