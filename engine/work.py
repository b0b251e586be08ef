"""What nodes have to do, in bytes and floating-point operations, and the least time that takes on a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.abi import FLOAT32, INT8, constants
from engine.layer import Weight
from engine.plan import Node, Plan, Tensor

if TYPE_CHECKING:
    from engine.device import Device
    from engine.step import Step

PAGE = int(constants.PAGE)


@dataclass(frozen=True)
class Work:
    """memory: bytes of weights, keys and values that are read, each once. activations: bytes of rows that are read or
    written, each once; these seldom leave the CPU's caches. operations: floating-point operations of products and of
    attention, two for a multiply-add, by the dtype of the weights or of the cache."""

    memory: float = 0.0
    activations: float = 0.0
    operations: Mapping[np.dtype, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        mine, theirs = self.operations, other.operations
        operations = {dtype: mine.get(dtype, 0) + theirs.get(dtype, 0) for dtype in {**mine, **theirs}}
        return Work(self.memory + other.memory, self.activations + other.activations, operations)

    def __mul__(self, times: float) -> Work:
        operations = {dtype: count * times for dtype, count in self.operations.items()}
        return Work(self.memory * times, self.activations * times, operations)

    @property
    def bytes(self) -> float:
        return self.memory + self.activations

    @property
    def flops(self) -> float:
        return sum(self.operations.values())


def work_of(node: Node, rows: int, spans: Sequence[range], device: Device) -> Work:
    """What a node has to do in a step. rows: of the node; spans: the positions of each sequence in the step."""
    return NodeWork(node, device).of(rows, spans)


class NodeWork:
    """What a node has to do in any step: something once, something for each row, and what it does with the cache."""

    def __init__(self, node: Node, device: Device) -> None:
        self.node = node
        self.scalars = {name: int(value) for name, value in node.scalars.items()}
        self.once = self.each_row = Work()
        self.cache: Tensor | None = None
        for name, tensor in node.tensors.items():
            if isinstance(tensor, Weight):
                self._add_weight(name, tensor, device.weight_bytes(tensor))
            elif tensor.layout == "cache":
                self.cache = tensor
                size = device.cache_bytes(tensor.dtype, tensor.shape[4])
                self.position_bytes = tensor.shape[2] * size / PAGE  # of the keys and values of one
            elif tensor.rows is not None:
                self.each_row += Work(activations=prod(tensor.shape[1:]) * tensor.dtype.itemsize)

    def _add_weight(self, name: str, weight: Weight, size: int) -> None:
        if name == "table":  # rows of it are picked, it is not multiplied by
            self.each_row += Work(size / weight.shape[0])
            return
        self.once += Work(size)
        if weight.layout == "matrix":
            self.each_row += Work(operations={weight.dtype: 2 * prod(weight.shape)})

    def of(self, rows: int, spans: Sequence[range]) -> Work:
        """See work_of."""
        work = self.once + self.each_row * rows
        if self.cache is None:
            return work
        if "kv" in self.node.op.writes:
            return work + Work(activations=self.position_bytes * sum(map(len, spans)))
        return work + self._attention(self.cache, spans)

    def _attention(self, kv: Tensor, spans: Sequence[range]) -> Work:
        n = self.scalars
        mine = [range(max(span.start, n["from_pos"]), min(span.stop, n["until_pos"])) for span in spans]
        read = sum(positions_read(span, n["window"], n["sink"]) for span in mine)
        scores = sum(count_scores(span, n["window"], n["sink"]) for span in mine)
        dtype = FLOAT32 if kv.dtype == INT8 else kv.dtype  # as whole numbers, of which a CPU may do more
        return Work(self.position_bytes * read, operations={dtype: 4 * n["heads"] * n["head_dim"] * scores})


def positions_read(span: range, window: int = 0, sink: int = 0) -> int:
    """How many positions the rows of a span see together: each the last `window` (0: all) and the first `sink`."""
    if not span:
        return 0
    start = max(0, span.start + 1 - window) if window else 0
    return span.stop - start + min(sink, start)


def count_scores(span: range, window: int = 0, sink: int = 0) -> int:
    """How many scores a head has for the rows of a span: each sees the last `window` positions (0: all) and the first
    `sink`."""

    def of_first(count: int) -> int:
        from_sinks = _capped_sum(count - window, sink) if window else 0
        return _capped_sum(count, window or count) + from_sinks

    return of_first(span.stop) - of_first(span.start) if span else 0


def _capped_sum(count: int, cap: int) -> int:
    """The sum of min(i, cap) for i = 1 … count."""
    rising = max(0, min(count, cap))
    return rising * (rising + 1) // 2 + max(0, count - rising) * cap


class PlanWork:
    """The work of all nodes of a plan that is fed by a step. Nodes that differ in no size, such as those of the layers
    of a model, are of one kind, which is worked out once."""

    def __init__(self, plan: Plan, step: Step) -> None:
        self.step = step
        kinds: dict[Any, list[Node]] = {}
        for node in plan.nodes:
            kinds.setdefault(_sizes(node), []).append(node)
        self.nodes = [alike[0] for alike in kinds.values()]
        self.works = [NodeWork(node, plan.device) for node in self.nodes]
        self.counts = [len(alike) for alike in kinds.values()]
        index = {key: i for i, key in enumerate(kinds)}
        self.kind_of = np.array([index[_sizes(node)] for node in plan.nodes], np.int64)  # [nodes]

    def of(self, kind: int, spans: Sequence[range], logit_rows: int) -> Work:
        """What one node of a kind has to do."""
        wanted = self.nodes[kind].rows is self.step.tensors["logit_rows"]
        return self.works[kind].of(logit_rows if wanted else sum(map(len, spans)), spans)

    def total(self, spans: Sequence[range], logit_rows: int) -> Work:
        """What a whole step has to do."""
        works = (self.of(kind, spans, logit_rows) * count for kind, count in enumerate(self.counts))
        return sum(works, Work())


def _sizes(node: Node) -> Any:
    tensors = tuple((name, t.shape, t.dtype, t.layout, type(t)) for name, t in node.tensors.items())
    return node.op.name, id(node.rows), tensors, tuple(node.scalars.items())


def spans_of(pos: np.ndarray, seq: np.ndarray) -> list[range]:
    """The positions of each sequence in a step, of which pos and seq [rows] are the rows."""
    starts = np.flatnonzero(np.diff(seq, prepend=-1))
    ends = np.append(starts[1:], len(seq))
    return [range(int(pos[start]), int(pos[end - 1]) + 1) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Limits:
    """What a machine can do at best: bytes a second read from memory, floating-point operations a second by dtype."""

    read: float
    multiply: Mapping[np.dtype, float]

    def reading(self, memory: float) -> float:
        """The least seconds for reading so many bytes."""
        return memory / self.read

    def multiplying(self, work: Work) -> float:
        """The least seconds for the operations of some work."""
        return sum(count / self.multiply[dtype] for dtype, count in work.operations.items())

    def seconds(self, work: Work) -> float:
        """The least seconds for some work: reading or multiplying, whichever takes longer."""
        return max(self.reading(work.bytes), self.multiplying(work))


def measure_limits(device: Device, dtypes: Iterable[np.dtype], reading: bool = True) -> Limits | None:
    """Measured now; None where a device cannot say. reading: that limit, too, else it is 0."""
    measures: Any = device
    if not hasattr(device, "read_limit"):
        return None
    multiply = {dtype: float(measures.multiply_limit(dtype)) for dtype in dtypes}
    return Limits(measures.read_limit() if reading else 0.0, multiply)
