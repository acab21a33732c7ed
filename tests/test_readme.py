"""The README's example is `examples/quickstart.py`, and it holds."""

import re
from pathlib import Path

import torch

import ddpn_fx

ROOT = Path(__file__).resolve().parent.parent


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return block


def test_the_example_is_the_quickstart():
    script = (ROOT / "examples" / "quickstart.py").read_text()
    assert script.endswith(example().split("\n\n", 1)[1])


def test_the_example_asserts_what_it_shows(capsys, monkeypatch):
    threads = torch.get_num_threads()
    compile_ = ddpn_fx.compile
    monkeypatch.setattr(ddpn_fx, "compile", lambda *a, **k: compile_(*a, backend="eager", **k))
    scope: dict = {}
    exec(example(), scope)
    assert scope["accuracy"] > 0.9
    assert "test accuracy" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_what_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (ROOT / link).exists(), link
    for target in re.findall(r"make (\w+)", text):
        assert f"{target}:" in (ROOT / "Makefile").read_text()
