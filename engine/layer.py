"""The base class of everything that holds weights and records nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from engine.abi import BFLOAT16, FLOAT16, FLOAT32, constants
from engine.device import Device, default_device
from engine.errors import UsageError
from engine.plan import Plan, Tensor
from engine.quantised import Format, QuantisedMatrix, format_of, quantise, stack

T = TypeVar("T")
Quantise = Callable[[np.ndarray, Format, str], QuantisedMatrix]
DECODED = 2 << 20  # bytes of float32 that are decoded or quantised at once


class Source(Protocol):
    """Where rows of a weight come from: an array, or a tensor stored in a file (checkpoint.StoredTensor)."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Weight(Tensor):
    """A tensor whose values come from sources stacked along their rows, read when a device loads it."""

    sources: Sequence[Source]

    def __init__(self, name: str, sources: Sequence[Source], dtype: np.dtype, layout: str, group: int = 0) -> None:
        rows = sum(source.shape[0] for source in sources)
        super().__init__((rows, *sources[0].shape[1:]), dtype, name, layout=layout, group=group)
        self.sources = sources

    def stacked_rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows of the stacked sources, read now, in this weight's dtype, or float32 where that is quantised."""
        dtype = FLOAT32 if self.group else self.dtype
        parts = []
        for source, begin, end in self._parts(start, stop):
            part = source.rows(begin, end) if hasattr(source, "rows") else np.asarray(source)[begin:end]
            parts.append(part.astype(dtype, copy=False))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def quantised_rows(self, start: int, stop: int, quantise: Quantise = quantise) -> QuantisedMatrix:
        """The same of a quantised weight: as its sources have them, or quantised now."""
        format = Format(self.dtype, self.group)
        if any(format_in(source) != format for source in self.sources):
            return quantise(self.stacked_rows(start, stop), format, self.name)
        parts = [source.quantised_rows(begin, end) for source, begin, end in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else stack(parts)

    def each_slice(self, work: Callable[[int, int], T], threads: int) -> Iterator[tuple[int, T]]:
        """The first row of every slice, and work(first, last), done by so many threads."""
        parts = list(self.slices())
        with ThreadPoolExecutor(threads) as pool:
            for i in range(0, len(parts), threads):  # so many at a time that they take little memory
                firsts, lasts = zip(*parts[i : i + threads], strict=True)
                yield from zip(firsts, pool.map(work, firsts, lasts), strict=True)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Rows [first, last) to be decoded or quantised at once, whole panels: the whole never lies in memory twice."""
        panel = int(constants.PANEL)
        step = max(DECODED // max(4 * self.shape[1], 1) // panel, 1) * panel
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Any, int, int]]:
        """Which rows of which sources lie in [start, stop)."""
        first = 0
        for source in self.sources:
            begin, end = max(start - first, 0), min(stop - first, source.shape[0])
            if begin < end:
                yield source, begin, end
            first += source.shape[0]


def stored_dtype(source: Any) -> np.dtype:
    """The dtype that a source keeps: its own, or float32 for an array of any other."""
    names = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT16}
    if isinstance(source.dtype, str):
        return names[source.dtype]
    return np.dtype(source.dtype) if source.dtype in names.values() else FLOAT32


def format_in(source: Any) -> Format | None:
    """How a source is quantised, if it is."""
    found: Format | None = getattr(source, "format", None)
    return found


def matrix(name: str, sources: Sequence[Source], dtype: str = "auto") -> Weight:
    """A weight [outputs, inputs] to multiply by. Kept as stored ("auto", for sources that are stored alike), widened
    once ("float32") or quantised (a name that quantised.format_of knows)."""
    assert len(stored_alike(sources, dtype)) == 1, f"{name}: parts that are stored differently"
    if format := format_of(dtype) or (format_in(sources[0]) if dtype == "auto" else None):
        return Weight(name, sources, format.dtype, "matrix", format.group)
    return Weight(name, sources, stored_dtype(sources[0]) if dtype == "auto" else FLOAT32, "matrix")


def stored_alike(sources: Sequence[Source], dtype: str = "auto") -> list[range]:
    """Runs of sources that can be one matrix of a dtype: all, unless they keep what they are stored as and differ."""
    kinds = [(format_in(source) or stored_dtype(source)) if dtype == "auto" else dtype for source in sources]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def vector(name: str, *sources: Source) -> Weight:
    """A small weight [width], kept in float32."""
    return Weight(name, sources, FLOAT32, "dense")


class Layer:
    """Holds weights and records nodes; knows its device and its name in the model.

    `forward` given tensors of a plan records into that plan and returns the output tensor. Given plain arrays it
    computes at once, through the same code: a plan of its own is recorded, lowered and run.
    """

    def __init__(self, name: str = "", device: Device | None = None) -> None:
        self.name = name or type(self).__name__
        self._device = device

    @property
    def device(self) -> Device:
        """Where this layer runs. By default the best device of this machine."""
        if self._device is None:
            self._device = default_device()
        return self._device

    @property
    def device_type(self) -> str:
        """ "cpu", "numpy" or "cuda"."""
        return self.device.type

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Appends this layer's nodes to the inputs' plan; returns the output tensor. Each layer names its inputs."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Any:
        """Records (tensors in, tensor out) or computes at once (arrays in, array out)."""
        if any(isinstance(x, Tensor) for x in inputs):
            return self.record(*inputs)
        return self._compute([np.ascontiguousarray(x) for x in inputs])

    def _compute(self, arrays: list[np.ndarray]) -> Any:
        self.device.load([w for w in self.weights() if w.storage is None])
        plan = Plan(self.device)
        counts: dict[int, Tensor] = {}  # inputs of as many rows share their count, as those of a step do
        inputs = []
        for i, array in enumerate(arrays):
            kind, shape = array.dtype.kind, array.shape
            self.check(kind not in "iu" or array.dtype == np.int32, f"input {i}: {array.dtype}, expected int32")
            self.check(kind != "f" or len(shape) > 1, f"input {i} of shape {shape}, expected [rows, width]")
            if shape[0] not in counts:
                counts[shape[0]] = plan_input(plan, np.array(shape[:1], np.int32), None, "rows")
            inputs.append(plan_input(plan, array, counts[shape[0]], f"input {i}"))
        output = self.record(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            plan.keep(tensor)
        plan.lower()
        plan.run()
        results = tuple(self.device.download(tensor) for tensor in outputs)
        return results if isinstance(output, tuple) else results[0]

    def weights(self) -> Iterator[Weight]:
        """All weights of this layer and of the layers in it, in the order in which they were made, each once."""
        seen: set[int] = set()
        for weight in self._weights():
            if id(weight) not in seen:
                seen.add(id(weight))
                yield weight

    def _weights(self) -> Iterator[Weight]:
        for value in vars(self).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Weight):
                    yield item
                elif isinstance(item, Layer):
                    yield from item._weights()

    def check(self, condition: bool, message: str) -> None:
        """Raises UsageError naming this layer."""
        if not condition:
            raise UsageError(f"{self.name}: {message}")

    def plan_of(self, *inputs: Tensor) -> Plan:
        """The plan that the inputs belong to."""
        plans = {t.plan for t in inputs if t.plan is not None}
        self.check(len(plans) == 1, f"inputs of {len(plans)} plans")
        self.check(len({t.rows for t in inputs if t.rows}) <= 1, "inputs of different numbers of rows")
        return plans.pop()


def plan_input(plan: Plan, array: np.ndarray, rows: Tensor | None, name: str) -> Tensor:
    """A tensor that holds an array, for plans that are fed by hand: numbers as float32; five dimensions are pages
    of keys and values, which may be bfloat16 or float16."""
    pages = array.ndim == 5
    if array.dtype == np.float64 or (array.dtype in (BFLOAT16, FLOAT16) and not pages):
        array = array.astype(FLOAT32)
    layout = "cache" if pages else "dense"
    tensor = Tensor(array.shape, array.dtype, name, plan, None if pages else rows, layout=layout)
    plan.device.upload(tensor, array)
    return tensor
