"""The paper's experiments as commands: they run, write what they say, and go on where they stopped."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

MODULES = ("arena", "claim", "common", "methods", "record")
FOLDER = Path(__file__).resolve().parent.parent / "examples" / "paper"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run a script of the folder with these arguments; its exit status."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *arguments):
        for module in MODULES:
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), "--backend", "eager", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        for module in MODULES:
            sys.modules.pop(module, None)
        return ended.value.code

    return run


def test_table_3_goes_on_where_it_stopped(command, tmp_path, capsys):
    part = ("--tasks", "wine", "--steps", "3", "--seeds", "2", "--methods")
    command("table3.py", *part, "SGD")
    first = json.loads((tmp_path / "table3.json").read_text())["cells"]
    assert len(first) == 2 * 3 + 2  # two seeds at each of three step sizes, and two at the best
    assert {c["steps"] for c in first.values()} == {3}
    assert sum(c["search"] for c in first.values()) == 6
    command("table3.py", *part, "SGD", "DDPNOpt")
    second = json.loads((tmp_path / "table3.json").read_text())["cells"]
    assert len(second) == 2 * len(first)
    assert {key: second[key] for key in first} == first  # with their seconds: nothing was trained again
    page = (tmp_path / "table3.md").read_text()
    assert "not run: digits" in page
    assert page.count("±") > 2
    assert (tmp_path / "table3.png").stat().st_size > 1000
    capsys.readouterr()
    assert command("table3.py", *part, "Adagrad") == 2
    assert "no row 'Adagrad'" in capsys.readouterr().err


def test_the_step_size_is_the_best_on_the_validation_split(command, tmp_path):
    command("table3.py", "--tasks", "wine", "--steps", "40", "--seeds", "1", "--methods", "RMSprop")
    cells = list(json.loads((tmp_path / "table3.json").read_text())["cells"].values())
    found: dict = {}
    for cell in cells:
        if cell["search"]:
            found.setdefault(cell["value"], []).append(cell["accuracy"])
    (reported,) = {c["value"] for c in cells if not c["search"]}
    assert sum(found[reported]) == max(map(sum, found.values()))
