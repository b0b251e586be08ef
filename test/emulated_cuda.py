"""A GPU for tests, on the CPU: the kernels as native/cuda/emulation.h runs them, behind the driver's interface.

Memory is the host's, with guards around every allocation that must be found unchanged.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine import abi
from engine.cuda.cublas import CuBLAS
from engine.cuda.hopper import encode
from engine.cuda.launches import Launch
from engine.device.cuda import CUDADevice

ROOT = Path(__file__).parent.parent
CUBLAS = ROOT / "build" / "cuda" / "libcublas_emulation.so"
GUARD = 64  # bytes on either side of an allocation
GUARD_BYTE = 0xA5


class EmulatedDriver:
    records = False
    hopper = True
    processors = 3  # each has room for one block of a launch of blocks that wait for each other

    def __init__(self, library: Any, backwards: bool = False, cublas: bool = False) -> None:
        self.library, self.backwards = library, backwards
        self.description = "emulated GPU" + (" backwards" if backwards else "") + (" with cuBLAS" if cublas else "")
        self.memory: dict[int, np.ndarray] = {}
        self.cublas: CuBLAS | None = CuBLAS(str(CUBLAS), 0, self.allocate) if cublas else None
        self.launched: list[Launch] = []  # for tests that ask what a node became
        self.staged = [np.empty(0, np.uint8)] * 2  # taken in turns
        self.fetched: list[tuple[np.ndarray, np.ndarray]] = []  # what arrives when it is waited for, and where

    def free_memory(self) -> int:
        return 8 << 30

    def allocate(self, size: int) -> int:
        whole = np.full(size + 2 * GUARD + 256, GUARD_BYTE, np.uint8)
        address = -(-(abi.address(whole) + GUARD) // 256) * 256  # as aligned as a GPU's
        start = address - abi.address(whole)
        guarded = whole[start - GUARD : start + size + GUARD]
        guarded[GUARD : GUARD + size] = 0xFF
        self.memory[address] = guarded
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def _bytes(self, address: int, size: int) -> np.ndarray:
        return np.frombuffer(abi.ffi.buffer(abi.ffi.cast("char *", address), size), np.uint8)

    def fill(self, address: int, byte: int, size: int) -> None:
        if size:
            self._bytes(address, size)[:] = byte

    def read(self, address: int, into: np.ndarray) -> None:
        if into.nbytes:
            into.reshape(-1).view(np.uint8)[:] = self._bytes(address, into.nbytes)

    def write(self, address: int, data: np.ndarray) -> None:
        if data.nbytes:
            self._bytes(address, data.nbytes)[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def pin(self, host: np.ndarray) -> None:
        pass

    def staging(self, size: int) -> np.ndarray:
        if self.staged[0].nbytes < size:
            self.staged = [np.empty(size, np.uint8) for _ in range(2)]
        self.staged.reverse()
        return self.staged[0][:size]

    def send(self, address: int, data: np.ndarray) -> None:
        self.write(address, data)

    def fetch(self, address: int, into: np.ndarray) -> None:
        self.fetched.append((self._bytes(address, into.nbytes).copy(), into.reshape(-1).view(np.uint8)))
        into.reshape(-1).view(np.uint8)[:] = 0xFF

    def bind(self, launch: Launch, arguments: bytes) -> Callable[[], None]:
        kernel = abi.ffi.addressof(self.library, f"{launch.kernel}_kernel")
        if launch.map:
            arguments = encode(self.library, launch.map) + arguments
        held = abi.ffi.new("char[]", arguments)

        def call() -> None:
            self.launched.append(launch)
            error = self.library.emulate(kernel, *launch.grid, launch.threads, launch.shared, held,
                                         launch.together, self.backwards)
            assert error == abi.ffi.NULL, f"{launch}: {abi.ffi.string(error).decode()}"

        return call

    def blocks_together(self, kernel: str) -> int:
        return self.processors

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        return launches

    def synchronise(self) -> None:
        for data, into in self.fetched:
            into[:] = data
        self.fetched.clear()
        for address, memory in self.memory.copy().items():  # what is collected meanwhile frees its own
            guards = np.concatenate([memory[:GUARD], memory[-GUARD:]])
            assert (guards == GUARD_BYTE).all(), f"a kernel wrote outside the allocation at {address:#x}"

    def mark(self) -> int:
        return time.perf_counter_ns()

    def nanoseconds(self, marks: Sequence[int]) -> list[int]:
        return list(marks)


class RecordingDriver(EmulatedDriver):
    """Records launches as a CUDA graph does: nothing runs while it records, and all of it when it is replayed."""

    records = True

    def __init__(self) -> None:
        super().__init__(library())
        self.recording: list[Callable[[], None]] | None = None
        self.replays = 0

    def bind(self, launch: Launch, arguments: bytes) -> Callable[[], None]:
        return self.later(super().bind(launch, arguments))

    def later(self, call: Callable[[], None]) -> Callable[[], None]:
        return lambda: call() if self.recording is None else self.recording.append(call)

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        calls: list[Callable[[], None]] = []
        self.recording = calls
        launches()
        self.recording = None

        def replay() -> None:
            self.replays += 1
            for call in calls:
                call()

        return replay


@cache
def library() -> Any:
    """The emulation, built now unless it is up to date; None without a C++ compiler."""
    if shutil.which("c++") is None or shutil.which("make") is None:
        return None
    subprocess.run(["make", "-s", "-f", "native/cuda/build.mk", "emulation"], cwd=ROOT, check=True)
    names = [kernel for source in sorted((ROOT / "native" / "cuda").glob("*.cu")) for kernel in kernels_of(source)]
    abi.ffi.cdef("".join(f"void {name}_kernel(const void *arguments);" for name in names))
    abi.ffi.cdef("""const char *emulate(void (*kernel)(const void *), uint32_t grid_x, uint32_t grid_y, uint32_t grid_z,
                    uint32_t threads, uint32_t shared_bytes, const void *arguments, int32_t together,
                    int32_t backwards);
                    extern int emulated_status, emulated_handles, emulated_products;""")
    return abi.ffi.dlopen(str(ROOT / "build" / "cuda" / "libcuda_emulation.so"))


def kernels_of(source: Path) -> list[str]:
    """The kernels that a source defines, by themselves or for each use of KERNELS(…)."""
    text = source.read_text("utf-8")
    names = re.findall(r"^ *(?:KERNEL|KERNEL_WITH_MAP|ENTRY)\(([\w#]+),", text, re.M)
    parameter = re.findall(r"#define KERNELS\((\w+)", text)
    families = re.findall(r"^KERNELS\((\w+)", text, re.M)
    made = [name.split("##") for name in names if "##" in name]
    return [name for name in names if "##" not in name] + [
        "".join(family if part == parameter[0] else part for part in parts) for family in families for parts in made
    ]


@cache
def emulated_devices() -> tuple[CUDADevice, ...]:
    """The GPU with its threads in order and in reverse: results that differ betray a missing barrier. None where there
    is no C++ compiler."""
    opened = library()
    return () if opened is None else tuple(CUDADevice(EmulatedDriver(opened, order)) for order in (False, True))


@cache
def emulated_hopper() -> tuple[CUDADevice, ...]:
    """The same, with Hopper's own kernels."""
    devices = () if library() is None else tuple(CUDADevice(device.driver) for device in emulated_devices())
    for device in devices:
        device.hopper = True
    return devices


@cache
def emulated_cublas() -> CUDADevice | None:
    """The GPU with its threads in order and cuBLAS."""
    opened = library()
    return CUDADevice(EmulatedDriver(opened, cublas=True)) if opened else None
