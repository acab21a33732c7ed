"""What all tests share: torch's threads and cache, hypothesis profiles, the markers, the data folder."""

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before torch is imported. The cache outlives a run, so that the second run compiles little; it is ignored by git.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers on two cores costs more than it gives

import torch  # noqa: E402

# The workers of pytest-xdist share the cores: one thread each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

hypothesis.settings.register_profile(
    "dev",
    deadline=None,  # the first example compiles
    max_examples=10,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("dev"), derandomize=True, database=None, print_blob=True
)
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("dev"), max_examples=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    _spread(items)
    cuda = [item for item in items if item.get_closest_marker("cuda")]
    if cuda and not torch.cuda.is_available():
        for item in cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _spread(items):
    """Of the quick cases of a test that is marked ``cases(n)``, n spread evenly stay; the others are ``thorough``.

    A test takes some five seconds of the default run, with all its cases.
    """
    tests = {}
    for item in items:
        mark = item.get_closest_marker("cases")
        if mark is not None and not item.get_closest_marker("slow"):  # those are not in the default run anyway
            tests.setdefault((item.path, item.originalname), (*mark.args, []))[1].append(item)
    for count, cases in tests.values():
        kept = {round((len(cases) - 1) * i / max(1, count - 1)) for i in range(count)}
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker(pytest.mark.thorough)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir():
    """The folder of data sets named by DDPN_FX_DATA; the test is skipped without one."""
    folder = os.environ.get("DDPN_FX_DATA")
    if not folder:
        pytest.skip("set DDPN_FX_DATA to a folder of data sets")
    path = Path(folder)
    assert path.is_dir(), f"DDPN_FX_DATA={folder}: no such folder"
    return path
