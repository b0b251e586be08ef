"""Memory that the ranks of one machine share: what is long goes over by one copy in and one copy out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

FLOAT32 = np.dtype(np.float32)
HALF = 1 << 20  # numbers: little enough to stay in caches and in a container's shared memory
LONG = 64 << 10  # bytes from which on this is faster than messages


class Window:
    """Two halves, used in turns. A rank that writes into one has met all others since it was read, when the other half
    was handed over; so one meeting a turn is enough. Every method is called by all ranks at the same point.

    meet: returns when every rank has called it.
    """

    def __init__(self, mpi: Any, world: Any, meet: Callable[[], None]) -> None:
        self.rank, self.size, self._meet = world.rank, world.size, meet
        self._win = mpi.Win.Allocate_shared(2 * HALF * FLOAT32.itemsize if world.rank == 0 else 0, comm=world)
        memory, _ = self._win.Shared_query(0)
        self._halves, self._turn = np.frombuffer(memory, FLOAT32)[: 2 * HALF].reshape(2, HALF), 0
        self._win.Lock_all()  # once: from now on loads and stores are all that is done

    def suits(self, x: np.ndarray) -> bool:
        """Whether x [rows, width], of which every rank has as much, goes over faster this way."""
        return x.dtype == FLOAT32 and x.nbytes >= LONG and self.size * x.shape[1] <= HALF

    def exchange(self, x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Some rows at a time of every rank's x [rows, width]: which rows, and [ranks, those rows, width], to be read
        before the next are asked for."""
        rows, width = x.shape
        step = HALF // (self.size * width)
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            count = some.stop - some.start
            self._turn ^= 1
            parts = self._halves[self._turn, : self.size * count * width].reshape(self.size, count, width)
            parts[self.rank] = x[some]
            self._win.Sync()
            self._meet()
            self._win.Sync()
            yield some, parts
