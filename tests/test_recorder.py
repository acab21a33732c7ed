"""The recorder keeps every step's statistics without reading them in between, and gives back what it borrows."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ddpn_fx
from ddpn_fx import cli
from ddpn_fx.passes.figures import FIGURES
from ddpn_fx.passes.mode import STATISTICS
from ddpn_fx.records import COLUMNS, STAGE_COLUMNS, read


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
        moves = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None
        self.count += moves or func is torch.ops.aten._local_scalar_dense.default
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
    with Reads() as reads:
        float(opt.stats["loss"])
    assert reads.count == 1, "a reading would have been seen"
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


# ---- the stages ----


def test_the_figures_of_every_stage_are_those_of_the_steps_that_are_due(opt, tmp_path):
    path, want = tmp_path / "training.csv", {}
    with ddpn_fx.Recorder(opt, path, every=2, stages=True):
        for step in range(1, 6):
            opt.train_step(*batch())
            assert bool(opt.stage_stats) == (step % 2 == 0), "a step between two records is one without figures"
            if opt.stage_stats:
                want[step] = {name: value.tolist() for name, value in opt.stage_stats.items()}
    opt.train_step(*batch())
    assert opt.stage_stats == {}, "the recorder is closed"
    found = rows(tmp_path / "training.stages.csv")
    assert tuple(found[0]) == STAGE_COLUMNS
    stages = len(opt.net.chain.stages)
    assert [(int(row["step"]), int(row["stage"])) for row in found] == [(s, t) for s in (2, 4) for t in range(stages)]
    assert [row["controls"] for row in found[:stages]] == ["0.weight 0.bias", "1.weight 1.bias", "3.weight 3.bias"]
    for row in found:
        assert all(float(row[name]) == want[int(row["step"])][name][int(row["stage"])] for name in FIGURES)
    assert [int(row["step"]) for row in rows(path)] == [1, 2, 3, 4, 5], "the record of the steps is as without stages"
    back = read(path)
    assert [record["loss"] for record in back.steps] == [float(row["loss"]) for row in rows(path)]
    assert back.stages[1]["controls"] == "1.weight 1.bias"
    assert back.stages[4]["k_norm"] == want[4]["k_norm"][1]


def test_stages_in_memory_and_on_a_board(opt):
    board = Board()
    with (
        ddpn_fx.Recorder(opt, every=1, stages=True) as recorder,
        ddpn_fx.Recorder(opt, every=2, tensorboard=board, stages=True),
    ):
        for _ in range(2):
            opt.train_step(*batch())
    assert [(record["step"], record["stage"]) for record in recorder.stages] == [
        (s, t) for s in (1, 2) for t in range(3)
    ]
    assert len(recorder.history) == 2
    shown = {tag: (value, step) for tag, value, step in board.scalars if "stage " in tag}
    assert set(shown) == {f"ddpn_fx/stage {t}/{name}" for t in range(3) for name in FIGURES}
    assert shown["ddpn_fx/stage 2/k_norm"] == (recorder.stages[5]["k_norm"], 2)


def test_stages_of_an_open_loop_have_no_spectrum(opt, tmp_path):
    opt = ddpn_fx.DDPNOpt(opt.net, feedback=False)
    board, path = Board(), tmp_path / "training.csv"
    with ddpn_fx.Recorder(opt, path, every=1, tensorboard=board, stages=True):
        opt.train_step(*batch())
    (first, *_) = rows(tmp_path / "training.stages.csv")
    assert first["effective_dimension"] == ""
    assert float(first["k_norm"]) > 0
    assert not any(tag.endswith("effective_dimension") for tag, _, _ in board.scalars)
    assert read(path).stages[0]["gram_max"] != read(path).stages[0]["gram_max"]


def test_a_step_with_figures_reads_nothing_from_its_device():
    """The whole step: its program, and what the recorder keeps of it until it is flushed."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    with ddpn_fx.Recorder(opt, every=2, stages=True) as recorder:
        recorder.flush = lambda: None  # what is asked for
        for _ in range(2):
            opt.train_step(*batch())
        with Reads() as reads:
            for _ in range(2):
                opt.train_step(*batch())
        assert reads.count == 0
        assert [step.figures is not None for step in recorder._pending] == [False, True, False, True]
        del recorder.flush
    assert len(recorder.stages) == 4


def test_a_stages_file_of_another_is_not_touched(opt, tmp_path):
    (tmp_path / "training.stages.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileExistsError, match=r"training.stages.csv' is no record of ddpn_fx"):
        ddpn_fx.Recorder(opt, tmp_path / "training.csv", stages=True)
    ddpn_fx.Recorder(opt, tmp_path / "training.csv").close()


# ---- the picture ----


def lines_of(monkeypatch):
    """The figure that is drawn, caught on its way to the file."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    return drawn


@pytest.mark.cases(1)
@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_picture_of_training(opt, tmp_path, monkeypatch, where):
    drawn = lines_of(monkeypatch)
    path = tmp_path / "training.csv" if where == "file" else None
    with ddpn_fx.Recorder(opt, path, every=2, actual=True, stages=True) as recorder:
        with pytest.raises(ValueError, match="nothing was recorded yet"):
            recorder.picture(tmp_path / "empty.png")
        for _ in range(5):
            opt.train_step(*batch())
        recorder.picture(tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    panels = {panel.get_title(): panel for panel in figure.axes}
    loss = panels["loss before the step"].lines[0]
    assert list(loss.get_xdata()) == [1, 2, 3, 4, 5], "what was kept and not yet written is drawn too"
    predicted, actual = panels["decrease of the loss on the batch"].lines
    assert (len(predicted.get_xdata()), list(actual.get_xdata())) == (5, [2, 4])
    assert len(panels["effective dimension"].lines) == 3
    assert [len(line.get_xdata()) for line in panels["|feedback part of du|"].lines] == [0, 2, 2], "y_0 is 0"


@pytest.mark.thorough
def test_the_example_of_the_documentation(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    script = Path(__file__).resolve().parent.parent / "examples" / "watch.py"
    command = [sys.executable, str(script), "--steps", "4", "--every", "2", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {path.name for path in (tmp_path / "runs").iterdir()}
    assert found == {"training.csv", "training.stages.csv", "training.png"}
    assert len(rows(tmp_path / "runs" / "training.stages.csv")) == 2 * 4


def test_a_picture_on_the_command_line(opt, tmp_path, capsys, monkeypatch):
    lines_of(monkeypatch)
    path, picture = tmp_path / "training.csv", tmp_path / "training.svg"
    with ddpn_fx.Recorder(opt, path):
        opt.train_step(*batch())
    assert cli.main(["picture", str(path), str(picture)]) == 0
    assert "<svg" in picture.read_text()
    assert cli.main(["picture", str(path), str(tmp_path / "training.txt")]) == 2
    assert "has the ending 'txt'; matplotlib writes" in capsys.readouterr().err
    assert cli.main(["picture", str(tmp_path / "none.csv"), str(picture)]) == 2
    assert "error: there is no file" in capsys.readouterr().err
    assert cli.main(["picture", str(picture), str(picture)]) == 2
    assert "training.svg' is no record of ddpn_fx" in capsys.readouterr().err


def test_a_picture_without_matplotlib_and_without_a_record(opt, tmp_path, monkeypatch, capsys):
    path = tmp_path / "training.csv"
    with ddpn_fx.Recorder(opt, path) as recorder, ddpn_fx.Recorder(opt, tensorboard=Board()) as elsewhere:
        opt.train_step(*batch())
        with pytest.raises(ValueError, match="the records went to TensorBoard alone; give the recorder a path="):
            elsewhere.picture(tmp_path / "training.png")
        for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr("importlib.import_module", refuse)
        with pytest.raises(ModuleNotFoundError, match=r'matplotlib is not installed: pip install "ddpn-fx\[demo\]"'):
            recorder.picture(tmp_path / "training.png")
        assert cli.main(["picture", str(path), str(tmp_path / "training.png")]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err


def refuse(name, package=None):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_arguments(opt, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="opt is a Linear"):
        ddpn_fx.Recorder(nn.Linear(1, 1))
    for every in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="it must be a positive number of steps"):
            ddpn_fx.Recorder(opt, every=every)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        ddpn_fx.Recorder(opt, tensorboard=tmp_path)
