"""The oracle: interprets a plan with the ops' NumPy meanings. Slow, plain, and what every other device is held to."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.device import ALONE, Cancelled, Device, Place, Program, Progress
from engine.errors import UsageError
from engine.int8 import Int8Array

if TYPE_CHECKING:
    from engine.layer import Weight
    from engine.plan import Node, Plan, Tensor


def open(isa: str, threads: int | None, place: Place = ALONE) -> NumPyDevice:
    """NumPy's own BLAS chooses instructions and threads."""
    if isa != "auto":
        raise UsageError(f"isa {isa!r}: the numpy device has none to choose")
    return NumPyDevice()


class NumPyDevice(Device):
    type = "numpy"
    description = "NumPy reference"

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.notes, self.details = [], []

    def allocate(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:  # nothing shared: an oracle may be wasteful, not surprising
            in_eight_bits = tensor.layout == "cache" and tensor.dtype == np.int8
            tensor.storage = np.zeros(tensor.shape, np.float32 if in_eight_bits else tensor.dtype)
            if in_eight_bits:
                tensor.storage = tensor.storage.view(Int8Array)

    def load(self, weights: Sequence[Weight], progress: Progress | None = None, cache: bool = False) -> None:
        total, done = sum(self.weight_bytes(w) for w in weights), 0
        for weight in weights:
            if weight.group:
                weight.storage = weight.quantised_rows(0, weight.shape[0])
            else:
                parts = [s.read() if hasattr(s, "read") else np.asarray(s) for s in weight.sources]
                same = len(parts) == 1 and parts[0].dtype == weight.dtype
                weight.storage = parts[0] if same else np.concatenate([p.astype(weight.dtype) for p in parts])
            done += self.weight_bytes(weight)
            if progress:
                progress(done, total)

    def weight_bytes(self, weight: Weight) -> int:
        return int(np.prod(weight.shape, dtype=np.int64)) * weight.dtype.itemsize

    def cache_bytes(self, dtype: np.dtype, head_dim: int) -> int:
        from engine.abi import constants

        return 2 * constants.PAGE * (head_dim * dtype.itemsize + (4 if dtype == np.int8 else 0))

    def upload(self, tensor: Tensor, array: np.ndarray) -> None:
        self.allocate([tensor])
        tensor.storage[...] = array

    def share(self, tensor: Tensor, array: np.ndarray) -> None:
        tensor.storage = array

    def download(self, tensor: Tensor) -> np.ndarray:
        array = self.view(tensor)
        return array if tensor.group else array.copy()

    def view(self, tensor: Tensor) -> np.ndarray:
        array = tensor.owner.storage
        if tensor.base:
            array = array[..., tensor.column : tensor.column + tensor.width]
        return array[: int(tensor.rows.storage[0])] if tensor.rows else array

    def lower(self, plan: Plan) -> Program:
        return Interpreter(self, plan)

    def cancel(self, flag: bool) -> None:
        self.stop.set() if flag else self.stop.clear()


class Interpreter(Program):
    def __init__(self, device: NumPyDevice, plan: Plan) -> None:
        self.device, self.plan = device, plan

    def run(self, first: int, last: int, times: np.ndarray | None = None) -> None:
        begin = time.perf_counter_ns()
        for i, node in enumerate(self.plan.nodes[first:last]):
            if self.device.stop.is_set():
                raise Cancelled
            evaluate(node, {name: self.device.view(tensor) for name, tensor in node.tensors.items()})
            if times is not None:
                end = time.perf_counter_ns()
                times[0, i] = begin, end, end  # nobody to wait for
                begin = end


def evaluate(node: Node, arrays: Mapping[str, np.ndarray]) -> None:
    """Computes a node's meaning on logical arrays, writing into those it writes."""
    scalars: dict[str, Any] = node.scalars
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are found at the logits
        node.op.meaning(**arrays, **scalars)
