"""Arrays in the memory of a device that the host reaches by copies alone."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import numpy as np


class Memory(Protocol):
    """What a driver does with memory. Addresses are the device's own."""

    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def read(self, address: int, into: np.ndarray) -> None: ...
    def write(self, address: int, data: np.ndarray) -> None: ...


class Allocation:
    """Bytes on a device, given back when nothing refers to them any more."""

    def __init__(self, memory: Memory, size: int) -> None:
        self.memory, self.size = memory, size
        self.address = memory.allocate(size)
        weakref.finalize(self, memory.free, self.address)


class DeviceArray:
    """A contiguous array in an allocation. Indexing copies it to the host, assignment copies it there and back: for
    tests and tools, not for a step."""

    def __init__(self, allocation: Allocation, shape: tuple[int, ...], dtype: np.dtype, offset: int = 0) -> None:
        self.allocation, self.shape, self.dtype = allocation, shape, dtype
        self.address = allocation.address + offset
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    def copy(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        self.allocation.memory.read(self.address, array)
        return array

    def part(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """An array of its own from `offset` bytes on."""
        return DeviceArray(self.allocation, shape, dtype, self.address - self.allocation.address + offset)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A copy of some of the rows."""
        size = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        return self.part(start * size, (stop - start, *self.shape[1:]), self.dtype).copy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.copy() if dtype is None else self.copy().astype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return self.copy()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        array = self.copy()
        array[key] = value
        self.allocation.memory.write(self.address, array)

    def __eq__(self, other: object) -> Any:
        return self.copy() == other

    __hash__ = None  # type: ignore[assignment]
