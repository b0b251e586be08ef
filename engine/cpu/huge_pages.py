"""Where weights, caches and scratch lie."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from engine import abi

HUGE_PAGE = 2 << 20
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def reserve(size: int) -> np.ndarray:
    """Zeroed bytes in huge pages where the system has them. Memory is taken when first touched, not before."""
    flags: dict[str, Any] = {}
    if hasattr(mmap, "MAP_NORESERVE"):
        flags["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
    elif hasattr(mmap, "MAP_PRIVATE"):
        flags["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    size = max(int(size), 1)
    large = size >= HUGE_PAGE
    region = mmap.mmap(-1, size + (HUGE_PAGE if large else ALIGNMENT), **flags)
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without transparent huge pages: slower, not wrong
    memory = np.frombuffer(region, np.uint8)
    start = -abi.address(memory) % (HUGE_PAGE if large else ALIGNMENT)
    return memory[start : start + size]
