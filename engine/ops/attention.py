"""Attention over the pages of a cache: three layers that compute the same and differ in how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from engine.abi import BFLOAT16, FLOAT16, FLOAT32, LAST_POS, constants
from engine.attention_table import KV_BLOCKS, MAX_BLOCK, kinds_by_position, kv_block_for
from engine.layer import Layer
from engine.ops.kv_store import EVERY_PAGE, Ring
from engine.plan import Op, Tensor, op

PAGE = int(constants.PAGE)


def is_whole(value: object, least: int) -> bool:
    """Whether this is a number of positions."""
    return type(value) is int and least <= value <= LAST_POS


@op("out")
def attention(
    q: np.ndarray,
    kv: np.ndarray,
    pos: np.ndarray,
    seq: np.ndarray,
    page_table: np.ndarray,
    out: np.ndarray,
    q_sink: np.ndarray | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_pages: int,
    window: int,
    sink: int,
    sink_pages: int,
    ring_pages: int,
    q_block: int,
    kv_block: int,
    from_pos: int,
    until_pos: int,
    scale: float,
) -> None:
    page_size, shape = kv.shape[3], (kv_heads, heads // kv_heads, head_dim)
    for row, (position, slot) in enumerate(zip(pos, seq, strict=True)):
        if not from_pos <= position < until_pos:
            continue
        first = max(0, position - window + 1) if window else 0
        seen = np.concatenate([np.arange(min(sink, first)), np.arange(first, position + 1)])
        numbers = np.unique(seen // page_size)
        pages = page_table[slot, Ring(sink_pages, ring_pages).entries(numbers)]
        keys, values = np.asarray(kv[pages], np.float32).transpose(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
        at = np.searchsorted(numbers, seen // page_size) * page_size + seen % page_size
        scores = q[row].reshape(shape) @ keys[:, at].swapaxes(1, 2)
        if q_sink is not None:
            scores[..., seen < sink] = q_sink[row].reshape(shape) @ keys[:, at[seen < sink]].swapaxes(1, 2)
        scores = (scores - scores.max(axis=-1, keepdims=True)) * np.float32(scale)
        weights = np.exp(scores)
        weights /= weights.sum(axis=-1, keepdims=True)
        out[row] = (weights @ values[:, at]).reshape(-1)


class MultiHeadAttention(Layer):
    """Standard attention: materialises all scores of a query and softmaxes them (Vaswani et al., 2017). Several query
    heads may share a KV head (GQA: Ainslie et al., 2023).

    scale: of the scores, 1/√head_dim by default. window: how many positions a row sees, its own included; None: all.
    forward: q [rows, heads · head_dim], kv [pages, 2, kv_heads, PAGE, head_dim] holding the rows' own positions,
    pos, seq [rows] int32, page_table [slots, pages] int32, used as `ring` says -> [rows, heads · head_dim].
    """

    kind: ClassVar[str] = "standard"
    op: ClassVar[Op] = attention

    def __init__(self, heads: int, scale: float | None = None, window: int | None = None, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.heads, self.scale, self.window, self.sink = heads, scale, window, 0
        self.q_block = self.kv_block = 0  # what suits
        self.positions = (0, LAST_POS)  # of the rows that this layer computes
        self.check(heads > 0, f"{heads} heads, expected at least 1")
        self.check(window is None or is_whole(window, 1), f"window {window}, expected 1 to {LAST_POS}")
        self.check(scale is None or 0 < scale < math.inf, f"scale {scale}, expected a positive number")

    def forward(self, *inputs: Any, pos: int | Sequence[int] | None = None, layer_index: int = 0) -> Any:
        """Besides what `record` takes: attention by itself, over plain contiguous arrays.

        q [batch, seq, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim], or caches of several layers
        [layers, batch, keys, kv_heads, head_dim], of which layer_index names one; float32, keys and values also
        bfloat16 or float16. pos: the position of the first query, for all sequences or for each; by default the last
        query sees the last key. -> float32 [batch, seq, heads, head_dim]. Raises UsageError for anything else.
        """
        if len(inputs) == 3 and not any(isinstance(x, Tensor) for x in inputs):
            q, k, v = (np.asarray(x) for x in inputs)
            return self._attend(q, *self._layer_of(k, v, layer_index), pos)
        return super().forward(*inputs)

    def _layer_of(self, k: np.ndarray, v: np.ndarray, layer_index: int) -> tuple[np.ndarray, np.ndarray]:
        self.check(k.shape == v.shape, f"keys {k.shape} and values {v.shape} differ in shape")
        self.check(k.dtype == v.dtype, f"keys {k.dtype} and values {v.dtype} differ in dtype")
        self.check(k.ndim in (4, 5), f"keys of shape {k.shape}, expected [batch, keys, kv_heads, head_dim]")
        layers = len(k) if k.ndim == 5 else 1
        self.check(0 <= layer_index < layers, f"layer_index {layer_index}, the cache has {layers} layers")
        return (k[layer_index], v[layer_index]) if k.ndim == 5 else (k, v)

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, pos: int | Sequence[int] | None) -> np.ndarray:
        self.check(q.ndim == 4, f"queries of shape {q.shape}, expected [batch, seq, heads, head_dim]")
        (batch, seq, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
        self.check(q.dtype == FLOAT32, f"queries {q.dtype}, expected float32")
        self.check(k.dtype in (FLOAT32, BFLOAT16, FLOAT16), f"keys {k.dtype}, expected float32, bfloat16 or float16")
        self.check(heads == self.heads, f"{heads} heads, expected {self.heads}")
        self.check(len(k) == batch and k.shape[3] == head_dim, f"queries {q.shape} do not fit keys {k.shape}")
        self.check(min(q.shape + k.shape) > 0, f"queries {q.shape} and keys {k.shape}: nothing to compute")
        starts = np.asarray(keys - seq if pos is None else pos)
        self.check(starts.dtype.kind in "iu" and starts.shape in ((), (batch,)),
                   f"pos {pos}, expected a whole number or one for each of {batch} sequences")  # fmt: skip
        self.check(bool((starts >= 0).all() and (starts <= keys - seq).all()),
                   f"{seq} queries from position {starts.tolist()} on, {keys} keys")  # fmt: skip
        first = np.broadcast_to(starts.astype(np.int32), batch)
        pages = -(-keys // PAGE)
        padded = np.zeros((2, batch, pages * PAGE, kv_heads, head_dim), k.dtype)
        padded[0, :, :keys], padded[1, :, :keys] = k, v
        kv = padded.reshape(2, batch * pages, PAGE, kv_heads, head_dim).transpose(1, 0, 3, 2, 4)
        rows = [
            q.reshape(batch * seq, -1), kv, (first[:, None] + np.arange(seq, dtype=np.int32)).reshape(-1),
            np.repeat(np.arange(batch, dtype=np.int32), seq),
            np.arange(batch * pages, dtype=np.int32).reshape(batch, -1),
        ]  # fmt: skip
        out = self._compute(rows + [rows[0]] * bool(self.sink))
        return np.asarray(out).reshape(q.shape)

    def record(
        self,
        q: Tensor,
        kv: Tensor,
        pos: Tensor,
        seq: Tensor,
        page_table: Tensor,
        q_sink: Tensor | None = None,
        ring: Ring = EVERY_PAGE,
        out: Tensor | None = None,
    ) -> Tensor:
        kv_heads, head_dim = kv.shape[2], kv.shape[4]
        self.check(self.heads % kv_heads == 0, f"{self.heads} heads do not divide by {kv_heads} KV heads")
        self.check(q.width == self.heads * head_dim, f"query width {q.width}, expected {self.heads * head_dim}")
        self.check((q_sink is None) == (self.sink == 0), "sinks need queries of their own, and nothing else does")
        plan = self.plan_of(q, pos, seq)
        out = out or plan.new(q.width, q, f"{self.name}.out")
        op = self.op if self.device.runs(self.op.name) else attention
        kv_block = self.kv_block or kv_block_for(self.kind, self.device, kv.dtype, head_dim)
        plan.record(op, self.name, q=q, q_sink=q_sink, kv=kv, pos=pos, seq=seq, page_table=page_table, out=out,
                    heads=self.heads, kv_heads=kv_heads, head_dim=head_dim, kv_pages=kv.shape[0],
                    window=self.window or 0, sink=self.sink, **ring._asdict(), q_block=self.q_block, kv_block=kv_block,
                    from_pos=self.positions[0], until_pos=self.positions[1],
                    scale=self.scale or 1 / math.sqrt(head_dim))  # fmt: skip
        return out


class FlashAttention(MultiHeadAttention):
    """Attention in tiles of queries times blocks of keys, with a softmax that is mended from block to block, so that no
    score outlives its block (Dao, 2023). `q_block`, `kv_block`: queries and keys to a block; None: what suits."""

    kind = "flash"
    op = Op("flash_attention", attention.meaning, attention.writes, "attention")

    def __init__(
        self, heads: int, scale: float | None = None, window: int | None = None, q_block: int | None = None,
        kv_block: int | None = None, **options: object,
    ) -> None:  # fmt: skip
        super().__init__(heads, scale, window, **options)
        self.q_block, self.kv_block = q_block or 0, kv_block or 0
        self.check(0 <= self.q_block <= MAX_BLOCK, f"q_block {q_block}, expected 1 to {MAX_BLOCK}")
        self.check(self.kv_block in (0, *KV_BLOCKS), f"kv_block {kv_block}, expected one of {KV_BLOCKS}")


class StreamingAttention(FlashAttention):
    """Exact attention that walks the cache in ranges of keys, each with a softmax of its own, merged in order: a single
    query's ranges are shared out among threads. With `sink` and `window` it sees the first `sink` positions and the
    last `window` only, the sinks as if they stood right before the window (StreamingLLM: Xiao et al., 2023)."""

    kind = "streaming"
    op = Op("streaming_attention", attention.meaning, attention.writes, "attention")

    def __init__(
        self, heads: int, scale: float | None = None, window: int | None = None, sink: int = 0,
        q_block: int | None = None, kv_block: int | None = None, **options: object,
    ) -> None:  # fmt: skip
        super().__init__(heads, scale, window, q_block, kv_block, **options)
        self.sink = sink
        self.check(is_whole(sink, 0), f"sink {sink}, expected 0 to {LAST_POS}")
        self.check(window is not None or not sink, "sinks need a window")
        self.check(sink + (window or 0) <= LAST_POS, f"sink {sink} and window {window}, together at most {LAST_POS}")


class AutoAttention(MultiHeadAttention):
    """Whichever kind is fastest at a row's position (attention_table.py), a node for each."""

    kind = "auto"

    def record(self, q: Tensor, kv: Tensor, *where: Any, **options: Any) -> Tensor:
        kinds = kinds_by_position(self.device, kv.dtype, kv.shape[4])
        ends = [start for start, _ in kinds[1:]] + [LAST_POS]
        for (start, kind), end in zip(kinds, ends, strict=True):
            layer = KINDS[kind](self.heads, self.scale, self.window, name=self.name, device=self.device)
            layer.positions = start, end
            options["out"] = layer.record(q, kv, *where, **options)
        out: Tensor = options["out"]
        return out


KINDS: dict[str, type[MultiHeadAttention]] = {
    layer.kind: layer for layer in (MultiHeadAttention, FlashAttention, StreamingAttention, AutoAttention)
}
