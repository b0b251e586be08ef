"""Rank 0 runs the program. The other ranks open the models that it opens, each its own part of them, and replay its
steps: requests, text, sampling and all decisions are rank 0's alone.

What goes over at each step is the step's own buffer: rows, positions and tables of pages. So no rank has to be told
which requests there are, or that one was cancelled; a token that rank 0 draws comes back as a row of the next step.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import NoReturn

import numpy as np

from engine.device import Cancelled, TokenError
from engine.errors import UsageError
from engine.loading import Options, load, open_runner
from engine.ranks.comm import BEAT, CLOSE, END, OPEN, PROFILE, SEARCH, STEP, Comm, open_comm
from engine.runner import Runner


def enter() -> Comm | None:
    """The ranks, on rank 0; None in a process alone. Any other rank stays here until rank 0's program ends, and then
    exits. To be called before anything that one rank only is to do, by the thread that ends the program."""
    comm = open_comm()
    if comm is None:
        return None
    if not comm.entered:
        comm.entered = True
        started = comm.exchange(json.dumps(sys.argv[1:])[:1000])
        if comm.rank:
            follow(comm)
        for rank, arguments in enumerate(started):
            if arguments != started[0]:
                raise UsageError(f"rank {rank} was started with other arguments than rank 0: {arguments}")
        comm.beat_when_silent()
    return comm


@contextmanager
def lead(comm: Comm | None, options: Options) -> Iterator[None]:
    """While rank 0 opens a model, the others do."""
    if comm is None:
        yield
        return
    try:
        data = np.frombuffer(json.dumps(asdict(options)).encode(), np.uint8).copy()
    except TypeError as error:
        raise UsageError(f"options: {error}") from None
    with comm.turn():
        comm.models += 1
        comm.command(OPEN, len(data))
        comm.broadcast(data)
        try:
            yield
        except Exception:
            raise  # on all ranks
        except BaseException as error:
            comm.fail(error)


def follow(comm: Comm) -> NoReturn:
    """Does what rank 0 commands, to its end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's affair
    runners: dict[int, Runner] = {}
    try:
        while True:
            command, *numbers = comm.next_command()
            if command == END:
                break
            elif command == OPEN:
                comm.models += 1
                _open(comm, numbers[0], runners)
            elif command == STEP:
                _replay(runners[numbers[0]], *numbers[1:])
            elif command == SEARCH:
                runners[numbers[0]].search(range(*numbers[1:]))
            elif command == BEAT:
                comm.beat()
            elif command == CLOSE:
                del runners[numbers[0]]
            elif command == PROFILE:
                from engine.ranks.rank_profile import follow_profile

                follow_profile(runners[numbers[0]], bool(numbers[1]))
    except BaseException as error:
        comm.fail(error)
    raise SystemExit(0)


def _open(comm: Comm, size: int, runners: dict[int, Runner]) -> None:
    data = np.zeros(size, np.uint8)
    comm.broadcast(data)
    try:
        options = Options(**json.loads(bytes(data)))
        opened = open_runner(options, comm)
        load(opened, comm, cache=options.cache)
        runners[comm.models] = opened.runner
    except Exception:
        pass  # rank 0 has heard of it, and says so


def _replay(runner: Runner, first: int, last: int) -> None:
    try:
        runner.follow(first, last)
    except (Cancelled, TokenError):
        pass  # as on every rank: the step has not happened
