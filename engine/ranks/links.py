"""What lies between ranks, measured while nothing else runs: the ways of sums, of a stage's rows, and of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from engine.ranks.comm import STEP, Comm
from engine.ranks.cost import Line, Link
from engine.ranks.stages import Stages

ROUNDS, IN_A_ROW = 5, 10  # that each thing is timed: medians, and one after the other


def links_of_stages(
    comm: Comm, peers: Comm, row: int, rows: int, short: Callable[[], None] | None
) -> list[Link | None]:
    """Of the ranks of each stage among themselves, that of rank 0 first; None where each is alone. One stage measures
    after the other, as they work. short: the sum of a row, where that is not a message."""
    blocks = range(comm.size // peers.size)
    return [measure_link(comm, peers, block, row, rows, short) if peers.size > 1 else None for block in blocks]


def measure_link(
    comm: Comm, peers: Comm, block: int, row: int, rows: int, short: Callable[[], None] | None
) -> Link:
    """Times sums of a row of so many bytes and of so many such rows, among that block of ranks."""
    small_x, large_x = (np.zeros((count, row // 4), np.float32) for count in (1, rows))
    sums = [short or (lambda: peers.all_reduce(small_x)), lambda: peers.all_reduce(large_x)]
    if comm.rank // peers.size != block:
        sums = [lambda: None] * 2
    each = timed(comm, sums)[:, block * peers.size : (block + 1) * peers.size]
    small, large = np.median(each.mean(axis=1), axis=0)
    return Link.through(peers.size, (row, float(small)), (row * rows, float(large)))


def measure_line(comm: Comm, peers: Stages, row: int, rows: int, step: int) -> Line:
    """Times messages of a row of so many bytes and of so many such rows, over one boundary between stages after the
    other, there and back; then empty steps of a row, which rank 0 tells of in so many bytes: what they take beyond
    their messages is the telling."""
    boundaries = []
    for index in range(peers.stage.count - 1):
        both = timed(comm, [to_and_fro(peers, index, row, count) for count in (1, rows)])
        first = (index + 1) % peers.stage.count * peers.size  # the first rank of the stage before the boundary
        small, large = np.median(both[:, first], axis=0) / 2
        boundaries.append(Link.through(2, (row, float(small)), (row * rows, float(large))))
    whole = float(np.median(timed(comm, [empty_step(comm, peers, row, step)])[:, 0]))
    messages = sum(link.seconds(1, row, 2) for link in boundaries)
    return Line(boundaries, Link(comm.size, max(whole - messages, 1e-9), float("inf")), row)


def to_and_fro(peers: Stages, index: int, row: int, rows: int) -> Callable[[], None]:
    """Rows from a stage to the next one and back."""
    x = np.zeros((rows, row // 4), np.float32)
    pending = np.zeros_like(x)

    def before() -> None:
        peers.send(x, pending)
        peers.receive_from(peers.after, x)

    def after() -> None:
        peers.receive(x)
        peers.send_to(peers.before, x, pending)

    return {index: before, index + 1: after}.get(peers.stage.index, lambda: None)


def empty_step(comm: Comm, peers: Stages, row: int, step: int) -> Callable[[], None]:
    """A step of one row in which nothing is computed."""
    told, x = np.zeros(step, np.uint8), np.zeros((1, row // 4), np.float32)
    pending = np.zeros_like(x)

    def run() -> None:
        if comm.rank == 0:
            comm.announce(told, STEP)
        else:
            comm.next_command()
            comm.broadcast(told)
        if not peers.stage.is_first:
            peers.receive(x)
        if not peers.stage.is_last:
            peers.send(x, pending)
        if comm.rank == 0:
            comm.settle()

    return run


def timed(comm: Comm, works: Sequence[Callable[[], None]]) -> np.ndarray:
    """Seconds [rounds, ranks, works] that each takes, begun by all ranks together: several one after the other, for
    over a slow link ranks take turns in coming late. One round is to warm up."""
    times = np.zeros((1 + ROUNDS, len(works)), np.int64)
    for found in times:
        for i, work in enumerate(works):
            comm.beat()
            begin = time.perf_counter_ns()
            for _ in range(IN_A_ROW):
                work()
            found[i] = time.perf_counter_ns() - begin
    return on_all(comm, times)[1:] / IN_A_ROW / 1e9


def on_all(comm: Comm, mine: np.ndarray) -> np.ndarray:
    """What every rank has [n, m]: [n, ranks, m]."""
    found = np.empty((len(mine), comm.size * mine.shape[1]), mine.dtype)
    comm.all_gather(mine, found)
    return found.reshape(len(mine), comm.size, mine.shape[1])


def all_rows(comm: Comm, mine: np.ndarray) -> list[np.ndarray]:
    """What every rank has [its own n, m], by rank."""
    counts = on_all(comm, np.array([[len(mine)]]))[0, :, 0]
    filled = np.zeros((counts.max(), mine.shape[1]), mine.dtype)
    filled[: len(mine)] = mine
    return [rows[:count] for rows, count in zip(on_all(comm, filled).swapaxes(0, 1), counts, strict=True)]
