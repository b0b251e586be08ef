"""Times of several works side by side, in interleaved rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
MOST_ROUNDS, ENOUGH_SECONDS = 100, 0.2


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(works: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """What each of several works gave in each round, after one round to warm up. The rounds go through all of them,
    so that a machine whose speed drifts bends none against another."""
    for work in works:
        work()
    results: list[list[T]] = [[] for _ in works]
    for _ in range(rounds):
        for work, kept in zip(works, results, strict=True):
            kept.append(work())
    return results


def taking_turns(first: Callable[[], T], second: Callable[[], U], rounds: int) -> Iterator[tuple[T, U]]:
    """What two works gave in each round, in this order; which of them runs first alternates, as what runs second may
    find the machine warmer, or busier."""
    for i in range(rounds):
        if i % 2:
            after = second()
            yield first(), after
        else:
            yield first(), second()


def enough_rounds(longest: float, rounds: int) -> int:
    """At least `rounds`; more of them where a round takes so few seconds that a busy machine would drown it."""
    return max(rounds, min(MOST_ROUNDS, int(ENOUGH_SECONDS / max(longest, 1e-9))))


def medians(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each of several works, in interleaved rounds, at least so many."""
    count = enough_rounds(max(seconds(work) for work in works), rounds)
    return [median(times) for times in interleaved([partial(seconds, work) for work in works], count)]


class OthersUse:
    """How many CPUs everything but this process and the children that it has waited for keeps busy."""

    def __init__(self) -> None:
        self.last = self._read()

    def since(self) -> float:
        """On average, since it was last asked; 0 where the system does not say (it has no /proc/stat)."""
        before, self.last = self.last, self._read()
        return max(0.0, (self.last[1] - before[1]) / max(self.last[0] - before[0], 1e-9))

    @staticmethod
    def _read() -> tuple[float, float]:
        """The clock, and the seconds of CPUs that others have had; what the host has given away is others', too."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return time.perf_counter(), 0.0
        user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, fields)
        busy = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - sum(os.times()[:4])
