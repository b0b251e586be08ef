from __future__ import annotations

import numpy as np

from engine.layer import Layer
from engine.plan import Tensor, op


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
) -> None:
    page_size = kv.shape[3]
    pages = page_table[seq, pos // page_size]
    kv[pages[pos % page_size == 0]] = 0  # a page is handed out when its first position is written
    kv[pages, 0, :, pos % page_size] = k.reshape(len(k), kv.shape[2], head_dim)
    kv[pages, 1, :, pos % page_size] = v.reshape(len(v), kv.shape[2], head_dim)


class KVStore(Layer):
    """Writes the keys and values of a step's rows into a layer's pages, rounded to the cache's dtype.

    forward: k, v [rows, kv_heads · head_dim], kv [pages, 2, kv_heads, PAGE, head_dim], pos, seq [rows] int32,
    page_table [slots, pages] int32 -> kv.
    """

    def record(self, k: Tensor, v: Tensor, kv: Tensor, pos: Tensor, seq: Tensor, page_table: Tensor) -> Tensor:
        heads, head_dim = kv.shape[2], kv.shape[4]
        self.check(k.width == v.width == heads * head_dim, f"widths {k.width} and {v.width}, cache {kv.shape}")
        plan = self.plan_of(k, v, pos, seq)
        plan.record(kv_store, self.name, k=k, v=v, kv=kv, pos=pos, seq=seq, page_table=page_table, head_dim=head_dim)
        return kv
