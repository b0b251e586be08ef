"""The CUDA device: weights and pages in the memory of a GPU, a plan as launches of kernels on one stream."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import abi, machine
from engine.cuda import hopper, launches
from engine.cuda.arena import STAGED, StagedArena
from engine.cuda.device_array import Allocation, DeviceArray
from engine.cuda.driver import open_driver
from engine.cuda.launches import Launch, ceil_div, row_bytes
from engine.cuda.panels import Panels
from engine.cuda.program import CUDAProgram, exchanged_bytes
from engine.device import ALONE, Cancelled, Device, Place, Program, Progress, failure
from engine.errors import RillError, UsageError
from engine.files.packed_cache import load_arena
from engine.int8 import Int8Array, dequantise, quantise
from engine.quantised import Format

if TYPE_CHECKING:
    from engine.cuda.driver import Driver
    from engine.layer import Weight
    from engine.plan import Node, Plan, Tensor

UINT8 = np.dtype(np.uint8)
PANEL = int(abi.constants.PANEL)


def open(isa: str, threads: int | None, place: Place = ALONE) -> CUDADevice:
    if isa != "auto":
        raise UsageError(f"isa {isa!r}: the cuda device has none to choose")
    return CUDADevice(open_driver(place))


class Mirror:
    """Memory of the host that it goes on writing into, and its copy on the device."""

    def __init__(self, driver: Driver, host: np.ndarray) -> None:
        self.driver, self.host = driver, host
        self.start = abi.address(host)
        self.allocation = Allocation(driver, host.nbytes)
        driver.pin(host)

    def send(self) -> None:
        self.driver.send(self.allocation.address, self.host)

    def address_of(self, array: np.ndarray) -> int:
        return self.allocation.address + abi.address(array) - self.start


class CUDADevice(Device):
    """fuses: whether plans lowered from now on have some nodes launched together (engine/cuda/fusion.py); not where the
    environment has RILL_CUDA_FUSION=0. persists: whether their launches of few rows are merged
    (engine/cuda/persistent.py): where it has RILL_CUDA_PERSISTENT=1. cublas: what multiplies many rows in them; None:
    our own kernels. hopper: whether attention of many rows is by what only Hopper has (engine/cuda/hopper.py)."""

    type = "cuda"

    def __init__(self, driver: Driver) -> None:
        self.fuses = os.environ.get("RILL_CUDA_FUSION", "") != "0"
        self.persists = os.environ.get("RILL_CUDA_PERSISTENT", "") == "1"
        self.driver, self.description, self.cublas = driver, driver.description, driver.cublas
        self.hopper = hopper.wanted(driver)
        if self.hopper:
            self.description += ", attention by wgmma"
        self.stop, self.notes, self.details = False, [], []
        self.control = DeviceArray(Allocation(driver, abi.ffi.sizeof("struct control")), (3,), np.dtype(np.int32))
        self.control[:] = 0
        self.status = np.zeros(self.control.shape, self.control.dtype)  # what it held when it was last waited for
        driver.pin(self.status)
        self.mirrors: weakref.WeakKeyDictionary[Tensor, Mirror] = weakref.WeakKeyDictionary()

    # Storage: a DeviceArray, of a dense tensor in its logical shape, of any other its bytes. A shared tensor's is the
    # host's array, with a mirror on the device.

    def allocate(self, tensors: Sequence[Tensor]) -> None:
        if tensors[0].layout == "cache":
            for tensor in tensors:
                tensor.storage = self._zeroed((self._cache_bytes(tensor),), UINT8)
            return
        sizes = [int(np.prod(t.shape, dtype=np.int64)) * t.dtype.itemsize for t in tensors]
        buffer = self._zeroed((max(sizes),), UINT8)
        for tensor in tensors:
            tensor.storage = buffer.part(0, tensor.shape, tensor.dtype)

    def _zeroed(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        array = self._array(shape, dtype)
        self.driver.fill(array.address, 0, array.nbytes)
        return array

    def _array(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        free = self.driver.free_memory()
        if size > free:
            raise RillError(f"GPU memory: {size:,} bytes are needed, {free:,} are free: take a smaller model, or a "
                            "shorter context")  # fmt: skip
        return DeviceArray(Allocation(self.driver, max(size, 1)), shape, dtype)

    def scratch(self, size: int) -> DeviceArray:
        """Memory for kernels to work in."""
        return self._array((size,), UINT8)

    def zeroed(self, size: int) -> DeviceArray:
        """The same, of zeros."""
        return self._zeroed((size,), UINT8)

    def load(self, weights: Sequence[Weight], progress: Progress | None = None, cache: bool = False) -> None:
        arena = StagedArena(self.driver, self._place(weights))
        load_arena(self, weights, arena, self._load, progress, cache)
        self.driver.synchronise()

    def _place(self, weights: Sequence[Weight]) -> DeviceArray:
        """Gives all weights their memory, one after another, and returns it."""
        sizes = [self.weight_bytes(weight) for weight in weights]
        arena, start = self._array((sum(sizes),), UINT8), 0
        for weight, size in zip(weights, sizes, strict=True):
            memory = arena.part(start, (size,), UINT8)
            weight.storage = memory if weight.layout == "matrix" else memory.part(0, weight.shape, weight.dtype)
            start += size
        return arena

    def _load(self, weight: Weight) -> None:
        if weight.layout != "matrix":
            self._load_dense(weight)
        elif weight.group:
            self._load_quantised(weight)
        else:
            self._load_matrix(weight)

    def _load_dense(self, weight: Weight) -> None:
        parts = [s.read() if hasattr(s, "read") else np.asarray(s) for s in weight.sources]
        values = np.concatenate([part.astype(weight.dtype) for part in parts])
        padded = np.zeros(self.weight_bytes(weight), np.uint8)  # so that no byte is left as it was
        padded[: values.nbytes] = values.reshape(-1).view(np.uint8)
        self.driver.write(weight.storage.address, padded)

    def _load_matrix(self, weight: Weight) -> None:
        """Reads rows into one small pinned buffer while another is on its way."""
        size, width = self._row_bytes(weight), weight.shape[1] * weight.dtype.itemsize
        step = max(1, STAGED // max(size, 1))
        for start in range(0, weight.shape[0], step):
            stop = min(start + step, weight.shape[0])
            staged = self.driver.staging((stop - start) * size).reshape(stop - start, size)
            staged[:, :width] = np.ascontiguousarray(weight.stacked_rows(start, stop)).view(np.uint8)
            staged[:, width:] = 0
            self.driver.send(weight.storage.address + start * size, staged)

    def _load_quantised(self, weight: Weight) -> None:
        layout, address = panels_of(weight), weight.storage.address
        for first, rows in weight.each_slice(weight.quantised_rows, machine.available_cores()):
            packed = layout.pack(rows).reshape(-1)
            staged = self.driver.staging(packed.nbytes)
            staged[:] = packed
            self.driver.send(address + first // PANEL * layout.bytes, staged)

    def _row_bytes(self, weight: Tensor) -> int:
        return row_bytes(weight.shape[1], weight.dtype.itemsize)

    def weight_bytes(self, weight: Weight) -> int:
        if weight.group:
            return ceil_div(weight.shape[0], PANEL) * panels_of(weight).bytes
        if weight.layout == "matrix":
            return weight.shape[0] * self._row_bytes(weight)
        return row_bytes(int(np.prod(weight.shape, dtype=np.int64)), weight.dtype.itemsize)

    def cache_bytes(self, dtype: np.dtype, head_dim: int) -> int:
        scale = 4 if dtype == abi.INT8 else 0
        return int(2 * abi.constants.PAGE * (row_bytes(head_dim, dtype.itemsize) + scale))

    def _cache_bytes(self, tensor: Tensor) -> int:
        pages, _, heads, _, head_dim = tensor.shape
        return pages * heads * self.cache_bytes(tensor.dtype, head_dim)

    def upload(self, tensor: Tensor, array: np.ndarray) -> None:
        if tensor.storage is None:
            self.allocate([tensor])
        if tensor.layout == "cache":
            tensor.storage[:] = pack_cache(tensor, array)
        else:
            tensor.owner.storage[...] = array

    def share(self, tensor: Tensor, array: np.ndarray) -> None:
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        mirror = next((m for m in self.mirrors.values() if m.start == abi.address(root)), None)
        tensor.storage = array
        self.mirrors[tensor] = mirror or Mirror(self.driver, root.reshape(-1).view(np.uint8))

    def download(self, tensor: Tensor) -> Any:
        if tensor.layout == "matrix":
            return DeviceMatrix(tensor)
        if tensor.layout == "cache":
            return unpack_cache(tensor)
        array = tensor.owner.storage
        count = rows_in_use(tensor)
        array = array[:count].copy() if isinstance(array, np.ndarray) else array.rows(0, count)
        return array[..., tensor.column : tensor.column + tensor.width] if tensor.base else array

    def address(self, tensor: Tensor) -> int:
        owner = tensor.owner
        start = self.mirrors[owner].address_of(owner.storage) if owner in self.mirrors else owner.storage.address
        return int(start + tensor.column * tensor.dtype.itemsize)

    # What the GPU can do at best.

    def read_limit(self, size: int = 2 << 30) -> float:
        """Bytes a second that are read from its memory: the limit of decoding. Measured now, the best of a few."""
        memory = self._array((min(size, self.driver.free_memory() // 2),), UINT8)
        self.driver.fill(memory.address, 0x5A, memory.nbytes)
        launch = launches.read_memory(memory.nbytes // 16)
        return memory.nbytes / self._least_seconds(launch, [memory.address, memory.nbytes // 16, 0])

    def multiply_limit(self, dtype: np.dtype, rounds: int = 20_000) -> float:
        """Floating-point operations a second of products with weights or a cache of that dtype: bf16 and quants by
        tensor cores, where there is cuBLAS f16, too, and the rest by multiply-adds. Measured now, the best of a few."""
        adds = dtype == abi.FLOAT32 or (dtype == abi.FLOAT16 and not self.cublas)
        launch, operations = launches.multiply("f32" if adds else "bf16")
        return operations * rounds / self._least_seconds(launch, [0, 0, rounds])

    def _least_seconds(self, launch: Launch, numbers: list[int]) -> float:
        scratch = self._zeroed((16,), UINT8)
        team = [self.control.address, scratch.address, 0]
        run = self.driver.bind(launch, np.array(numbers + team, np.uint64).tobytes())
        times = []
        for _ in range(5):
            marks = [self.driver.mark()]
            run()
            marks.append(self.driver.mark())
            begin, end = self.driver.nanoseconds(marks)
            times.append(max(end - begin, 1) * 1e-9)
        return min(times)

    # Replay.

    def runs(self, op_name: str) -> bool:
        return hasattr(launches, op_name)

    def lower(self, plan: Plan) -> Program:
        return CUDAProgram(self, plan)

    def cancel(self, flag: bool) -> None:
        self.stop = flag

    def wait(self) -> None:
        """Waits until all that has been launched is done. Raises what became of it."""
        self.driver.fetch(self.control.address, self.status)
        self.driver.synchronise()
        _, status, detail = self.status.tolist()
        if status:
            self.control[:] = 0
        if self.stop:
            raise Cancelled
        if status:
            raise failure(status, detail)

    @contextmanager
    def exchanged(self, node: Node) -> Iterator[dict[str, np.ndarray]]:
        """Copies of the rows in pinned memory, which are waited for once, together with the nodes before."""
        staged, arrays = self.driver.staging(exchanged_bytes(node)), {}
        for name, tensor in node.tensors.items():
            assert tensor.base is None, "only whole rows lie in one piece"
            shape = rows_in_use(tensor), *tensor.shape[1:]
            size = int(np.prod(shape)) * tensor.dtype.itemsize
            arrays[name], staged = staged[:size].view(tensor.dtype).reshape(shape), staged[size:]
            self.driver.fetch(self.address(tensor), arrays[name])
        self.wait()
        yield arrays
        for name in node.op.writes:
            self.driver.send(self.address(node.tensors[name]), arrays[name])


def rows_in_use(tensor: Tensor) -> int:
    return int(tensor.rows.storage[0]) if tensor.rows else tensor.shape[0]


def panels_of(matrix: Tensor) -> Panels:
    return Panels(Format(matrix.dtype, matrix.group), matrix.shape[1])


class DeviceMatrix:
    """A matrix as the oracle sees it: rows are fetched and widened when they are asked for."""

    group = 0  # products with it round nothing to 8 bits: the other operand of a quantised one is bf16

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return self._fetch(start, stop - start)
        return np.concatenate([self._fetch(int(row), 1) for row in rows])

    def _fetch(self, first: int, count: int) -> np.ndarray:
        if not self.tensor.group:
            values = self._raw(first, count, row_bytes(self.shape[1], self.dtype.itemsize)).view(self.dtype)
            return values[:, : self.shape[1]].astype(np.float32)
        layout, panel = panels_of(self.tensor), first // PANEL
        panels = self._raw(panel, ceil_div(first + count, PANEL) - panel, layout.bytes)
        return layout.unpack(panels)[first - panel * PANEL :][:count]

    def _raw(self, first: int, count: int, size: int) -> np.ndarray:
        """Some of the pieces of so many bytes that the matrix is made of."""
        return self.tensor.storage.part(first * size, (count, size), UINT8).copy()


def _cache_views(tensor: Tensor, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Writable views of a cache's bytes: [pages, 2, heads, PAGE, head_dim], and the scales of int8 without the last."""
    pages, _, heads, page, head_dim = tensor.shape
    size = row_bytes(head_dim, tensor.dtype.itemsize)
    count = pages * heads * 2 * page * size
    positions = raw[:count].view(tensor.dtype).reshape(pages, heads, 2, page, -1)[..., :head_dim]
    scales = raw[count:].view(np.float32).reshape(pages, heads, 2, page) if tensor.dtype == abi.INT8 else None
    return positions.swapaxes(1, 2), None if scales is None else scales.swapaxes(1, 2)


def unpack_cache(tensor: Tensor) -> np.ndarray:
    """The logical cache; what int8 stands for as float32."""
    values, scales = _cache_views(tensor, tensor.storage.copy())
    return values if scales is None else dequantise(values, scales).view(Int8Array)


def pack_cache(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """The bytes of a logical cache."""
    raw = np.zeros(tensor.storage.shape, np.uint8)
    values, scales = _cache_views(tensor, raw)
    if scales is not None:
        array, scales[...] = quantise(array)
    values[...] = array
    return raw
