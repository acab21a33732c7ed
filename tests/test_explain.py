"""`explain` says what the fast path leaves out and what triggered a compile; a failed one leaves what it reached."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx import cli
from ddpn_fx.exporting.compare import compare
from tests.test_cli import models  # noqa: F401  the fixture


class Hard(nn.Module):
    """Tied weights, an operator without a rule (bilinear), a frozen layer, and one that nothing reads."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.bilinear = nn.Bilinear(5, 5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.idle = nn.Linear(3, 3)

    def forward(self, tokens):
        h = self.embedding(tokens).mean(1)
        return self.frozen(self.bilinear(h, h).tanh()) @ self.embedding.weight.T


class Mixing(nn.Module):
    """Samples mix by a softmax over the batch: only plain gradient steps can train it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x).softmax(dim=0)


class Fixed(nn.Module):
    """The batch size is written into it: no capture."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def tokens(batch):
    return torch.randint(7, (batch, 3)), torch.randint(7, (batch,))


@pytest.fixture(scope="module")
def explained():
    torch.manual_seed(0)
    net = ddpn_fx.compile(Hard(), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, params=[net.bilinear.weight, net.embedding.weight])
    opt.train_step(*tokens(6))
    opt.train_step(*tokens(4))
    net.eval()
    opt.train_step(*tokens(6))
    ddpn_fx.DDPNOpt(net, momentum=0.9).train_step(*tokens(6))
    return net, ddpn_fx.explain(opt)


def test_ties_generic_rules_and_a_second_batch_size_are_named(explained):
    _, found = explained
    assert found.tied == {"embedding.weight": (0, 2)}
    (generic,) = found.generic
    assert "bilinear" in generic
    assert "test_explain.py" in generic
    triggers = [program.trigger for program in found.programs]
    assert triggers[0] == "the first step"
    assert triggers[1] == "another batch shape: (6, 3) became (4, 3), (6,) became (4,)"
    assert [program.batch for program in found.programs] == [6, 4, 6, 6]
    text = str(found)
    for wanted in (
        "tied: embedding.weight is a control of stage 0, used again in 2",
        "generic rule (per-sample VJP of the operator): `bilinear.default` at bilinear (Bilinear)",
        "2. batch 4, shapes (4, 3), (4,): another batch shape",
    ):
        assert wanted in text


def test_other_triggers_and_limits(explained):
    _, found = explained
    assert found.programs[2].trigger == "the model changed: training was True, is False"
    assert "another mode of the optimizer: group, momentum" in found.programs[3].trigger
    assert found.frozen == ("frozen.weight", "frozen.bias")
    assert found.unused == ("idle.weight", "idle.bias")
    assert "bilinear.bias" in found.outside
    assert [each.name for each in found.passes] == ["capture", "normalize", "stage"]
    assert [each.name for each in found.programs[0].passes] == ["trace", "fuse"]
    assert all(each.seconds > 0 for each in found.passes)
    assert "-1 aten.matmul.default" in found.passes[1].rewrote
    assert "in no group of the optimizer, so fixed: bilinear.bias" in str(found)
    assert dataclasses.asdict(found)["stages"][0]["cut"].startswith("1 live tensor")


def test_before_anything_was_captured():
    found = ddpn_fx.explain(ddpn_fx.compile(nn.Linear(2, 2), loss=F.mse_loss))
    assert "not captured" in str(found)
    assert "none yet" in str(found)
    with pytest.raises(TypeError, match="not a Linear"):
        ddpn_fx.explain(nn.Linear(2, 2))


def test_a_plain_model_has_no_limits():
    net = ddpn_fx.compile(nn.Sequential(nn.Linear(4, 3)), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    opt.train_step(torch.randn(5, 4), torch.randint(3, (5,)))
    assert str(ddpn_fx.explain(opt)).endswith("What the fast path does not cover\n  nothing")


def test_what_was_reached_is_exported(tmp_path, monkeypatch):
    from ddpn_fx.passes import pipeline
    from ddpn_fx.passes.errors import StagingError

    def refuse(*_):
        raise StagingError("no cut at fc (Linear), model.py:3: self.fc(x)")

    monkeypatch.setattr(pipeline, "stage", refuse)
    net = ddpn_fx.compile(nn.Sequential(nn.Linear(4, 3)), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    with pytest.raises(StagingError):
        opt.train_step(torch.randn(5, 4), torch.randint(3, (5,)))
    written = ddpn_fx.export(net, tmp_path)
    names = {path.name for path in written}
    assert {"captured.py", "captured.svg", "index.html", "error.txt"} <= names
    assert "aten.linear.default" in (tmp_path / "captured.py").read_text()
    error = (tmp_path / "error.txt").read_text()
    assert "failed in stage." in error
    assert "model.py:3" in error
    assert "failed in stage" in written.skipped["step"]
    assert "stage: StagingError: no cut" in ddpn_fx.explain(opt).failed
    monkeypatch.undo()
    opt.train_step(torch.randn(5, 4), torch.randint(3, (5,)))
    assert ddpn_fx.explain(opt).failed == ""


def test_a_refused_capture_leaves_the_error(tmp_path):
    net = ddpn_fx.compile(Fixed(), loss=F.cross_entropy, backend="eager")
    with pytest.raises(ddpn_fx.CaptureError):
        ddpn_fx.DDPNOpt(net).train_step(torch.randn(5, 4), torch.randint(3, (5,)))
    written = ddpn_fx.export(net, tmp_path, "all")
    assert {path.name for path in written} >= {"index.md", "error.txt", "index.html"}
    assert "test_explain.py" in (tmp_path / "error.txt").read_text()
    assert ddpn_fx.explain(net).failed.startswith("capture: CaptureError")


def test_a_mixing_model_still_has_a_chain(tmp_path):
    net = ddpn_fx.compile(Mixing(), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    with pytest.raises(ddpn_fx.StagingError, match="mixes"):
        opt.train_step(torch.randn(5, 4), torch.randint(3, (5,)))
    assert "softmax" in ddpn_fx.explain(opt).mixing
    assert {"captured.py", "stage0.py", "chain.txt"} <= {p.name for p in ddpn_fx.export(opt, tmp_path)}


# ---- two exports ----


def test_two_exports_are_compared(tmp_path, capsys):
    def export(name, *layers):
        net = ddpn_fx.compile(nn.Sequential(*layers), loss=F.cross_entropy, backend="eager")
        net.capture(torch.randn(5, 4), torch.randint(3, (5,)), with_target=True)
        ddpn_fx.export(net, tmp_path / name, "python")

    export("a", nn.Linear(4, 3), nn.ReLU())
    export("b", nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    found = {each.name: each for each in compare(tmp_path / "a", tmp_path / "b")}
    assert found["captured"].operators == "+1 aten.linear.default, -1 aten.relu.default, +1 aten.tanh.default"
    assert any(line.startswith("+    tanh = aten.tanh") for line in found["captured"].lines)
    assert found["stage1"].missing == "A"
    assert [str(each).partition(": ")[2] for each in compare(tmp_path / "a", tmp_path / "a")] == ["no difference"] * 2
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "stage1: not in A" in printed
    assert "--- A/captured.py" in printed
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
    assert "nowhere' is not a folder" in capsys.readouterr().err
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "holds no graph" in capsys.readouterr().err


# ---- the command line ----


def test_explain_prints_the_report(models, capsys):  # noqa: F811
    assert cli.main(["explain", "models:with_target"]) == 0
    printed = capsys.readouterr().out
    assert "Sequential: captured by torch.export" in printed
    assert "1. batch 6, shapes (6, 4), (6,): the first step" in printed


def test_a_failing_export_says_where_what_was_reached_is(models, capsys):  # noqa: F811
    assert cli.main(["export", "models:Branch", "out", "--input", "6,4", "--format", "python", "html"]) == 1
    printed = capsys.readouterr()
    assert "cannot train models:Branch" in printed.err
    assert "what was reached is in out" in printed.err
    assert (models / "out" / "error.txt").exists()
    assert cli.main(["explain", "models:Branch", "--input", "6,4"]) == 1
    assert "The latest compilation failed in capture" in capsys.readouterr().out
    assert cli.main(["export", "models:with_target", "new", "--format", "pdf"]) == 2
    assert "there is no format 'pdf'" in capsys.readouterr().err
