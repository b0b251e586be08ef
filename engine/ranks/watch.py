"""Waiting for other ranks, and what ends it when they do not come.

MPI's own waiting keeps a core busy, which ranks may have to share. So every call is the one that returns at once, and
the wait is ours; between two ranks it takes no longer, 3.4 µs for the sum of 4 KB.

Whoever waits for others for longer than `patience` seconds ends, and the launcher ends the rest. So nobody is silent
for that long: a rank whose work takes as long as it takes, such as loading a model, does it in `busy`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from engine.ranks.neighbours import Process

ALIVE = 0  # the tag of a note that says no more
LOOKS, LOOKS_IF_CROWDED = 20000, 20  # at what one waits for, before one sleeps
MOST_SLEEP = 0.0005  # seconds
LOOKS_OF_PATIENCE = 10  # at how long this process has been waiting


class Notes:
    """Numbers from rank to rank, read whenever the other one comes to it."""

    def __init__(self, mpi: Any, world: Any) -> None:
        self.anyone, self._world = mpi.ANY_SOURCE, world.Dup()
        self._sent: list[tuple[Any, np.ndarray]] = []  # what may be on its way

    def send(self, ranks: Sequence[int], tag: int, number: int = 0) -> None:
        """Does not wait until it is read."""
        self._sent = [sent for sent in self._sent if not sent[0].Test()]
        data = np.array([number], np.int64)
        self._sent += [(self._world.Isend(data, rank, tag), data) for rank in ranks]

    def read(self, rank: int, tag: int) -> Iterator[int]:
        """Those that have come."""
        data = np.zeros(1, np.int64)
        while self._world.Iprobe(rank, tag):
            self._world.Recv(data, rank, tag)
            yield int(data[0])


class Watch:
    """What this process, one of so many ranks, is waiting for: to be there before MPI's first meeting.

    meetings: of native code, which waits, too. neighbours: the other ranks' processes on this machine.
    """

    def __init__(self, patience: float, rank: int, size: int) -> None:
        self.patience, self.rank = patience, rank
        self.meetings: list[Any] = []
        self.neighbours: list[Process] = []
        self.notes: Notes | None = None
        self._others = [other for other in range(size) if other != rank]
        self._since: float | None = None
        threading.Thread(target=self._watch, name="rill-watch", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """MPI's own calls that wait for all: the others have to come in time."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def wait(
        self, request: Any, crowded: bool, status: Any = None, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Looks again and again, later on with sleeps in between, the longer the longer it takes. crowded: whoever
        looks keeps a core from those that it waits for."""
        since, looks = time.monotonic(), 0
        most_looks = LOOKS_IF_CROWDED if crowded else LOOKS
        self._since = since
        while not request.Test(status):
            looks += 1
            if meanwhile:
                meanwhile()
            if looks > most_looks:
                time.sleep(min((time.monotonic() - since) / 16, MOST_SLEEP))
                self._hear_of_life()
        self._since = None

    def _hear_of_life(self) -> None:
        """Waits anew if a rank that is at work has let this one know."""
        if self.notes:
            for _ in self.notes.read(self.notes.anyone, ALIVE):
                self._since = time.monotonic()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """What takes as long as it takes, without MPI: meanwhile a thread tells the others that this rank is alive."""
        over = threading.Event()
        teller = threading.Thread(target=self._tell_of_life, args=(over,), name="rill-alive", daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def _tell_of_life(self, over: threading.Event) -> None:
        while not over.wait(self.patience / 4):
            if self.notes:
                self.notes.send(self._others, ALIVE)

    def _watch(self) -> None:
        """Ends this process when it has waited for too long, and the others on this machine: the launcher, who ends
        those elsewhere, now and then leaves out one that has been stopped. Counts looks, not time, so that time in
        which this process was stopped, too, does not count."""
        looks, last = 0, None
        while looks <= LOOKS_OF_PATIENCE:
            time.sleep(self.patience / LOOKS_OF_PATIENCE)
            at = self._at()
            looks = looks + 1 if at is not None and at == last else 0
            last = at
        self.say(f"another rank has not answered for {self.patience:g} seconds")
        for process in self.neighbours:
            process.kill()
        os._exit(1)

    def _at(self) -> Any:
        """What tells this wait from all others; None: this process is not waiting."""
        if self._since is not None:
            return self._since
        return next(((i, each.waits) for i, each in enumerate(self.meetings) if each and each.waits % 2), None)

    def say(self, message: str) -> None:
        sys.stderr.write(f"rill: rank {self.rank}: {message}\n")
        sys.stderr.flush()
