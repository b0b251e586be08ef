"""One attention node by itself: keys and values are stored once, then the node alone is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import UsageError
from engine.abi import FLOAT32
from engine.device import Device
from engine.device.numpy import evaluate
from engine.kvcache import PAGE, cache_tensors
from engine.ops.attention import KINDS
from engine.ops.kv_store import KVStore
from engine.plan import Node, Plan, Tensor
from engine.step import Step
from engine.work import count_scores

FEWEST_ROWS = 512  # of a step: keys are stored so many positions at a time


@dataclass(frozen=True)
class AttentionShape:
    """Heads, how many positions each sequence has, and what each position sees of its sequence: all, or the last
    `window` positions and the first `sink`."""

    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    lengths: tuple[int, ...] = (1024,)
    window: int | None = None
    sink: int = 0

    @property
    def pages(self) -> int:
        """Of the longest sequence."""
        return -(-max(self.lengths) // PAGE)

    def seen(self, position: int) -> int:
        """How many positions a row at this one sees."""
        return count_scores(range(position, position + 1), self.window or 0, self.sink)

    def scores(self, rows: int | None = None) -> int:
        """How many scores a head has for the last `rows` positions of each sequence, by default for all."""
        spans = [range(max(0, length - (rows or length)), length) for length in self.lengths]
        return sum(count_scores(span, self.window or 0, self.sink) for span in spans)


def attention_nodes(plan: Plan) -> list[Node]:
    return [node for node in plan.nodes if (node.op.struct or node.op.name) == "attention"]


def scratch_bytes(plan: Plan) -> int | None:
    """What a thread needs of scratch memory for attention: its scores and whatever else it keeps of a tile. None where
    the device does not say."""
    library: Any = getattr(plan.device, "library", None)
    if library is None or plan.program is None:
        return None
    structs, threads, needs = plan.program.structs, plan.device.threads, [0]  # type: ignore[attr-defined]
    for node, struct in zip(plan.nodes, structs, strict=True):
        if node in attention_nodes(plan):
            measure = getattr(library, f"{node.op.name}_scratch")
            needs.append(measure(struct, threads, node.tensors["q"].shape[0]))
    return max(needs) // threads


class AttentionRig:
    """kv_store and one layer of attention on a device, with random data.

    kind: "standard", "flash" or "streaming". dtype: of the cache. rows: the most positions of a sequence that a step
    takes, by default all. q_block, kv_block: None, or those to force.

    `store` first; then `select` says which rows `attend` computes, at first the last `rows` of each sequence. The sinks
    are asked with the same queries as the window: attention does not mind what the rotation of a query was.
    """

    def __init__(
        self,
        device: Device,
        shape: AttentionShape,
        kind: str = "flash",
        dtype: np.dtype = FLOAT32,
        rows: int | None = None,
        q_block: int | None = None,
        kv_block: int | None = None,
        seed: int = 0,
    ) -> None:
        self.device, self.shape, self.kind = device, shape, kind
        self.rng = np.random.default_rng(seed)
        self.rows = min(rows or max(shape.lengths), max(shape.lengths))
        self.capacity = max(sum(min(self.rows, n) for n in shape.lengths), min(FEWEST_ROWS, sum(shape.lengths)))
        self.plan = Plan(device)
        self.step = Step(device, self.plan, self.capacity, len(shape.lengths), shape.pages)
        pages = len(shape.lengths) * shape.pages
        self.step.arrays["page_table"][...] = np.arange(pages).reshape(-1, shape.pages)
        self.kv = cache_tensors(1, pages, shape.kv_heads, shape.head_dim, dtype)[0]
        device.allocate([self.kv])
        self._record(self._layer(q_block, kv_block))

    def _layer(self, q_block: int | None, kv_block: int | None) -> Any:
        options: dict[str, Any] = {"window": self.shape.window, "device": self.device, "name": self.kind}
        if self.kind != "standard":
            options |= {"q_block": q_block, "kv_block": kv_block}
        if self.kind == "streaming":
            options["sink"] = self.shape.sink
        elif self.shape.sink:
            raise UsageError(f"sink {self.shape.sink}: belongs to streaming attention")
        return KINDS[self.kind](self.shape.heads, **options)

    def _record(self, layer: Any) -> None:
        inputs, shape = self.step.tensors, self.shape
        widths = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        self.inputs = {
            name: Tensor((self.capacity, heads * shape.head_dim), FLOAT32, name, self.plan, inputs["rows"])
            for name, heads in widths.items()
        }
        for tensor in self.inputs.values():
            self._fill(tensor)
        q, k, v = self.inputs.values()
        where = (inputs["pos"], inputs["seq"], inputs["page_table"])
        KVStore("store", self.device).record(k, v, self.kv, *where)
        self.first = len(self.plan.nodes)  # from here on it is attention
        self.out = self.plan.keep(layer.record(q, self.kv, *where, *([q] if shape.sink else [])))
        self.plan.lower()

    def _fill(self, tensor: Tensor) -> None:
        self.device.upload(tensor, self.rng.standard_normal(tensor.shape, np.float32))

    @property
    def node(self) -> Node:
        return self.plan.nodes[-1]

    def store(self) -> None:
        """Fills the cache, and selects the last rows."""
        seq = np.repeat(np.arange(len(self.shape.lengths)), self.shape.lengths).tolist()
        pos = [p for length in self.shape.lengths for p in range(length)]
        for start in range(0, len(pos), self.capacity):
            if start:
                self._fill(self.inputs["k"])
                self._fill(self.inputs["v"])
            self._set_rows(pos[start : start + self.capacity], seq[start : start + self.capacity])
            self.plan.run(0, self.first)
        self.select(self.rows)

    def select(self, rows: int) -> None:
        """The last `rows` positions of each sequence are the rows of `attend`."""
        parts = [(slot, range(max(0, n - rows), n)) for slot, n in enumerate(self.shape.lengths)]
        self._set_rows([p for _, part in parts for p in part], [slot for slot, part in parts for _ in part])

    def _set_rows(self, pos: Sequence[int], seq: Sequence[int]) -> None:
        self.step.set_rows([0] * len(pos), list(pos), list(seq))

    def attend(self) -> None:
        """Replays attention alone. What it writes is `output`."""
        self.plan.run(self.first)

    def output(self) -> np.ndarray:
        """float32 [rows, heads · head_dim]"""
        return self.device.download(self.out)

    def error(self, most: int = 128) -> float:
        """The largest difference between `attend` and the op's NumPy meaning on the same cache, over up to `most` rows
        evenly spread from the first to the last; infinite where anything is not finite."""
        self.attend()
        arrays = {name: self.device.download(tensor) for name, tensor in self.node.tensors.items()}
        count = len(arrays["pos"])
        rows = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
        picked = {name: a[rows] if self.node.tensors[name].rows else a for name, a in arrays.items()}
        found, picked["out"] = picked["out"], np.full_like(picked["out"], np.nan)
        evaluate(self.node, picked)
        difference = np.abs(found - picked["out"])
        return float(difference.max()) if np.isfinite(difference).all() else float("inf")
