"""Where the weights of a GPU lie, as the host reaches them: piece by piece through pinned memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from engine.cuda.device_array import DeviceArray

if TYPE_CHECKING:
    from engine.cuda.driver import Driver

STAGED = 8 << 20  # bytes of weights that are on their way at once


class StagedArena:
    """Bytes [nbytes] on a device, as packed_cache keeps and takes them."""

    def __init__(self, driver: Driver, memory: DeviceArray) -> None:
        self.driver, self.memory, self.nbytes = driver, memory, memory.nbytes

    def to_fill(self) -> Iterator[np.ndarray]:
        """One piece is filled while another is on its way."""
        for address, size in self._pieces():
            staged = self.driver.staging(size)
            yield staged
            self.driver.send(address, staged)

    def to_read(self) -> Iterator[np.ndarray]:
        for address, size in self._pieces():
            staged = self.driver.staging(size)
            self.driver.read(address, staged)
            yield staged

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.nbytes, STAGED):
            yield self.memory.address + start, min(STAGED, self.nbytes - start)
