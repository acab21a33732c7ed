"""The command line: help, errors with the way out, and each command on a small model."""

import json
import re
import subprocess
import sys

import pytest
import torch

from ddpn_fx import cli

MODELS = """
import torch
from torch import nn


def make():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def with_inputs():
    return make(), torch.randn(6, 4)


def with_target():
    return make(), torch.randn(6, 4), torch.randint(3, (6,))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, indices):
        return self.head(self.embedding(indices).mean(1))


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return nn.functional.cross_entropy(self.net(x), torch.zeros(x.shape[0], dtype=torch.int64))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x), x


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


def sized(width):
    return nn.Linear(4, width)


def broken():
    raise RuntimeError("no weights here")


model = make()
number = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with models.py, as the working directory; what an import leaves behind is taken back."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "faulty.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("models", "faulty", "needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("models", "faulty", "needy"):
        sys.modules.pop(name, None)


def leave(argv, capsys):
    """Run a command that argparse ends; its status and what it printed."""
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    return ended.value.code, capsys.readouterr()


@pytest.mark.parametrize("command", [[], ["demo"], ["chain"], ["export"]])
def test_help_explains_with_examples(command, capsys):
    status, printed = leave([*command, "--help"], capsys)
    assert status == 0
    assert "examples:" in printed.out
    assert f"  ddpn_fx {' '.join(command)}" in printed.out
    assert max(map(len, printed.out.splitlines())) <= 120


def test_version(capsys):
    status, printed = leave(["--version"], capsys)
    assert status == 0
    assert re.fullmatch(r"ddpn_fx \S+.*, torch \d\S+, Python 3\.\S+\n", printed.out)


def test_the_module_of_the_command_line_imports_no_torch():
    code = f"import runpy, sys; runpy.run_path({cli.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--seeds", "0"], "'0' is not a positive whole number"),
        (["demo", "--steps", "1.5"], "'1.5' is not a positive whole number"),
        (["chain"], "required: MODULE:FACTORY"),
        (["chain", "models"], "'models' is not MODULE:FACTORY: write for example"),
        (["chain", "models:"], "'models:' is not MODULE:FACTORY"),
        (["chain", "models:make", "--input", "8,x"], "'8,x' is not a shape: write positive sizes"),
        (["chain", "models:make", "--input", "8,0"], "'8,0' is not a shape"),
        (["chain", "--input", "8,4", "models:make"], "--input comes after MODULE:FACTORY"),
        (["chain", "models:make", "--dtype", "complex"], "invalid choice: 'complex'"),
        (["export", "models:make"], "required: DIR"),
        (["export", "models:make", "out", "--target", "labels:0"], "neither a shape, as in 8,784, nor labels:N"),
        (["export", "models:make", "out", "--loss", "hinge"], "invalid choice: 'hinge'"),
    ],
)
def test_a_command_that_cannot_be_parsed(argv, message, capsys):
    status, printed = leave(argv, capsys)
    assert status == 2
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chain", "nowhere:make"], "no module 'nowhere' from here"),
        (["chain", "nowhere.py:make"], "there is no file nowhere.py"),
        (["chain", "faulty:make"], "importing faulty failed: division by zero (ZeroDivisionError"),
        (["chain", "faulty.py:make"], "importing faulty.py failed: division by zero"),
        (["chain", "needy:make"], "importing needy failed: No module named 'a_package_that_nobody_has'"),
        (["chain", "models:mak"], "there is no 'mak' in models: did you mean make?"),
        (["chain", "models.py:zzzzz"], "it defines make, with_inputs, with_target, Net"),
        (["chain", "models:sized"], "FACTORY is called without arguments"),
        (["chain", "models:broken"], "broken() in models failed: no weights here"),
        (["chain", "models:number"], "number in models gives int; it must give an nn.Module"),
        (["chain", "models:make"], "describe them, batch first, for example: --input 8,784"),
        (["chain", "models:with_inputs", "--dtype", "float64"], "give --input too"),
        (["export", "models:make", "out", "--input", "6,9"], "cannot run models:make: mat1 and mat2 shapes"),
        (["export", "models:Pair", "out", "--input", "6,4"], "the model returns tuple, not a tensor"),
        (
            ["export", "models:make", "out", "--input", "6,4", "--loss", "mse", "--target", "labels:3"],
            "labels:3 is for cross_entropy; --loss mse needs a SHAPE",
        ),
        (
            ["export", "models:OwnLoss", "out", "--input", "6,4", "--loss", "none", "--target", "6"],
            "--loss none says that the model returns it",
        ),
    ],
)
def test_a_user_s_mistake_is_one_line_without_a_traceback(models, argv, message, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"ddpn_fx {argv[0]}: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (models / "out").exists()


def test_traceback_shows_where(models):
    with pytest.raises(cli.CommandError) as error:
        cli.main(["chain", "models:broken", "--traceback"])
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "argv",
    [
        ["models:make", "--input", "6,4"],
        ["models.py:make", "--input", "6,4", "--dtype", "float64"],
        ["models:model", "--input", "6,4"],
        ["models:with_inputs"],
        ["models:with_target"],
        ["models:Net", "--input", "6,5", "--dtype", "int64"],
        ["models:OwnLoss", "--input", "6,4", "--loss", "none"],
    ],
)
def test_chain_prints_the_stages(models, argv, capsys):
    assert cli.main(["chain", *argv]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    names = {"models:Net": ("embedding", "head"), "models:OwnLoss": ("net.0", "net.2")}.get(argv[0], ("0", "2"))
    assert all(name in printed.out for name in names)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "argv",
    [
        ["models:with_target"],
        ["models:with_inputs"],
        ["models:make", "--input", "6,4", "--target", "labels:2"],
        ["models:make", "--input", "6,4", "--target", "6,3", "--loss", "mse"],
        ["models:make", "--input", "6,4", "--loss", "bce"],
        ["models:OwnLoss", "--input", "6,4", "--loss", "none"],
    ],
)
def test_export_writes_the_graphs(models, argv, capsys):
    where = models / "graphs"
    assert cli.main(["export", argv[0], str(where), *argv[1:]]) == 0
    assert str(where) in capsys.readouterr().out
    assert list(where.rglob("*.py"))


def test_export_into_a_file_says_so(models, capsys):
    assert cli.main(["export", "models:with_target", "models.py"]) == 2
    assert "models.py: " in capsys.readouterr().err


def test_a_model_that_cannot_be_captured_is_named(models, capsys):
    assert cli.main(["chain", "models:Branch", "--input", "6,4"]) == 1
    printed = capsys.readouterr()
    assert "cannot compile models:Branch: " in printed.err
    assert "Traceback" not in printed.err


def test_demo_quick_writes_its_files(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    assert cli.main(["demo", "--quick", "--steps", "3", "--out", str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    for name in ("accuracy.png", "results.json", "graphs"):
        assert str(tmp_path / "out" / name) in printed
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out" / "graphs").rglob("*.py"))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["steps"] == 3
    assert record["seeds"] == [0]
    methods = [(row["method"], row["lr"]) for row in record["results"]]
    assert methods == [(name, lr) for name in ("DDPNOpt", "SGD") for lr in (0.1, 0.3, 1, 3, 10)] + [
        ("Adam", lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ]
    assert all(0 <= row["mean"] <= 100 for row in record["results"])
    assert all(f"| {row['method']:<7} | {row['lr']:<9g} |" in printed for row in record["results"])
    assert str(tmp_path) not in json.dumps(record)


def test_demo_without_an_extra_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == 'ddpn_fx demo: error: tqdm is not installed: pip install "ddpn-fx[demo]"\n'


def test_a_training_that_diverges_is_called_so(tmp_path):
    pytest.importorskip("matplotlib")
    from ddpn_fx.demo import report
    from ddpn_fx.demo.compare import Run, Summary

    good, bad = Run(0, 95.0, 0.1, diverged=False), Run(1, 10.0, float("nan"), diverged=True)
    summaries = [
        Summary("SGD", 0.1, (good, good)),
        Summary("SGD", 1, (good, bad)),
        Summary("SGD", 3, (bad, bad)),
        Summary("Adam", 3, (good,)),
    ]
    assert [str(summary) for summary in summaries] == ["95.0 ± 0.0", "diverged (1 of 2)", "diverged", "95.0"]
    report.write_json(tmp_path / "results.json", {"results": [summary.as_dict() for summary in summaries]})
    assert json.loads((tmp_path / "results.json").read_text())["results"][1]["loss"] == [0.1, None]
    report.write_picture(tmp_path / "accuracy.png", summaries)
    assert (tmp_path / "accuracy.png").stat().st_size > 0


def test_python_m(models):
    run = subprocess.run(
        [sys.executable, "-m", "ddpn_fx", "chain", "nowhere:make"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith("ddpn_fx chain: error: no module 'nowhere' from here")
