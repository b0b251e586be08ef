"""What ranks cost: where each one's time goes, and a forecast for more of them.

Whoever comes early to a collective waits in it for the last one. So the least that any rank spends in a collective is
what it costs once all are there: that is communication, and whatever a rank spends in it beyond that is waiting. The
rest of a replay is computing. Each rank reads its own clock only, so that ranks may be on several machines.

Over a slow link, a rank that comes late finds the other's part there already, and its own is still under way: then the
least is nothing. So communication is at least what such collectives take one after the other when nothing is computed
between them, as far as every rank has spent that in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Link:
    """A sum between `ranks` ranks takes `latency` seconds, and its bytes at `bandwidth` a second."""

    ranks: int
    latency: float
    bandwidth: float

    @staticmethod
    def through(ranks: int, small: tuple[int, float], large: tuple[int, float]) -> Link:
        """The straight line through two messages, each (bytes, seconds)."""
        each_byte = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        latency = max(small[1] - small[0] * each_byte, 1e-9)
        return Link(ranks, latency, 1 / each_byte if each_byte else float("inf"))

    def seconds(self, collectives: float, size: float, ranks: int) -> float:
        """What so many collectives of `size` bytes together take between so many ranks. Short messages meet in
        log2(ranks) rounds; of a long one, a rank sends and receives (ranks - 1) / ranks twice (Thakur, Rabenseifner and
        Gropp, 2005)."""
        rounds = ceil_log2(ranks) / ceil_log2(self.ranks)
        share = (1 - 1 / ranks) / (1 - 1 / self.ranks)
        return collectives * self.latency * rounds + size / self.bandwidth * share


def ceil_log2(count: int) -> int:
    return (count - 1).bit_length()


@dataclass
class PhaseCost:
    """Sums over the steps of a phase. tokens: rows; seconds: of the steps, on rank 0; collectives and size: how many,
    and the bytes of what comes out of them. compute, waiting: seconds of each rank; communication: of any rank."""

    compute: np.ndarray
    waiting: np.ndarray
    communication: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    collectives: int = 0
    size: int = 0

    @property
    def outside(self) -> np.ndarray:
        """Seconds of each rank between replays: Python, and on all ranks but the first the wait for the next step."""
        return self.seconds - self.compute - self.waiting - self.communication

    def add(self, durations: np.ndarray) -> None:
        """A replay's: seconds [1 + collectives, ranks] of the whole and of each collective."""
        in_collectives, least = durations[1:].sum(axis=0), float(durations[1:].min(axis=1).sum())
        self.compute += durations[0] - in_collectives
        self.waiting += in_collectives - least
        self.communication += least
        self.collectives += len(durations) - 1

    def add_way(self, link: Link) -> None:
        """Makes communication of the waiting that is a message's way."""
        way = link.seconds(self.collectives, self.size, link.ranks) - self.communication
        moved = max(0.0, min(way, float(self.waiting.min())))
        self.communication += moved
        self.waiting -= moved

    def forecast(self, link: Link, ranks: int) -> Forecast:
        """All that is computed shared by so many ranks, each with what a rank has now, none waiting for another."""
        communication = link.seconds(self.collectives, self.size, ranks)
        return Forecast(ranks, *(seconds / self.tokens for seconds in (
            float(self.compute.sum()) / ranks, communication, float(self.outside[0])
        )))  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Seconds a token of so many ranks."""

    ranks: int
    compute: float
    communication: float
    outside: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.outside


@dataclass(frozen=True)
class Turn:
    """From `before` to `after`, more ranks are slower. factor: so many times as fast, collectives would let `after` be
    no slower."""

    before: Forecast
    after: Forecast

    @property
    def factor(self) -> float:
        return (self.after.communication - self.before.communication) / (self.before.compute - self.after.compute)


@dataclass
class Cost:
    """Of `ranks` ranks. phases: "prefill" and "decode", those that there were. fits: numbers of ranks -> whether the
    model's heads allow them; empty where ranks compute much that all of them do, which this cannot forecast. crowded:
    the ranks of a machine have fewer cores than threads, so that they wait for cores, too. left_out: replays that there
    was no room for."""

    ranks: int
    phases: dict[str, PhaseCost]
    link: Link
    fits: dict[int, bool]
    crowded: bool
    left_out: int

    def forecasts(self, phase: PhaseCost) -> list[Forecast]:
        return [phase.forecast(self.link, ranks) for ranks, fits in self.fits.items() if fits]

    def turn(self, phase: PhaseCost) -> Turn | None:
        """The first step to more ranks that makes a token slower."""
        found = self.forecasts(phase)
        pairs = zip(found, found[1:], strict=False)
        return next((Turn(few, many) for few, many in pairs if many.seconds > few.seconds), None)

    def content(self) -> dict[str, Any]:
        """For JSON: seconds, bytes and bytes a second; sums over the steps, forecasts a token."""
        phases = {
            name: {**{key: np.asarray(value).tolist() for key, value in asdict(phase).items()},
                   "outside": phase.outside.tolist(), "forecast": [asdict(each) for each in self.forecasts(phase)]}
            for name, phase in self.phases.items()
        }  # fmt: skip
        link = {**asdict(self.link), "bandwidth": self.link.bandwidth if np.isfinite(self.link.bandwidth) else None}
        return {"ranks": self.ranks, "link": link, "crowded": self.crowded, "left_out": self.left_out, "phases": phases}
