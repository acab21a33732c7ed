import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from ddpn_fx import keep_freed_memory

told = keep_freed_memory() if sys.argv[1] == "keep" else True
faults = []
for _ in range(8):  # the first few have the heap find its size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB each: more than glibc ever keeps unasked
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(told, min(faults[4:]))
"""


def pages_taken_anew(choice: str) -> int:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, choice], capture_output=True, text=True, check=True)
    told, faults = ran.stdout.split()
    if told != "True":
        pytest.skip("the C library has no mallopt, as glibc has")
    return int(faults)


def test_freed_memory_is_kept_when_asked():
    if (before := pages_taken_anew("leave")) < 100:
        pytest.skip(f"this allocator keeps its memory by itself ({before} page faults)")
    assert pages_taken_anew("keep") < 0.05 * before
