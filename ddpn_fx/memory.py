"""Keep freed host memory: on a CPU, a large step spends much of its time on pages that it has just given back.

glibc hands large blocks back to the system when they are freed, and every page of the next step's blocks is then a page
fault. DDPNOpt keeps more tensors within a step than SGD does (per-sample gradients, until the policy is known), so it
pays more: of the 6-layer GPT's step in examples/bench a sixth.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process's allocator keep freed memory for later allocations, for the rest of the process.

    An opt-in for training on a CPU, for every optimizer: the process's memory stays at its peak. To be called before
    the first step.

    Returns:
        Whether the allocator was told: False where the C library is not glibc (macOS, Windows, Alpine), and under
        another allocator (jemalloc, tcmalloc) it does nothing.

    Equivalent to ``MALLOC_TRIM_THRESHOLD_=18446744073709551615 MALLOC_MMAP_MAX_=0`` in the environment.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
