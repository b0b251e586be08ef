"""Makes the engine's own memory visible to AddressSanitizer.

The sanitizer knows what malloc gave out, but the CPU device maps its memory itself. Under `make sanitize`
every piece it maps gets a forbidden zone on either side; without the sanitizer nothing changes.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from engine import abi
from engine.cpu import huge_pages

PAGE = 4096


def guard_memory() -> None:
    process = ctypes.CDLL(None)
    if not hasattr(process, "__asan_poison_memory_region"):
        return
    poison, unpoison = process.__asan_poison_memory_region, process.__asan_unpoison_memory_region
    poison.argtypes = unpoison.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    reserve = huge_pages.reserve

    def reserve_between_zones(size: int) -> np.ndarray:
        size = max(int(size), 1)
        zone = huge_pages.HUGE_PAGE if size >= huge_pages.HUGE_PAGE else PAGE  # keeps the alignment
        memory = reserve(size + 2 * zone)
        start = abi.address(memory)
        poison(start, zone)
        poison(start + zone + size, zone)
        owner = memory
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        weakref.finalize(owner, unpoison, start, memory.size)  # the addresses will be somebody else's
        return memory[zone:-zone]

    huge_pages.reserve = reserve_between_zones
