from __future__ import annotations

import math

import numpy as np

from engine.layer import Layer
from engine.plan import Tensor, op


@op("out")
def attention(
    q: np.ndarray,
    kv: np.ndarray,
    pos: np.ndarray,
    seq: np.ndarray,
    page_table: np.ndarray,
    out: np.ndarray,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    scale: float,
) -> None:
    page_size = kv.shape[3]
    for row, (position, slot) in enumerate(zip(pos, seq, strict=True)):
        pages = page_table[slot, : position // page_size + 1]
        first = max(0, position - window + 1) if window else 0
        keys, values = np.asarray(kv[pages], np.float32).transpose(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
        queries = q[row].reshape(kv_heads, heads // kv_heads, head_dim)
        scores = queries @ keys[:, first : position + 1].swapaxes(1, 2) * np.float32(scale)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[row] = (weights @ values[:, first : position + 1]).reshape(-1)


class MultiHeadAttention(Layer):
    """Standard attention: materialises the scores of every query and softmaxes them (Vaswani et al., 2017). Several
    query heads may share a KV head (GQA: Ainslie et al., 2023).

    scale: of the scores, 1/√head_dim by default. window: how many positions a row sees, its own included; None: all.
    forward: q [rows, heads · head_dim], kv [pages, 2, kv_heads, PAGE, head_dim] holding the rows' own positions,
    pos, seq [rows] int32, page_table [slots, pages] int32 -> [rows, heads · head_dim].
    """

    kind = "standard"

    def __init__(self, heads: int, scale: float | None = None, window: int | None = None, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.heads, self.scale, self.window = heads, scale, window
        self.check(window is None or window > 0, f"window {window}, expected at least 1")
        self.check(scale is None or scale > 0, f"scale {scale}, expected a positive number")

    def record(self, q: Tensor, kv: Tensor, pos: Tensor, seq: Tensor, page_table: Tensor) -> Tensor:
        kv_heads, head_dim = kv.shape[2], kv.shape[4]
        self.check(self.heads % kv_heads == 0, f"{self.heads} heads do not divide by {kv_heads} KV heads")
        self.check(q.width == self.heads * head_dim, f"query width {q.width}, expected {self.heads * head_dim}")
        plan = self.plan_of(q, pos, seq)
        out = plan.new(q.width, q, f"{self.name}.out")
        plan.record(attention, self.name, q=q, kv=kv, pos=pos, seq=seq, page_table=page_table, out=out,
                    heads=self.heads, kv_heads=kv_heads, head_dim=head_dim, window=self.window or 0,
                    scale=self.scale or 1 / math.sqrt(head_dim))  # fmt: skip
        return out
