"""TORCH_LOGS shows what `explain` says as it happens, TORCH_TRACE leaves artifacts; without either nothing is made."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx import explanation
from ddpn_fx.passes import artifacts
from ddpn_fx.passes.errors import CaptureError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.bilinear = nn.Embedding(7, 5), nn.Bilinear(5, 5, 5)

    def forward(self, tokens):
        h = self.embedding(tokens).mean(1)
        return self.bilinear(h, h).tanh() @ self.embedding.weight.T


net = ddpn_fx.compile(Net(), loss=F.cross_entropy, backend="eager", passes={"share": False})
opt = ddpn_fx.DDPNOpt(net)
for batch in (6, 4):
    opt.train_step(torch.randint(7, (batch, 3)), torch.randint(7, (batch,)))
"""


def run(tmp_path, **environment):
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


SAID = (
    "switched off: share",
    "] capture: ",
    "] fuse: ",
    "Net: captured by torch.export",
    "not on the fast path: generic rule (per-sample VJP of the operator): `bilinear.default` at bilinear (Bilinear)",
    "not on the fast path: tied: embedding.weight is a control of stage 0, used again in 2",
    "step 1 for batch 6, shapes (6, 3), (6,): the first step",
    "step 2 for batch 4, shapes (4, 3), (4,): another batch shape: (6, 3) became (4, 3), (6,) became (4,)",
)
DETAILS = ("0: embedding.weight; data -> (B, 5)", "bilinear.default: rule generic", "cut: 1 live tensor")


@pytest.mark.thorough
def test_torch_logs(tmp_path):
    said = run(tmp_path, TORCH_LOGS="+ddpn_fx")
    assert [wanted for wanted in (*SAID, *DETAILS) if wanted not in said] == []
    said = run(tmp_path, TORCH_LOGS="ddpn_fx")
    assert [wanted for wanted in SAID if wanted not in said] == []
    assert [detail for detail in DETAILS if detail in said] == []


@pytest.mark.thorough
def test_torch_trace(tmp_path):
    run(tmp_path, TORCH_TRACE=str(tmp_path / "trace"))
    (file,) = (tmp_path / "trace").iterdir()
    found: dict[str, list[str]] = {}
    name = ""
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            if name.startswith("ddpn_fx_"):
                found[name][-1] += line[1:] + "\n"
            continue
        record = json.loads(line[line.index("{") :])
        name = record.get("artifact", {}).get("name", "")
        if name.startswith("ddpn_fx_"):
            found.setdefault(name, []).append("")
    assert {name: len(texts) for name, texts in found.items()} == {
        **{f"ddpn_fx_{name}": 1 for name in ("capture", "normalize", "stage", "stages")},
        **{f"ddpn_fx_{name}": 2 for name in ("trace", "fuse")},  # once a batch size
        **{f"ddpn_fx_{name}": 3 for name in ("explain", "explain_data")},
    }
    assert "torch.ops.aten.bilinear.default(" in found["ddpn_fx_capture"][0]
    assert found["ddpn_fx_trace"][0].count("\n") > found["ddpn_fx_fuse"][0].count("\n")
    assert "why the cuts are there" in found["ddpn_fx_stages"][0]
    assert "What the fast path does not cover" in found["ddpn_fx_explain"][-1]
    data = json.loads(found["ddpn_fx_explain_data"][-1])
    assert data["tied"] == {"embedding.weight": [0, 2]}
    assert data["off"] == ["share"]
    assert [program["batch"] for program in data["programs"]] == [6, 4]


def net():
    return ddpn_fx.compile(nn.Sequential(nn.Linear(4, 3)), loss=F.cross_entropy, backend="eager")


BATCH = torch.randn(5, 4), torch.randint(3, (5,))


def refuse(*_, **__):
    raise AssertionError("something was made that nobody asked for")


def test_nothing_is_made_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(explanation, "explain", refuse)
    monkeypatch.setattr(artifacts, "graph_text", refuse)
    monkeypatch.setattr("ddpn_fx.passes.log.graph_text", refuse)
    assert not logging.getLogger("ddpn_fx").isEnabledFor(logging.INFO)
    ddpn_fx.DDPNOpt(net()).train_step(*BATCH)


def test_where_torch_has_no_structured_trace(monkeypatch):
    monkeypatch.setattr(artifacts, "torch", SimpleNamespace(_logging=SimpleNamespace()))
    assert not artifacts.traced()
    ddpn_fx.DDPNOpt(net()).train_step(*BATCH)
    artifacts.artifact("anything", refuse)


def test_a_failure_is_said(caplog):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)

    refused = ddpn_fx.compile(Branch(), loss=F.cross_entropy, backend="eager")
    with caplog.at_level(logging.INFO, logger="ddpn_fx"), pytest.raises(CaptureError):
        ddpn_fx.DDPNOpt(refused).train_step(*BATCH)
    assert any(message.startswith("capture failed: CaptureError: ") for message in caplog.messages)
