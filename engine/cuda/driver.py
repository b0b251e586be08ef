"""The GPU itself, through PyCUDA: memory, copies, kernels, time. Emulation (test/emulated_cuda.py) does the same."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine import abi
from engine.cuda.cooperative import Cooperative, open_library
from engine.cuda.cublas import CuBLAS, open_cublas
from engine.cuda.device_array import Memory
from engine.cuda.hopper import encode
from engine.cuda.kernels import built_kernels, find_nvcc, prebuilt_kernels
from engine.cuda.launches import Launch
from engine.device import ALONE, Place
from engine.errors import RillError


class Driver(Memory, Protocol):
    """What the device needs of a GPU. Everything happens in order, on one stream."""

    description: str
    records: bool  # whether launches can be recorded and replayed as one
    cublas: CuBLAS | None
    hopper: bool  # whether it is a GPU with wgmma and TMA

    def free_memory(self) -> int: ...
    def fill(self, address: int, byte: int, size: int) -> None: ...
    def pin(self, host: np.ndarray) -> None:
        """Keeps memory of the host where it is, so that `send` need not wait."""

    def staging(self, size: int) -> np.ndarray:
        """Bytes of pinned memory to be filled and sent, when what was last sent from there has arrived."""

    def send(self, address: int, data: np.ndarray) -> None:
        """Like write, but does not wait. `data` is pinned and stays as it is until the stream has been waited for."""

    def fetch(self, address: int, into: np.ndarray) -> None:
        """Like read, but does not wait: what has arrived counts when the stream has been waited for. `into` is
        pinned."""

    def bind(self, launch: Launch, arguments: bytes) -> Callable[[], None]:
        """A launch, ready to be called."""

    def blocks_together(self, kernel: str) -> int:
        """How many blocks of THREADS threads of a kernel the GPU has room for at once."""

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        """All that the call launches, as one."""

    def synchronise(self) -> None: ...
    def mark(self) -> Any:
        """A point in the stream, for nanoseconds()."""

    def nanoseconds(self, marks: Sequence[Any]) -> list[int]:
        """When the stream passed them; waits for the last."""


def open_driver(place: Place = ALONE) -> Driver:
    """The first GPU; ranks take those that they see in turns. Raises RillError saying what is missing."""
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        missing = getattr(error, "name", "") or ""
        if missing.partition(".")[0] == "pycuda":
            raise RillError("device cuda needs PyCUDA: pip install 'rill-engine[cuda]'") from None
        raise RillError(f"no cuda device: {error}") from None
    try:
        cuda.init()
        count = cuda.Device.count()
    except cuda.Error as error:
        raise RillError(f"no cuda device: {error}") from None
    if count == 0:
        raise RillError("no cuda device: this machine has no GPU that CUDA can use")
    index = place.rank % count
    driver = PyCUDADriver(cuda, index)
    if place.ranks > 1:
        driver.description += f", GPU {index} of {count} by local rank"
    return driver


class PyCUDADriver:
    """One GPU by its primary context, which other libraries in the process share."""

    records = True

    def __init__(self, cuda: Any, index: int = 0) -> None:
        self.cuda = cuda
        gpu = cuda.Device(index)
        self.context, self.local = gpu.retain_primary_context(), threading.local()
        self.closed = False
        self._enter()
        major, minor = gpu.compute_capability()
        self.description = f"{gpu.name()} (sm_{major}{minor})"
        self.hopper = (major, minor) == (9, 0)
        self.modules = self._load("90a" if self.hopper else f"{major}{minor}")
        self.stream = cuda.Stream()
        self.functions: dict[str, Any] = {}
        self.allocations: dict[int, Any] = {}
        self.staged: list[tuple[np.ndarray, Any]] = []  # pinned memory, and the event that ends its copy
        self.pinned: list[Any] = []
        self.graphs = Graphs(self.stream.handle)
        self.gpu = gpu
        self.cooperative: Cooperative | None = None
        self.cublas: CuBLAS | None = None
        atexit.register(self.close)
        self.cublas, phrase = open_cublas(self.stream.handle, self.allocate)
        self.description += f", {phrase}"

    def _enter(self) -> None:
        """CUDA wants the context pushed once in every thread that calls it."""
        if not hasattr(self.local, "current"):
            self.local.current = Current(self.context)

    def close(self) -> None:
        """Gives everything back while CUDA still can: PyCUDA ends the process with an error where it finds a context
        in use, or memory, after that."""
        self._enter()
        self.closed = True
        self.stream.synchronize()
        if self.cublas:
            self.cublas.close()
        for memory in self.allocations.values():
            memory.free()
        for held in (self.allocations, self.functions, self.modules, self.staged, self.pinned):
            held.clear()
        del self.stream
        self.local.current.leave()

    def _load(self, arch: str) -> list[Any]:
        """The prebuilt kernels; where they are missing, stale or of no use to this GPU, those of its own."""
        try:
            return self._open(prebuilt_kernels(arch))
        except self.cuda.Error as error:
            reason = (f"no cuda device: no kernels for this GPU (sm_{arch}, {error}); build them for it: "
                      f"make CUBINS={arch} cuda")  # fmt: skip
        except RillError as error:
            reason = str(error)
        if (nvcc := find_nvcc()) is None:
            raise RillError(reason)
        files = built_kernels(nvcc, arch)
        try:
            return self._open(files)
        except self.cuda.Error as error:
            raise RillError(f"no cuda device: what was built for this GPU cannot be loaded (sm_{arch}, {error}); "
                            f"delete {files[0].parent}") from None  # fmt: skip

    def _open(self, files: Sequence[Path]) -> list[Any]:
        self.files = files
        return [self.cuda.module_from_file(str(file)) for file in files]

    # Memory.

    def free_memory(self) -> int:
        self._enter()
        return int(self.cuda.mem_get_info()[0])

    def allocate(self, size: int) -> int:
        self._enter()
        try:
            memory = self.cuda.mem_alloc(size)
        except self.cuda.MemoryError:
            free = self.free_memory()
            raise RillError(f"GPU memory: {size:,} bytes are needed in one piece, {free:,} are free") from None
        self.allocations[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        if not self.closed:
            self._enter()
            self.allocations.pop(address).free()  # waits for what is running

    def fill(self, address: int, byte: int, size: int) -> None:
        self._enter()
        self.cuda.memset_d8_async(address, byte, size, self.stream)

    def read(self, address: int, into: np.ndarray) -> None:
        self.fetch(address, into)
        self.stream.synchronize()

    def fetch(self, address: int, into: np.ndarray) -> None:
        self._enter()
        if into.nbytes:
            self.cuda.memcpy_dtoh_async(into, address, self.stream)

    def write(self, address: int, data: np.ndarray) -> None:
        self.send(address, np.ascontiguousarray(data))
        self.stream.synchronize()

    def pin(self, host: np.ndarray) -> None:
        self._enter()
        try:
            self.pinned.append(self.cuda.register_host_memory(host))
        except self.cuda.Error:
            pass  # copies wait a little, and that is all

    def staging(self, size: int) -> np.ndarray:
        self._enter()
        if len(self.staged) < 2 or self.staged[0][0].nbytes < size:
            self.stream.synchronize()
            self.staged = [(self.cuda.pagelocked_empty(size, np.uint8), self.cuda.Event()) for _ in range(2)]
        buffer, arrived = self.staged.pop(0)
        arrived.synchronize()
        self.staged.append((buffer, arrived))
        return buffer[:size]

    def send(self, address: int, data: np.ndarray) -> None:
        self._enter()
        if not data.nbytes:
            return
        self.cuda.memcpy_htod_async(address, data, self.stream)
        for buffer, arrived in self.staged:
            if np.may_share_memory(buffer, data):
                arrived.record(self.stream)

    # Kernels.

    def _function(self, name: str) -> Any:
        for module in self.modules:
            try:
                return module.get_function(name)
            except self.cuda.Error:
                continue
        raise RillError(f"the CUDA kernels were built from other sources ({name} is missing): run `make cuda`")

    def bind(self, launch: Launch, arguments: bytes) -> Callable[[], None]:
        self._enter()
        if launch.together:
            return self._cooperative().bind(launch, arguments)
        if launch.kernel not in self.functions:
            self.functions[launch.kernel] = self._function(launch.kernel)
        function = self.functions[launch.kernel]
        if launch.shared > 48 << 10:  # more than every kernel may have by itself
            function.set_attribute(self.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared)
        if launch.map:
            arguments = encode(abi.ffi.dlopen("libcuda.so.1"), launch.map) + arguments
        function.prepare([f"{len(arguments)}s"])
        block = (launch.threads, 1, 1)
        return lambda: function.prepared_async_call(launch.grid, block, self.stream, arguments,
                                                    shared_size=launch.shared)  # fmt: skip

    def blocks_together(self, kernel: str) -> int:
        self._enter()
        return self._cooperative().blocks(kernel)

    def _cooperative(self) -> Cooperative:
        if self.cooperative is None:
            processors = self.gpu.get_attribute(self.cuda.device_attribute.MULTIPROCESSOR_COUNT)
            self.cooperative = Cooperative(open_library(), self.files, processors, self.stream.handle)
        return self.cooperative

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        self._enter()
        return self.graphs.record(launches)

    def synchronise(self) -> None:
        self._enter()
        self.stream.synchronize()

    def mark(self) -> Any:
        self._enter()
        return self.cuda.Event().record(self.stream)

    def nanoseconds(self, marks: Sequence[Any]) -> list[int]:
        marks[-1].synchronize()
        start = time.perf_counter_ns() - int(marks[-1].time_since(marks[0]) * 1e6)
        return [start + int(mark.time_since(marks[0]) * 1e6) for mark in marks]


class Current:
    """A context, pushed in this thread until the thread ends: kept in a threading.local, it goes with its thread."""

    def __init__(self, context: Any) -> None:
        self.context = context
        context.push()

    def leave(self) -> None:
        if self.context is not None:
            self.context.pop()
            self.context = None

    __del__ = leave


class Graphs:
    """CUDA graphs, which PyCUDA does not know: the driver's own calls."""

    CALLS = """
        int cuStreamBeginCapture_v2(void *stream, int mode);
        int cuStreamEndCapture(void *stream, void **graph);
        int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags);
        int cuGraphLaunch(void *executable, void *stream);
        int cuGraphDestroy(void *graph);
    """
    RELAXED = 2  # memory may be given back meanwhile: see CUstreamCaptureMode

    def __init__(self, stream: int) -> None:
        if not hasattr(abi.ffi, "has_cuda_graphs"):
            abi.ffi.cdef(self.CALLS)
            abi.ffi.has_cuda_graphs = True
        self.library: Any = abi.ffi.dlopen("libcuda.so.1")
        self.stream = abi.ffi.cast("void *", stream)

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        library, graph, executable = self.library, abi.ffi.new("void **"), abi.ffi.new("void **")
        self._check(library.cuStreamBeginCapture_v2(self.stream, self.RELAXED))
        try:
            launches()
        finally:
            status = library.cuStreamEndCapture(self.stream, graph)
        self._check(status)
        self._check(library.cuGraphInstantiateWithFlags(executable, graph[0], 0))
        self._check(library.cuGraphDestroy(graph[0]))
        return lambda: self._check(library.cuGraphLaunch(executable[0], self.stream))

    def _check(self, status: int) -> None:
        if status:
            raise RillError(f"a CUDA graph: the driver reports error {status}")
