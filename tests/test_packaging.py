"""The package as a user installs it: one name for the compiler, few dependencies, complete archives."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ddpn_fx
import ddpn_fx.passes

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (ROOT / "passes").is_dir()  # an sdist holds ddpn_fx/passes as a folder and no passes/
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="an unpacked sdist, not a checkout")


def python(*args, cwd, path=None):
    """Run a fresh interpreter, with `path` in front of whatever is installed."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def names(folder):
    """The source files of the package, as paths from its parent."""
    found = {
        p.relative_to(folder.parent).as_posix() for sub in (folder, folder / "passes") for p in sub.rglob("*.py")
    } | {f"{folder.name}/py.typed"}
    assert f"{folder.name}/passes/__init__.py" in found
    return found


@needs_checkout
def test_the_compiler_has_one_name():
    result = python("-c", "import passes", cwd=ROOT)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "ddpn_fx.passes" in last


@needs_checkout
def test_the_link_resolves():
    link = ROOT / "ddpn_fx" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "passes")
    assert link.resolve() == ROOT / "passes"
    assert Path(ddpn_fx.passes.__file__).resolve() == ROOT / "passes" / "__init__.py"


def test_version_matches_the_metadata():
    assert ddpn_fx.__version__ == importlib.metadata.version("ddpn-fx")


def test_runtime_dependencies_are_torch_and_networkx():
    requires = importlib.metadata.requires("ddpn-fx") or []
    runtime = {re.match(r"[\w.-]+", line)[0].lower() for line in requires if "extra ==" not in line}
    assert runtime == {"torch", "networkx"}


def test_import_needs_no_extra():
    """The face and its command line load where only the runtime dependencies are installed."""
    blocked = ["sklearn", "matplotlib", "tqdm", "hypothesis", "pytest"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import ddpn_fx, ddpn_fx.passes, ddpn_fx.cli"
    result = python("-W", "ignore", "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_inductor_is_imported_with_the_first_program():
    """It takes a second, and nothing of it is needed without a backend, or with another one."""
    code = (
        "import sys, ddpn_fx; ddpn_fx.compile, ddpn_fx.DDPNOpt; assert 'torch._inductor.codecache' not in sys.modules"
    )
    result = python("-W", "ignore", "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_archives_hold_the_compiler(tmp_path):
    """The wheel and the sdist hold the same sources as the checkout, and the wheel imports from where it lies."""
    pytest.importorskip("hatchling")
    result = python("-m", "hatchling", "build", "-d", str(tmp_path), "-t", "wheel", "-t", "sdist", cwd=ROOT)
    assert result.returncode == 0, result.stderr

    expected = names(ROOT / "ddpn_fx")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())
        assert not any(name.startswith(("passes/", "tests/")) for name in archive.namelist())
        archive.extractall(tmp_path / "wheel")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert expected <= {name.partition("/")[2] for name in archive.getnames()}

    code = "import ddpn_fx.passes; print(ddpn_fx.passes.__file__)"
    result = python("-c", code, cwd=tmp_path, path=tmp_path / "wheel")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == tmp_path / "wheel" / "ddpn_fx" / "passes" / "__init__.py"
