"""The paged cache of keys and values: pools of pages, and for each sequence the tables of those it holds.

Layers that keep alike form a group, which has a pool and a table of its own. Most models have one group that keeps
everything; one that slides recycles its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.abi import constants
from engine.attention_choice import Policy
from engine.errors import RillError
from engine.ops.kv_store import EVERY_PAGE, Ring
from engine.plan import Tensor

PAGE = int(constants.PAGE)


class Group(NamedTuple):
    """Layers, by number, that keep alike: `entries` pages of each sequence, used as `ring` says."""

    policy: Policy
    layers: list[int]
    entries: int
    ring: Ring


def group_layers(policies: Sequence[Policy], max_rows: int, most: int | None) -> list[Group]:
    """Puts the layers together whose policies, one a layer, are the same. max_rows: of a step. most: the pages of a
    whole sequence; None: it has no end, and every policy a window."""
    groups = []
    for policy in dict.fromkeys(policies):
        layers = [i for i, other in enumerate(policies) if other == policy]
        ring = ring_of(policy, max_rows)
        if most is not None and (ring == EVERY_PAGE or sum(ring) >= most):
            groups.append(Group(policy, layers, most, EVERY_PAGE))
        else:
            groups.append(Group(policy, layers, sum(ring), ring))
    return groups


def ring_of(policy: Policy, max_rows: int) -> Ring:
    """The pages that a sequence needs in order to lose nothing that a row of the same step looks at."""
    if policy.window is None:
        return EVERY_PAGE
    # The rows of a step look at window - 1 + max_rows positions in a row. Those lie on at most so many pages, and as
    # many pages in a row have entries of their own: what the step writes overwrites only what lies before all of them.
    return Ring(pages_of(policy.sink), pages_of(policy.window + max_rows - 2) + 1)


def pages_of(length: int) -> int:
    """How many pages so many positions take from the beginning of one."""
    return -(-length // PAGE)


class KVCache:
    """The pages of a group, of PAGE positions each, handed out in consecutive runs. One page number stands for that
    page in every layer of the group.

    `layers` are the tensors that kernels read, one a layer: [pages, 2, kv_heads, PAGE, head_dim], keys and values.
    `page_table` is the group's part of the step's array, [slots, entries], used as `ring` says; a slot holds one
    sequence at a time, and its rows see `window` positions (None: all).
    """

    def __init__(
        self,
        layers: list[Tensor],
        page_table: np.ndarray,
        pages: int,
        window: int | None = None,
        ring: Ring = EVERY_PAGE,
    ) -> None:
        self.layers, self.page_table = layers, page_table
        self.window, self.ring = window, ring
        self.free = np.ones(pages, bool)
        slots = len(page_table)
        self.held = np.zeros(slots, np.int32)  # entries of each slot that name a page
        self.length = np.zeros(slots, np.int64)  # positions that it has room for
        self.recycled = np.zeros(slots, np.int64)  # pages before this one are gone, but for the sinks'

    def reserve(self, slot: int, length: int) -> None:
        """Gives a slot the pages for positions [0, length). Raises RillError when the pool has none left."""
        need, entries = pages_of(length), self.page_table.shape[1]
        if self.ring.ring_pages and need > entries:
            self.recycled[slot] = max(self.recycled[slot], need - self.ring.ring_pages)
            need = entries
        if need > entries:
            raise RillError(f"a sequence of {length} positions: the cache holds {entries * PAGE}")
        for i in range(int(self.held[slot]), need):
            page = self._next_page(int(self.page_table[slot, i - 1]) if i else -1)
            self.free[page] = False
            self.page_table[slot, i] = page
            self.held[slot] = i + 1
        self.length[slot] = max(self.length[slot], length)

    def usable(self, slot: int, length: int) -> int:
        """How many of a slot's first `length` positions rows can go on from: all that there are, or none where one
        that those rows look at has been recycled."""
        length = min(length, int(self.length[slot]))
        first_seen = 0 if self.window is None else max(0, length - self.window + 1)
        return length if first_seen // PAGE >= self.recycled[slot] else 0

    def truncate(self, slot: int, length: int) -> int:
        """Forgets positions from `length` on. Returns the length that is still usable."""
        length = self.usable(slot, length)
        keep = min(pages_of(length), int(self.held[slot]))
        self.free[self.page_table[slot, keep : self.held[slot]]] = True
        self.held[slot], self.length[slot] = keep, length
        if not length:
            self.recycled[slot] = 0
        return length

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
