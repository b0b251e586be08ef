"""Memory that the ranks of one machine share, for two purposes: what is long goes over by one copy in and one copy out,
and native code meets there on its own for what is short (native/meeting.c)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from engine import abi

FLOAT32 = np.dtype(np.float32)
HALF, SHORT_HALF = 1 << 20, 1 << 18  # numbers: little enough to stay in caches and in a container's shared memory
LONG = 64 << 10  # bytes from which on this is faster than messages
LINE = 8  # int64 of a cache line
PATIENCE, PATIENCE_IF_CROWDED = 2000, 20  # native code's looks before another process may have the core


class Window:
    """Two halves, used in turns. A rank that writes into one has met all others since it was read, when the other half
    was handed over; so one meeting a turn is enough. Every method is called by all ranks at the same point.

    meet: returns when every rank has called it. meeting: a struct of abi.h, the same for two more halves; None where
    there are too many ranks.
    """

    def __init__(self, mpi: Any, world: Any, meet: Callable[[], None], crowded: bool) -> None:
        self.rank, self.size, self._meet = world.rank, world.size, meet
        lines = 2 * LINE * self.size  # words, where an int64 takes two
        words = lines + 2 * HALF + 2 * SHORT_HALF
        self._win = mpi.Win.Allocate_shared(words * FLOAT32.itemsize if world.rank == 0 else 0, comm=world)
        shared = np.frombuffer(self._win.Shared_query(0)[0], FLOAT32)[:words]
        long, short, arrived = np.split(shared, (2 * HALF, 2 * HALF + 2 * SHORT_HALF))
        self._halves, self._turn = long.reshape(2, HALF), 0
        self._win.Lock_all()  # once: from now on loads and stores are all that is done
        if self.rank == 0:
            arrived[:] = 0
        self._win.Sync()
        world.Barrier()
        self.meeting = None
        if self.size <= abi.constants.MOST_MEETING:
            self.meeting = abi.ffi.new("struct meeting *")
            self.meeting.rank, self.meeting.ranks, self.meeting.half = self.rank, self.size, SHORT_HALF
            self.meeting.patience = PATIENCE_IF_CROWDED if crowded else PATIENCE
            self.meeting.arrived = abi.ffi.cast("int64_t *", abi.address(arrived))
            self.meeting.halves = abi.ffi.cast("float *", abi.address(short))

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
