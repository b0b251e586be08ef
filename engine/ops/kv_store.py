from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engine.layer import Layer
from engine.plan import Tensor, op


class Ring(NamedTuple):
    """How a page table is used when a sequence has more pages than entries: its first sink_pages stay, the others take
    turns in ring_pages entries. Without entries to take turns in, the table lists every page."""

    sink_pages: int = 0
    ring_pages: int = 0

    def entries(self, page: Any) -> Any:
        """The entry of the table for page numbers of a sequence, one or an array."""
        if not self.ring_pages:
            return page
        return np.where(page < self.sink_pages, page, self.sink_pages + (page - self.sink_pages) % self.ring_pages)


EVERY_PAGE = Ring()


class Pages(NamedTuple):
    """Where a layer keeps its keys and values: kv [pages, 2, kv_heads, PAGE, head_dim]; page_table [slots, entries]
    int32 says which pages are a sequence's, `ring` how to read it."""

    kv: Tensor
    page_table: Tensor
    ring: Ring = EVERY_PAGE


@op("kv")
def kv_store(
    k: np.ndarray,
    v: np.ndarray,
    kv: np.ndarray,
    pos: np.ndarray,
    seq: np.ndarray,
    page_table: np.ndarray,
    *,
    head_dim: int,
    kv_pages: int,
    sink_pages: int,
    ring_pages: int,
) -> None:
    page_size = kv.shape[3]
    pages = page_table[seq, Ring(sink_pages, ring_pages).entries(pos // page_size)]
    kv[pages[pos % page_size == 0]] = 0  # a page is handed out when its first position is written
    kv[pages, 0, :, pos % page_size] = k.reshape(len(k), kv.shape[2], head_dim)
    kv[pages, 1, :, pos % page_size] = v.reshape(len(v), kv.shape[2], head_dim)


class KVStore(Layer):
    """Writes the keys and values of a step's rows into a layer's pages, rounded to the cache's dtype.

    forward: k, v [rows, kv_heads · head_dim], kv [pages, 2, kv_heads, PAGE, head_dim], pos, seq [rows] int32,
    page_table [slots, pages] int32, used as `ring` says -> kv.
    """

    def record(
        self, k: Tensor, v: Tensor, kv: Tensor, pos: Tensor, seq: Tensor, page_table: Tensor, ring: Ring = EVERY_PAGE
    ) -> Tensor:
        heads, head_dim = kv.shape[2], kv.shape[4]
        self.check(k.width == v.width == heads * head_dim, f"widths {k.width} and {v.width}, cache {kv.shape}")
        plan = self.plan_of(k, v, pos, seq)
        plan.record(kv_store, self.name, k=k, v=v, kv=kv, pos=pos, seq=seq, page_table=page_table, head_dim=head_dim,
                    kv_pages=kv.shape[0], **ring._asdict())  # fmt: skip
        return kv
