"""Launches of blocks that wait for each other, which PyCUDA does not know: the driver's own calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from engine import abi
from engine.cuda.launches import Launch, n
from engine.errors import RillError

CALLS = """
    int cuModuleLoad(void **module, const char *path);
    int cuModuleGetFunction(void **function, void *module, const char *name);
    int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared);
    int cuLaunchCooperativeKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                  unsigned threads_x, unsigned threads_y, unsigned threads_z, unsigned shared,
                                  void *stream, void **arguments);
"""


@cache
def open_library() -> Any:
    abi.ffi.cdef(CALLS)
    return abi.ffi.dlopen("libcuda.so.1")


class Cooperative:
    """Kernels that stand alone in their files. All calls are made in the context that is current."""

    def __init__(self, library: Any, files: Sequence[Path], processors: int, stream: int) -> None:
        self.library, self.processors = library, processors
        self.files = {file.stem: file for file in files}
        self.stream = abi.ffi.cast("void *", stream)
        self.functions: dict[str, Any] = {}

    def function(self, kernel: str) -> Any:
        if kernel not in self.functions:
            module, function = abi.ffi.new("void **"), abi.ffi.new("void **")
            self._check(self.library.cuModuleLoad(module, str(self.files[kernel]).encode()))
            self._check(self.library.cuModuleGetFunction(function, module[0], kernel.encode()))
            self.functions[kernel] = function[0]
        return self.functions[kernel]

    def blocks(self, kernel: str) -> int:
        """How many blocks of THREADS threads there is room for at once."""
        blocks = abi.ffi.new("int *")
        function = self.function(kernel)
        self._check(self.library.cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, n.THREADS, 0))
        return int(blocks[0]) * self.processors

    def bind(self, launch: Launch, arguments: bytes) -> Callable[[], None]:
        """arguments: struct persistent, and behind it struct team."""
        function, held = self.function(launch.kernel), abi.ffi.new("char[]", arguments)
        each = abi.ffi.new("void *[]", [held, held + abi.ffi.sizeof("struct persistent")])

        def call() -> None:
            assert held  # for as long as the call may be made
            shape = *launch.grid, launch.threads, 1, 1, launch.shared
            self._check(self.library.cuLaunchCooperativeKernel(function, *shape, self.stream, each))

        return call

    def _check(self, status: int) -> None:
        if status:
            raise RillError(f"a cooperative launch: the driver reports error {status}")
