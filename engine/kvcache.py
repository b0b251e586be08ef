"""The paged cache of keys and values: a pool of pages, and for each sequence the table of those it holds."""

from __future__ import annotations

import numpy as np

from engine.abi import constants
from engine.errors import RillError
from engine.plan import Tensor

PAGE = int(constants.PAGE)


class KVCache:
    """Pages of PAGE positions, handed out in consecutive runs. One page number stands for that page in every layer.

    `layers` are the tensors that kernels read, one a layer: [pages, 2, kv_heads, PAGE, head_dim], keys and values.
    `page_table` is the step's array [slots, pages a sequence]; a slot holds one sequence at a time.
    """

    def __init__(self, layers: list[Tensor], page_table: np.ndarray, pages: int) -> None:
        self.layers = layers
        self.page_table = page_table
        self.free = np.ones(pages, bool)
        self.held = np.zeros(len(page_table), np.int32)  # pages of each slot

    def reserve(self, slot: int, length: int) -> None:
        """Gives a slot the pages for positions [0, length). Raises RillError when the pool has none left."""
        need = -(-length // PAGE)
        if need > self.page_table.shape[1]:
            raise RillError(f"a sequence of {length} positions: the cache holds {self.page_table.shape[1] * PAGE}")
        for i in range(int(self.held[slot]), need):
            page = self._next_page(int(self.page_table[slot, i - 1]) if i else -1)
            self.free[page] = False
            self.page_table[slot, i] = page
            self.held[slot] = i + 1

    def truncate(self, slot: int, length: int) -> int:
        """Forgets positions from `length` on. Returns the length that is still usable."""
        keep = -(-length // PAGE)
        self.free[self.page_table[slot, keep : self.held[slot]]] = True
        self.held[slot] = min(keep, self.held[slot])
        return min(length, int(self.held[slot]) * PAGE)

    def used_pages(self) -> int:
        return int((~self.free).sum())

    def _next_page(self, previous: int) -> int:
        """The page after `previous` if it is free, so that sequences lie in runs; else the start of the lowest stretch
        in which a whole sequence has room, or of the longest run."""
        if 0 <= previous < len(self.free) - 1 and self.free[previous + 1]:
            return previous + 1
        whole = self.page_table.shape[1]
        stretches = self.free[: len(self.free) // whole * whole].reshape(-1, whole).all(axis=1)
        if stretches.any():
            return int(np.argmax(stretches)) * whole
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.free, [False]]).astype(np.int8)))
        if not len(edges):
            raise RillError("the KV cache is full")
        starts, ends = edges[::2], edges[1::2]
        return int(starts[np.argmax(ends - starts)])


def cache_tensors(count: int, pages: int, kv_heads: int, head_dim: int, dtype: np.dtype) -> list[Tensor]:
    """The cache tensors of `count` layers, without storage."""
    shape = (pages, 2, kv_heads, PAGE, head_dim)
    return [Tensor(shape, dtype, f"cache.{i}", layout="cache") for i in range(count)]
