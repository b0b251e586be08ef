"""The CPU device: packs weights for the kernels and replays a whole plan in one native call."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import abi, machine
from engine.cpu import huge_pages
from engine.cpu.huge_pages import ALIGNMENT
from engine.cpu.program import NativeProgram, check_not_forked
from engine.device import ALONE, Device, Place, Program, Progress
from engine.errors import RillError, UsageError
from engine.files.packed_cache import HostArena, load_arena
from engine.pages import pack_cache, unpack_cache
from engine.quantised import Format, QuantisedMatrix, check_range

if TYPE_CHECKING:
    from engine.layer import Weight
    from engine.plan import Plan, Tensor

SLICE = 4096  # rows of a matrix that the oracle sees unpacked at once
SETTLED = 0.2  # seconds in which new threads come to cores of their own; beside another program it took 0.13


def available_isas() -> list[str]:
    """The ISAs that have been built and that this CPU and operating system run, best last."""
    if not (abi.LIBRARIES / "libengine_baseline.so").exists():
        return []
    baseline = abi.open_library("baseline")
    built = [isa for isa in abi.ISAS if (abi.LIBRARIES / f"libengine_{isa}.so").exists()]
    return [isa for isa in built if baseline.isa_supported(isa.encode())]


def choose_isa(wanted: str) -> tuple[str, str]:
    """The ISA to open and why. "avx512" means the best of its family, RILL_ISA stands below an explicit choice."""
    why = "asked for"
    if wanted == "auto":
        wanted, why = os.environ.get("RILL_ISA") or "auto", "from RILL_ISA"
    available = available_isas()
    if not available:
        raise RillError(f"no cpu device: {abi.why_no_libraries()}; device='numpy' runs without")
    if wanted == "auto":
        return available[-1], "the best here"
    family = [isa for isa in available if isa.startswith(wanted)] if wanted == "avx512" else []
    if family:
        return family[-1], why
    if wanted not in available:
        raise UsageError(f"isa {wanted!r} ({why}): this machine has {', '.join(available)}")
    return wanted, why


def choose_threads(wanted: int | None, sharing: int = 1) -> tuple[int, str]:
    """How many threads and why, where so many processes share the cores. OMP_NUM_THREADS stands below an explicit
    choice."""
    if wanted is not None:
        if not 1 <= wanted <= 1024:
            raise UsageError(f"threads {wanted}: expected 1 to 1024")
        return wanted, "asked for"
    from_environment = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if from_environment.isdecimal() and int(from_environment) > 0:
        return min(int(from_environment), 1024), "from OMP_NUM_THREADS"
    cores = machine.available_cores()
    if sharing == 1:
        return cores, "one a core"
    oversubscribed = ": oversubscribed" if sharing > cores else ""
    return max(1, cores // sharing), f"{sharing} ranks share {cores} cores{oversubscribed}"


def open(isa: str, threads: int | None, place: Place = ALONE) -> CPUDevice:
    chosen, why = choose_isa(isa)
    count, why_count = choose_threads(threads, place.sharing)
    device = CPUDevice(chosen, count)
    device.description = f"{chosen} ({why}), {count} threads ({why_count})"
    return device


class CPUDevice(Device):
    type = "cpu"

    def __init__(self, isa: str, threads: int) -> None:
        self.isa, self.threads = isa, threads
        if isa not in available_isas():  # to ask is what makes the kernel allow AMX
            raise UsageError(f"isa {isa!r}: this machine has {', '.join(available_isas())}")
        self.description = f"{isa}, {threads} threads"
        self.library = abi.open_library(isa)
        self.control = abi.ffi.new("struct control *")
        self.arena = huge_pages.reserve(1)  # the weights of the last load, one after another
        self.notes, self.details = [], []

    # Storage. A dense tensor's is an ndarray of its logical shape, any other's the bytes that the kernels read.

    def allocate(self, tensors: Sequence[Tensor]) -> None:
        if tensors[0].layout == "cache":
            for tensor in tensors:
                tensor.storage = huge_pages.reserve(self._cache_bytes(tensor))
            return
        buffer = huge_pages.reserve(max(np.prod(t.shape, dtype=np.int64) * t.dtype.itemsize for t in tensors))
        for tensor in tensors:
            count = int(np.prod(tensor.shape, dtype=np.int64))
            tensor.storage = buffer[: count * tensor.dtype.itemsize].view(tensor.dtype).reshape(tensor.shape)

    def load(self, weights: Sequence[Weight], progress: Progress | None = None, cache: bool = False) -> None:
        check_not_forked()
        self._place(weights)
        load_arena(self, weights, HostArena(self.arena), self._load, progress, cache)
        self.library.release_threads()  # steps have another thread

    def _place(self, weights: Sequence[Weight]) -> None:
        """Gives all weights their memory, one after another."""
        sizes = [self.weight_bytes(weight) for weight in weights]
        self.arena, start = huge_pages.reserve(sum(sizes)), 0
        for weight, size in zip(weights, sizes, strict=True):
            memory = self.arena[start : start + size]
            start += size
            if weight.layout == "matrix":
                weight.storage = memory
            else:
                count = int(np.prod(weight.shape, dtype=np.int64))
                weight.storage = memory[: count * weight.dtype.itemsize].view(weight.dtype).reshape(weight.shape)

    def _load(self, weight: Weight) -> None:
        if weight.layout != "matrix":
            parts = [s.read() if hasattr(s, "read") else np.asarray(s) for s in weight.sources]
            weight.storage[...] = np.concatenate([part.astype(weight.dtype) for part in parts])
        elif weight.group:
            self._pack_quantised(weight)
        elif any(hasattr(source, "rows") and not hasattr(source, "file") for source in weight.sources):
            self._pack_decoded(weight)
        else:
            self._pack(weight, weight.sources, 0, weight.shape[0])

    def _pack_decoded(self, weight: Weight) -> None:
        for first, last in weight.slices():
            self._pack(weight, [weight.stacked_rows(first, last)], first, last - first)

    def _pack_quantised(self, weight: Weight) -> None:
        def pack(first: int, last: int) -> None:
            self._pack_quants(weight, first, weight.quantised_rows(first, last, self.quantise))

        for _ in weight.each_slice(pack, self.threads):
            pass

    def quantise(self, values: np.ndarray, format: Format, name: str) -> QuantisedMatrix:
        """engine.quantised.quantise, faster."""
        check_range(values, format, name)
        values = np.ascontiguousarray(values, np.float32)
        quants = np.empty(values.shape, np.uint8)
        scales = np.empty((values.shape[0], -(-values.shape[1] // format.group)), np.float16)
        cast, address = abi.ffi.cast, abi.address
        self.library.quantise_rows(cast("float *", address(values)), *values.shape, abi.DTYPE_CODES[format.dtype],
                                   format.group, cast("uint8_t *", address(quants)),
                                   cast("uint16_t *", address(scales)))  # fmt: skip
        return QuantisedMatrix(format, quants, scales)

    def _pack_quants(self, weight: Weight, first: int, rows: QuantisedMatrix) -> None:
        arrays = [np.ascontiguousarray(a) for a in (rows.quants, rows.scales, rows.minimums) if a is not None]
        pointers = [abi.ffi.cast("void *", abi.address(array)) for array in arrays] + [abi.ffi.NULL]
        self.library.pack_quantised(*pointers[:3], *rows.shape, abi.DTYPE_CODES[weight.dtype], weight.group,
                                    self._panels(weight, first))  # fmt: skip

    def _panels(self, weight: Weight, row: int) -> Any:
        """The address of the panel that begins with a row."""
        offset = row // abi.constants.PANEL * self.panel_bytes(weight)
        return abi.ffi.cast("void *", abi.address(weight.storage) + offset)

    def _pack(self, weight: Weight, stacked: Sequence[Any], first: int, count: int) -> None:
        """Packs sources as `count` rows of a weight, from row `first` on, a multiple of a panel's."""
        from engine.layer import stored_dtype

        sources = abi.ffi.new("struct source[]", len(stacked))
        files: dict[Any, int] = {}
        keep_alive = []
        source: Any
        try:
            for entry, source in zip(sources, stacked, strict=True):
                entry.dtype, entry.rows = abi.DTYPE_CODES[stored_dtype(source)], source.shape[0]
                if hasattr(source, "file"):
                    if source.file not in files:
                        files[source.file] = os.open(source.file, os.O_RDONLY)
                    entry.fd, entry.offset = files[source.file], source.offset
                else:
                    keep_alive.append(np.ascontiguousarray(source, stored_dtype(source)))
                    entry.fd, entry.data = -1, abi.ffi.cast("void *", abi.address(keep_alive[-1]))
            short = self.library.pack_matrix(sources, len(sources), count, weight.shape[1],
                                             abi.DTYPE_CODES[weight.dtype], self._panels(weight, first),
                                             self.threads)  # fmt: skip
        finally:
            for fd in files.values():
                os.close(fd)
        if short < 0:
            raise RillError(f"{weight.name}: no memory left to read it")
        if short:
            source = stacked[short - 1]
            raise RillError(f"{source.file}: ends before the data of tensor {source.name}")

    def weight_bytes(self, weight: Weight) -> int:
        if weight.layout == "matrix":
            size = -(-weight.shape[0] // abi.constants.PANEL) * self.panel_bytes(weight)
        else:
            size = int(np.prod(weight.shape, dtype=np.int64)) * weight.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    def panel_bytes(self, weight: Weight) -> int:
        """Of PANEL rows of a packed matrix."""
        return int(self.library.packed_panel_bytes(abi.DTYPE_CODES[weight.dtype], weight.group, weight.shape[1]))

    def cache_bytes(self, dtype: np.dtype, head_dim: int) -> int:
        return int(self.library.kv_head_bytes(abi.DTYPE_CODES[dtype], head_dim))

    def _cache_bytes(self, tensor: Tensor) -> int:
        pages, _, heads, _, head_dim = tensor.shape
        return pages * heads * self.cache_bytes(tensor.dtype, head_dim)

    def upload(self, tensor: Tensor, array: np.ndarray) -> None:
        if tensor.storage is None:
            self.allocate([tensor])
        if tensor.layout == "cache":
            pack_cache(tensor, array)
        else:
            tensor.owner.storage[...] = array

    def share(self, tensor: Tensor, array: np.ndarray) -> None:
        tensor.storage = array

    def download(self, tensor: Tensor) -> Any:
        if tensor.layout == "matrix":
            return PackedMatrix(self, tensor)
        return unpack_cache(tensor) if tensor.layout == "cache" else self.view(tensor).copy()

    def view(self, tensor: Tensor) -> np.ndarray:
        array = tensor.owner.storage
        if tensor.base:
            array = array[..., tensor.column : tensor.column + tensor.width]
        return array[: int(tensor.rows.storage[0])] if tensor.rows else array

    def pointer(self, tensor: Tensor) -> Any:
        return abi.ffi.cast("void *", abi.address(tensor.owner.storage) + tensor.column * tensor.dtype.itemsize)

    def read_limit(self, memory: np.ndarray | None = None) -> float:
        """Bytes a second at which these threads read a memory in one go, by default that of the weights: the limit of
        decoding. Measured now, the best of a few access patterns."""
        memory = self.arena if memory is None else memory
        data, size, best = abi.ffi.cast("void *", abi.address(memory)), memory.nbytes, 0.0
        for streams in (1, 2, 4, 8):
            start = time.perf_counter()
            self.library.read_memory(data, size, self.threads, streams)
            best = max(best, size / (time.perf_counter() - start))
        self.library.release_threads()
        return best

    def multiply_limit(self, dtype: np.dtype) -> float:
        """Floating-point operations a second of products with weights or a cache of that dtype, everything in
        registers: the limit of prompts. Measured now, the best of many milliseconds."""
        best, end = 0.0, time.perf_counter() + SETTLED
        while (start := time.perf_counter()) < end:
            operations = self.library.multiply_in_registers(abi.DTYPE_CODES[dtype], 1_000_000, self.threads)
            best = max(best, operations / (time.perf_counter() - start))
        self.library.release_threads()
        return best

    # Replay.

    def runs(self, op_name: str) -> bool:
        return hasattr(self.library, op_name)

    def lower(self, plan: Plan) -> Program:
        return NativeProgram(self, plan)

    def cancel(self, flag: bool) -> None:
        self.control.cancel = flag


class PackedMatrix:
    """A packed matrix as the oracle sees it: rows unpack to float32 when they are asked for."""

    def __init__(self, device: CPUDevice, tensor: Tensor) -> None:
        self.device, self.tensor = device, tensor
        self.shape, self.dtype, self.group = tensor.shape, tensor.dtype, tensor.group

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return self._unpack(start, stop - start)
        return np.concatenate([self._unpack(int(row), 1) for row in rows])

    def _unpack(self, first: int, count: int) -> np.ndarray:
        out = np.empty((count, self.shape[1]), np.float32)
        self.device.library.unpack_matrix(self.device.pointer(self.tensor), abi.DTYPE_CODES[self.dtype],
                                          self.group, self.shape[1], first, count,
                                          abi.ffi.cast("float *", abi.address(out)))  # fmt: skip
        return out
