"""The benchmarks' baselines are torch's own optimizers."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

aten = torch.ops.aten


@pytest.mark.parametrize("rule", ["SGD", "momentum", "Adam"])
def test_a_compiled_baseline_is_torchs_optimizer(rule, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples/bench"))
    sys.modules.pop("step", None)
    from step import UPDATES, compiled_baseline
    from target import BASELINES

    assert BASELINES.keys() == UPDATES.keys()

    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    theirs = copy.deepcopy(ours)
    (optimizer,) = BASELINES[rule](theirs, 0.1)
    step = compiled_baseline(ours, F.cross_entropy, "eager", rule, 0.1)
    for _ in range(4):
        x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
        optimizer.zero_grad()
        want = F.cross_entropy(theirs(x), y)
        want.backward()
        optimizer.step()
        torch.testing.assert_close(step(x, y), want.detach())
    for got, want in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want)


def test_a_compiled_baseline_can_be_replayed_by_cuda_graphs(monkeypatch):
    """Which takes writes into inputs that stay where they are, and gives an answer that the next step writes over."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples/bench"))
    from step import compiled_baseline

    fixed = {}

    def backend(graph, inputs):
        written = {n.args[0] for n in graph.graph.nodes if n.target in (aten.copy_.default, aten.add_.Tensor)}
        for node in graph.graph.find_nodes(op="placeholder"):
            kind = node.meta["tensor_dict"].get("_dynamo_static_input_type")
            fixed.setdefault((node in written, kind is not None), []).append(node.name)
        return graph

    step = compiled_baseline(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), F.cross_entropy, backend, "Adam")
    x, y = torch.randn(8, 5), torch.randint(4, (8,))
    first = step(x, y)
    assert first.data_ptr() != step(x, y).data_ptr()
    assert len(fixed[True, True]) == 3 * 4 + 3 + 1  # weights and moments, running statistics, the count of steps
    assert (True, False) not in fixed
    assert {name.strip("_").split("_")[-1] for name in fixed[False, False]} == {"x", "y"}


def test_times_on_another_device_go_with_recorded_trainings(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples/bench"))
    import target

    trainings, times = tmp_path / "trainings.json", tmp_path / "times.json"
    cells = {"a": {"task": "mnist-32", "method": "SGD", "seed": 0, "curve": [1]}}
    trainings.write_text(json.dumps({"cells": cells, "step_ms": {"task": {"SGD": 1.0}}}))
    record = target.Record(times, trainings)
    assert record.cells == cells
    assert not record.times
    record.times["task"] = {"SGD": 0.25}
    record.write(tasks={})
    found = json.loads(times.read_text())
    assert "cells" not in found
    assert found["step_ms"] == {"task": {"SGD": 0.25}}
    again = target.Record(times, trainings)
    assert (again.cells, again.times) == (record.cells, record.times)
    (task,) = (t for t in target.TASKS if t.key == "mnist-128")
    with pytest.raises(SystemExit, match="has no training 'mnist-128 .* 800 steps .* SGD"):
        target.Bench(task, None, again).cell("SGD", 0.1, 0)


def test_schedules_average_the_weights_and_let_the_step_size_fall(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples/bench"))
    import schedules
    from tasks import Loaded, Task

    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(64, 3, generator=generator), torch.randn(64, 1, generator=generator)
    part = x, x @ torch.ones(3, 1) + noise

    def load(folder):
        return Loaded(lambda: nn.Linear(3, 1), lambda *_: [tuple(t[i::40][:1] for t in part) for i in range(40)],
                      (part, part), lambda o, t: float(F.mse_loss(o, t)))  # fmt: skip

    task = Task("line", "a line through noise", load, F.mse_loss, 1, 40, {"SGD": (9.0,), "momentum": (0.05,)}, False)
    record = schedules.Record(tmp_path / "found.json")
    runs = {kind: schedules.Scheduled(task, None, record, kind) for kind in schedules.KINDS}
    assert runs["constant"].task.grids == {"momentum": (0.05, pytest.approx(0.15))}
    ends = {kind: run.cell("momentum", 0.05, 0)["curve"][-1][2] for kind, run in runs.items()}
    assert len(record.cells) == 3
    # A sample a step: at a constant step size the end is noise. Both others have less of it.
    assert ends["averaged"] < ends["constant"]
    assert ends["decayed"] < ends["constant"]


def test_the_page_of_schedules_counts_what_is_ahead(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples/bench"))
    import schedules

    rows = {schedules.DEFAULT: {"end": 97.0, "steps": None}, schedules.EIGEN: {"end": 98.0, "steps": 0.5}}
    figures = {kind: {"rival": "Adam 0.01", "target": 97.5, "rows": rows} for kind in schedules.KINDS}
    tasks = {t.key: t for t in schedules.TASKS}
    found = {"mnist-128": figures}
    text = schedules.table(found, tasks)
    assert "| mnist-128, % | constant " in text
    assert "| Adam 0.01: 97.50 " in text
    default, eigen = schedules.verdict(found, tasks)
    assert default.endswith("constant 0 and 0, averaged 0 and 0, decayed 0 and 0.")
    assert eigen.endswith("constant 1 and 1, averaged 1 and 1, decayed 1 and 1.")
    default, eigen = schedules.verdict({"gpt-32": figures}, tasks)  # nats: less is better
    assert default.endswith("constant 1 and 0, averaged 1 and 0, decayed 1 and 0.")
    assert eigen.endswith("constant 0 and 1, averaged 0 and 1, decayed 0 and 1.")
