"""The ranks of a run, and what they say to each other over MPI: buffers, in place, one thread at a time.

A process that is alone never comes here. Who waits too long for others ends (watch.py), so rank 0 sends a beat when it
has nothing to tell.
"""

from __future__ import annotations

import atexit
import copy
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

import numpy as np

from engine.device import Place
from engine.errors import RillError, UsageError
from engine.machine import allowed_cpus, available_cores
from engine.ranks.neighbours import Process
from engine.ranks.split import Split, Stage
from engine.ranks.watch import Notes, Watch
from engine.ranks.window import Window

LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # how MPICH's and Open MPI's tell a process how many there are
END, OPEN, STEP, BEAT, CLOSE, PROFILE, SEARCH = range(7)  # what rank 0 commands (followers.py)
REPORT = 4096  # bytes of what each rank says when all compare
CPUS = 4096  # that a machine may have
START = 5  # times the patience: until all ranks have come to their first meeting
STDERR = 2


@cache
def open_comm() -> Comm | None:
    """The ranks this process belongs to; None where it is alone, and then MPI is not even imported."""
    launched = max(int(os.environ.get(name, "1")) for name in LAUNCHERS) > 1
    if not launched and "mpi4py" not in sys.modules:
        return None
    seconds = patience()
    # MPI's start keeps Python's lock: the only thread that can end it is one that needs none.
    faulthandler.dump_traceback_later(START * seconds, exit=True, file=STDERR)
    try:
        import mpi4py

        mpi4py.rc.thread_level = "serialized"
        from mpi4py import MPI

        world = MPI.COMM_WORLD.Dup()
    except (ImportError, RuntimeError) as error:
        raise RillError(f"started as one of several ranks, but there is no MPI: {error}; "
                        "pip install 'rill-engine[mpi]'") from None  # fmt: skip
    finally:
        faulthandler.cancel_dump_traceback_later()
    return Comm(MPI, world, seconds) if world.size > 1 else None


def patience() -> float:
    """Seconds after which a rank that does not answer is taken for stuck."""
    text = os.environ.get("RILL_HEARTBEAT", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 1e6:
        raise UsageError(f"RILL_HEARTBEAT {text!r}: expected seconds, at least 0.1")
    return seconds


class Comm:
    """All ranks. Rank 0 runs the program and commands; every method is called by all of them at the same point.

    place: this rank on its machine. stopped: set on rank 0 by any thread, for `agreed_to_stop`.
    """

    def __init__(self, mpi: Any, world: Any, patience: float) -> None:
        self.mpi, self.world, self.patience = mpi, world, patience
        self.rank, self.size = int(world.rank), int(world.size)
        self.watch = Watch(patience, self.rank, self.size)
        self.split, self.stage = Split(self.rank, self.size), Stage()
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.stopped = False
        self.told = self.begun = 0  # steps that rank 0 has told of, and that this rank has begun
        self.ended = False
        self.entered = False  # by way of followers.enter
        self.models = 0  # opened so far
        self._turn = threading.RLock()
        self._holder: int | None = None  # the thread whose turn it is
        self._unsettled: list[Any] = []  # announcements that are on their way
        self._told_at = 0.0  # when rank 0 last told the others anything
        self._header = np.zeros(4, np.int64)
        self._firsts: dict[int, Comm] = {}
        self._cores = available_cores()
        with self.watch.waiting():
            self.notes = self.watch.notes = Notes(mpi, world)
            self.place = self._neighbours()
            self.together = self.place.ranks == self.size  # on one machine, and so are all that are split off
            self.window = self.open_window()
        atexit.register(self.end)

    def first(self, count: int) -> Comm:
        """The first so many ranks among themselves; the other ranks, too, get something, which they have no use for."""
        if count not in self._firsts:
            self._firsts[count] = self._first(count)
        return self._firsts[count]

    def _first(self, count: int) -> Comm:
        part = copy.copy(self)
        part._firsts = {}
        part.place = self.place._replace(sharing=min(self.place.sharing, count))
        with self.watch.waiting():
            part.share(self.world.Split(self.rank >= count, self.rank))
        return part

    def share(self, world: Any) -> None:
        """From now on, collectives and what a model splits are of these ranks."""
        self.world, self.rank, self.size = world, int(world.rank), int(world.size)
        self.split, self.window = Split(self.rank, self.size), self.open_window()

    def _neighbours(self) -> Place:
        machine = self.world.Split_type(self.mpi.COMM_TYPE_SHARED)
        mine = np.zeros(CPUS, np.uint8)
        mine[list(allowed_cpus()) if hasattr(os, "sched_getaffinity") else [0]] = 1
        masks = np.zeros((machine.size, CPUS), np.uint8)
        machine.Allgather(mine, masks)
        processes = np.zeros((machine.size, len(Process._fields)), np.int64)
        machine.Allgather(np.array(Process.of_this(), np.int64), processes)
        self.watch.neighbours = [Process(*map(int, row)) for i, row in enumerate(processes) if i != machine.rank]
        return Place(int(machine.rank), int(machine.size), int((masks & mine).any(axis=1).sum()))

    def open_window(self) -> Window | None:
        """What these ranks share, if they are several on one machine."""
        if not self.together or self.size == 1:
            return None
        window = Window(self.mpi, self.world, self.beat, self.crowded)
        self.watch.meetings.append(window.meeting)
        return window

    @property
    def crowded(self) -> bool:
        """Whether this rank's cores have more ranks than there are cores."""
        return self.place.sharing > self._cores

    # What a plan's collectives do.

    def all_reduce(self, x: np.ndarray) -> None:
        """x becomes the sum of all ranks' x."""
        if self.window is None or not self.window.suits(x):
            self._wait(self.world.Iallreduce(self.mpi.IN_PLACE, x))
            return
        for rows, parts in self.window.exchange(x):
            sum_pairwise(list(parts), x[rows])

    def all_gather(self, x: np.ndarray, out: np.ndarray) -> None:
        """out [rows, ranks · width] becomes all ranks' x [rows, width] side by side."""
        rows, width = x.shape
        found = out.reshape(rows, self.size, width)
        if self.window is not None and self.window.suits(x):
            for some, parts in self.window.exchange(x):
                found[some] = parts.swapaxes(0, 1)
            return
        gathered = np.empty((self.size, rows, width), x.dtype)
        self._wait(self.world.Iallgather(np.ascontiguousarray(x), gathered))
        found[...] = gathered.swapaxes(0, 1)

    def gather(self, x: np.ndarray) -> None:
        """Rank 0 gets the columns of x [rows, width] of which every rank has its part."""
        parts = [Split(rank, self.size).part(x.shape[1]) for rank in range(self.size)]
        for row in x:
            if self.rank == 0:
                shape = [len(part) for part in parts], [part.start for part in parts]
                self._wait(self.world.Igatherv(self.mpi.IN_PLACE, [row, *shape, self.mpi.FLOAT]))
            else:
                self._wait(self.world.Igatherv(row[parts[self.rank].start : parts[self.rank].stop], None))

    def agreed_to_stop(self) -> bool:
        """Whether rank 0 has been asked to stop the step at hand."""
        flag = np.array([self.stopped], np.int32)
        self.broadcast(flag)
        return bool(flag[0])

    def pass_on(self, error: Exception) -> None:
        """Whoever comes after this rank hears why nothing does: here nobody, in a pipeline the next stage."""

    def show_life(self) -> None:
        """Who waits for this rank hears that it is at work. Ranks that share every layer work at the same time."""

    # Commands.

    @property
    def bound(self) -> str:
        """What to say where the launcher has given ranks of this machine cores of their own."""
        if self.place.sharing == self.place.ranks or not hasattr(os, "sched_getaffinity"):
            return ""
        return f", bound to {len(allowed_cpus())} of {os.cpu_count()} CPUs by the launcher"

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What rank 0 does in one piece: a command and what belongs to it."""
        with self._taken():
            if self.ended:
                raise RillError("the other ranks have ended")
            yield

    @contextmanager
    def _taken(self) -> Iterator[None]:
        with self._turn:
            before, self._holder = self._holder, threading.get_ident()
            try:
                yield
            finally:
                self._holder = before

    @property
    def in_turn(self) -> bool:
        """Whether this thread is in the middle of a turn."""
        return self._holder == threading.get_ident()

    def command(self, *numbers: int) -> None:
        """Rank 0 tells what comes next: one of the commands, and up to three numbers."""
        self._header[:] = 0
        self._header[: len(numbers)] = numbers
        self._told_at = time.monotonic()
        self._wait(self.world.Ibcast(self._header, 0))

    def announce(self, data: np.ndarray, *numbers: int) -> None:
        """Rank 0 tells what comes next, and the data that belongs to it, and does not wait until all have heard of it:
        that is what `settle` does. The others: next_command, then broadcast."""
        header = np.zeros_like(self._header)
        header[: len(numbers)] = numbers
        self._told_at = time.monotonic()
        for array in (header, data.copy()):
            self._unsettled.append((self.world.Ibcast(array, 0), array))

    def settle(self) -> None:
        """All that has been announced has gone out."""
        for request, _ in self._unsettled:
            self._wait(request)
        self._unsettled.clear()

    def next_command(self) -> list[int]:
        """What rank 0 tells."""
        self._wait(self.world.Ibcast(self._header, 0))
        return [int(number) for number in self._header]

    def broadcast(self, array: np.ndarray) -> None:
        """Every rank gets rank 0's bytes."""
        self._wait(self.world.Ibcast(array, 0))

    def beat(self) -> None:
        """Every rank is alive."""
        self._wait(self.world.Ibarrier())

    def exchange(self, text: str) -> list[str]:
        """What every rank says, by rank."""
        mine, all_of_them = np.zeros(REPORT, np.uint8), np.zeros((self.size, REPORT), np.uint8)
        data = np.frombuffer(text.encode()[:REPORT], np.uint8)
        mine[: len(data)] = data
        self._wait(self.world.Iallgather(mine, all_of_them))
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in all_of_them]

    # Signs of life.

    def beat_when_silent(self) -> None:
        """Rank 0 beats whenever it has told the others nothing for a while, until it tells them to end."""
        threading.Thread(target=self._beat_when_silent, name="rill-beat", daemon=True).start()

    def _beat_when_silent(self) -> None:
        while True:
            time.sleep(self.patience / 4)
            with self._taken():
                if self.ended:
                    return
                if time.monotonic() - self._told_at > self.patience / 4:
                    self.command(BEAT)
                    self.beat()

    # The end.

    def end(self) -> None:
        """Rank 0's program is over: the others may go. A step that runs comes to its end first."""
        with self._taken():
            if self.rank == 0 and not self.ended:
                self.command(END)
            self.ended = True

    def fail(self, error: BaseException) -> NoReturn:
        """Ends every rank: this one cannot go on, and the others would wait for it."""
        self.watch.say(f"{type(error).__name__}: {error}")
        self.world.Abort(1)
        os._exit(1)

    def _wait(self, request: Any, **how: Any) -> None:
        self.watch.wait(request, self.crowded, **how)


def sum_pairwise(parts: list[np.ndarray], out: np.ndarray) -> None:
    """Neighbours first, then neighbours of those: in the order in which messages sum up by recursive doubling, so that
    a number's bits do not depend on how many go with it. Of what goes beyond a power of two, neighbours come before."""
    beyond = len(parts) - (1 << len(parts).bit_length() - 1)
    parts = [a + b for a, b in pairwise(parts[: 2 * beyond])] + parts[2 * beyond :]
    while len(parts) > 2:
        parts = [a + b for a, b in pairwise(parts)]
    left, right = parts
    np.add(left, right, out=out)


def pairwise(parts: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(parts[::2], parts[1::2], strict=True)
