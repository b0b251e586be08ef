"""Times of several works side by side, in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TypeVar

T = TypeVar("T")
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


def enough_rounds(longest: float, rounds: int) -> int:
    """At least `rounds`; more of them where a round takes so few seconds that a busy machine would drown it."""
    return max(rounds, min(MOST_ROUNDS, int(ENOUGH_SECONDS / max(longest, 1e-9))))


def medians(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each of several works, in interleaved rounds, at least so many."""
    count = enough_rounds(max(seconds(work) for work in works), rounds)
    return [median(times) for times in interleaved([partial(seconds, work) for work in works], count)]
