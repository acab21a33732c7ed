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


def pytest_collection_modifyitems(items):
    cuda = [item for item in items if item.get_closest_marker("cuda")]
    if cuda and not torch.cuda.is_available():
        for item in cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
