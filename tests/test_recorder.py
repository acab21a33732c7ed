"""The recorder keeps every step's statistics without reading them in between, and gives back what it borrows."""

import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ddpn_fx
from ddpn_fx.passes.mode import STATISTICS
from ddpn_fx.recorder import COLUMNS


class Board:
    """A writer of one's own."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


class Reads(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def opt():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    net = ddpn_fx.compile(model, loss=F.cross_entropy, disable=True)
    return ddpn_fx.DDPNOpt(net, lr=0.5)


def batch(size=6):
    return torch.randn(size, 4), torch.randint(3, (size,))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_step_is_in_the_file(opt, tmp_path):
    path = tmp_path / "training.csv"
    losses, others = [], []
    with ddpn_fx.Recorder(opt, path, every=2) as recorder:
        for step in range(5):
            opt.param_groups[0]["lr"] = 0.5 / (step + 1)
            losses.append(float(opt.train_step(*batch())))
            others.append({name: float(value) for name, value in opt.stats.items()})
            assert path.exists() == (step >= 1)
    opt.train_step(*batch())  # not recorded: the recorder is closed
    recorder.close()
    found = rows(path)
    assert tuple(found[0]) == COLUMNS
    assert [int(row["step"]) for row in found] == [1, 2, 3, 4, 5]
    assert [float(row["loss"]) for row in found] == losses
    assert [{name: float(row[name]) for name in STATISTICS} for row in found] == others
    assert [float(row["lr"]) for row in found] == [0.5, 0.25, 0.5 / 3, 0.125, 0.1]
    assert {row["actual_decrease"] for row in found} == {""}
    assert recorder.history == []


def test_a_file_is_continued_and_another_s_is_not_touched(opt, tmp_path):
    path = tmp_path / "training.csv"
    for _ in range(2):
        with ddpn_fx.Recorder(opt, path):
            opt.train_step(*batch())
    assert [row["step"] for row in rows(path)] == ["1", "2"]
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileExistsError, match="is no record of ddpn_fx"):
        ddpn_fx.Recorder(opt, tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"


def test_nothing_is_read_between_flushes(opt):
    opt.train_step(*batch())
    recorder = ddpn_fx.Recorder(opt, every=3)
    with Reads() as reads:
        for _ in range(2):
            recorder._after(opt, (opt, *batch()), {})
    assert reads.count == 0
    assert recorder.history == []
    recorder._after(opt, (opt, *batch()), {})
    assert len(recorder.history) == 3


def test_the_actual_decrease_is_that_of_the_same_batch(opt):
    model, (x, y) = opt.net, batch()
    with ddpn_fx.Recorder(opt, every=2, actual=True) as recorder:
        opt.train_step(x, y)
        opt.train_step(x, target=y)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        random = torch.get_rng_state()
    with torch.no_grad():
        after = F.cross_entropy(model(x), y)
    first, second = recorder.history
    assert first["actual_decrease"] != first["actual_decrease"], "evaluated on every second step alone"
    assert second["actual_decrease"] == pytest.approx(second["loss"] - float(after), abs=1e-6)
    assert second["actual_decrease"] > 0
    assert torch.equal(random, torch.get_rng_state())
    steps = int(buffers["1.num_batches_tracked"])
    assert steps == 2, "the evaluation moved the running statistics"


def test_a_writer_of_one_s_own_and_an_error_in_between(opt):
    board = Board()

    def train():
        with ddpn_fx.Recorder(opt, every=10, tensorboard=board):
            opt.train_step(*batch())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert {tag for tag, _, _ in board.scalars} == {f"ddpn_fx/{name}" for name in (*STATISTICS, "lr")}
    assert {step for _, _, step in board.scalars} == {1}


def test_tensorboard_s_files(opt, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with ddpn_fx.Recorder(opt, tensorboard=tmp_path / "runs"):
        opt.train_step(*batch())
    assert list((tmp_path / "runs").glob("events.out.tfevents.*"))


def test_arguments(opt, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="opt is a Linear"):
        ddpn_fx.Recorder(nn.Linear(1, 1))
    for every in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="it must be a positive number of steps"):
            ddpn_fx.Recorder(opt, every=every)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        ddpn_fx.Recorder(opt, tensorboard=tmp_path)
