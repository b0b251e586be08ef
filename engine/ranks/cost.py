"""What ranks cost: where each one's time goes, and a forecast for more of them.

Whoever comes early to a collective waits in it for the last one. So the least that any rank spends in a collective is
what it costs once all are there: that is communication, and whatever a rank spends in it beyond that is waiting. The
rest of a replay is computing. Each rank reads its own clock only, so that ranks may be on several machines.

Over a slow link, a rank that comes late finds the other's part there already, and its own is still under way: then the
least is nothing. So communication is at least what such collectives take one after the other when nothing is computed
between them, as far as every rank has spent that in them.

A message from stage to stage has two ends, each on a clock of its own. What a stage spends in receiving it is mostly
the time that the stages before compute. So at either end it is communication as far as such a message takes when nobody
is late, and beyond that waiting.

Between replays nobody computes. There, whatever rank 0 takes is outside, and what another rank takes beyond that is its
waiting for the next step: in a pipeline, for the stages that come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Link:
    """A collective, or a message, between `ranks` ranks takes `latency` seconds, and its bytes at `bandwidth` a
    second."""

    ranks: int
    latency: float
    bandwidth: float

    @staticmethod
    def through(ranks: int, small: tuple[int, float], large: tuple[int, float]) -> Link:
        """The straight line through two of them, each (bytes, seconds), whatever way they took."""
        each_byte = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        latency = max(small[1] - small[0] * each_byte, 1e-9)
        return Link(ranks, latency, 1 / each_byte if each_byte else float("inf"))

    @staticmethod
    def mean(links: Sequence[Link]) -> Link:
        """Of as many messages over each."""
        each_byte = float(np.mean([1 / link.bandwidth for link in links]))
        latency = float(np.mean([link.latency for link in links]))
        return Link(links[0].ranks, latency, 1 / each_byte if each_byte else float("inf"))

    def seconds(self, collectives: float, size: float, ranks: int) -> float:
        """What so many collectives of `size` bytes together take between so many ranks. For another number of ranks
        than has been measured they are taken to go by messages: short ones meet in log2(ranks) rounds; of a long one, a
        rank sends and receives (ranks - 1) / ranks twice (Thakur, Rabenseifner and Gropp, 2005)."""
        rounds = ceil_log2(ranks) / ceil_log2(self.ranks)
        share = (1 - 1 / ranks) / (1 - 1 / self.ranks)
        return collectives * self.latency * rounds + size / self.bandwidth * share

    def content(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        return {**asdict(self), "bandwidth": self.bandwidth if np.isfinite(self.bandwidth) else None}


def ceil_log2(count: int) -> int:
    return (count - 1).bit_length()


@dataclass(frozen=True)
class Line:
    """The ways of a pipeline. boundaries: of a message from each stage to the next, which has `row` bytes a row; told:
    of a step, from rank 0 to all ranks, whatever its rows."""

    boundaries: Sequence[Link]
    told: Link
    row: int

    @property
    def message(self) -> Link:
        return Link.mean(self.boundaries)

    def content(self) -> dict[str, Any]:
        boundaries = [link.content() for link in self.boundaries]
        return {"boundaries": boundaries, "told": self.told.content(), "row": self.row}


@dataclass
class Shared:
    """What ranks do among themselves that share every layer: sums over the steps of a phase. count and size: of their
    collectives, and the bytes of what comes out of them. waiting: seconds of each rank; communication: of any rank."""

    waiting: np.ndarray
    communication: float = 0.0
    count: int = 0
    size: int = 0

    def add(self, durations: np.ndarray, size: int) -> None:
        """Seconds [collectives, ranks], and the bytes of all."""
        least = durations.min(axis=1)
        self.waiting += (durations - least[:, None]).sum(axis=0)
        self.communication += float(least.sum())
        self.count += len(durations)
        self.size += size

    def add_way(self, link: Link) -> None:
        """Makes communication of the waiting that is a message's way."""
        way = link.seconds(self.count, self.size, link.ranks) - self.communication
        moved = max(0.0, min(way, float(self.waiting.min())))
        self.communication += moved
        self.waiting -= moved


class PhaseCost:
    """Sums over the steps of a phase, of ranks in blocks that share every layer: a stage each, that of rank 0 first.

    tokens: rows; seconds: of the steps, on rank 0; runs: steps that did not follow at once on a piece of the same
    prompt, so that no stage could have been at work on them earlier. compute, replays, messages: seconds of each rank
    in computing, in replays as a whole, and of communication with other stages.
    """

    def __init__(self, blocks: int, ranks: int) -> None:
        """ranks: of each block."""
        self.compute, self.replays, self.messages = (np.zeros(blocks * ranks) for _ in range(3))
        self.shared = [Shared(np.zeros(ranks)) for _ in range(blocks)]
        self.width = ranks
        self.tokens = self.steps = self.runs = 0
        self.seconds = 0.0

    def add(self, block: int, durations: np.ndarray, ways: np.ndarray, size: int) -> None:
        """A replay's on the ranks of a block: seconds [1 + collectives, ranks] of the whole and of each collective.
        ways: seconds [collectives] that a message to or from another stage takes, NaN for what the ranks do among
        themselves, which comes to `size` bytes."""
        own, among = slice(block * self.width, (block + 1) * self.width), np.isnan(ways)
        each = durations[1:]
        self.replays[own] += durations[0]
        self.compute[own] += durations[0] - each.sum(axis=0)
        self.messages[own] += np.minimum(each[~among], ways[~among, None]).sum(axis=0)
        self.shared[block].add(each[among], size)

    @property
    def collectives(self) -> int:
        return sum(shared.count for shared in self.shared)

    @property
    def size(self) -> int:
        return sum(shared.size for shared in self.shared)

    @property
    def communication(self) -> np.ndarray:
        return self.messages + np.repeat([shared.communication for shared in self.shared], self.width)

    @property
    def outside(self) -> np.ndarray:
        """Seconds of each rank between replays, at most as many as rank 0 takes there, where that is Python."""
        idle = self.seconds - self.replays
        return np.minimum(idle, idle[0])

    @property
    def waiting(self) -> np.ndarray:
        return np.maximum(0, self.seconds - self.compute - self.communication - self.outside)

    def on_ranks(self, link: Link, ranks: int, share: float) -> Forecast:
        """All that is computed shared by so many ranks, each with what a rank has now, none waiting for another."""
        way = link.seconds(self.collectives, self.size, ranks)
        return self._forecast(ranks, float(self.compute.sum()) * share, way)

    def on_stages(self, line: Line, stages: int, share: float) -> Forecast:
        """As so many stages, each with what one has now. The first piece of a prompt passes all of them, and so does a
        step that generates; each piece after it comes as much later as the slowest stage takes, whose share of the
        computing is given."""
        path = (self.runs + (self.steps - self.runs) * share) / self.steps
        among = sum(shared.communication for shared in self.shared)
        messages = self.steps + self.runs * (stages - 2) if stages > 1 else 0
        way = line.message.seconds(messages, messages * self.tokens / self.steps * line.row, 2)
        told = line.told.seconds(self.runs, 0, stages * self.width)
        return self._forecast(stages, float(self.compute.sum()) / self.width * path, among * path + way + told)

    def _forecast(self, ranks: int, compute: float, communication: float) -> Forecast:
        outside = float(self.outside[0])
        return Forecast(ranks, *(seconds / self.tokens for seconds in (compute, communication, outside)))

    def content(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in ("compute", "communication", "waiting", "outside")}
        numbers = {name: getattr(self, name) for name in ("tokens", "steps", "runs", "seconds", "collectives", "size")}
        return arrays | numbers


@dataclass(frozen=True)
class Forecast:
    """Seconds a token of so many ranks, or stages."""

    ranks: int
    compute: float
    communication: float
    outside: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.outside


@dataclass(frozen=True)
class Turn:
    """From `before` to `after`, more ranks are slower. saved: seconds of computing. factor: so many times as fast,
    collectives would let `after` be no slower; infinite where nothing is saved."""

    before: Forecast
    after: Forecast

    @property
    def saved(self) -> float:
        return self.before.compute - self.after.compute

    @property
    def factor(self) -> float:
        added = self.after.communication - self.before.communication
        return added / self.saved if self.saved > 0 else float("inf")


@dataclass
class Cost:
    """Of ranks that share every layer, by `link`, or of stages, by `line`. phases: "prefill" and "decode", those that
    there were. shares: numbers of ranks, or of stages -> the greatest share of the computing that one of them has; None
    where the model's heads, or its layers, do not allow them; empty where ranks compute much that all of them do, which
    this cannot forecast. crowded: the ranks of a machine have fewer cores than threads, so that they wait for cores,
    too. left_out: replays that there was no room for."""

    ranks: int
    stages: int
    phases: dict[str, PhaseCost]
    link: Link | None
    line: Line | None
    shares: dict[int, float | None]
    crowded: bool
    left_out: int

    def forecasts(self, phase: PhaseCost) -> list[Forecast]:
        found = [(count, share) for count, share in self.shares.items() if share]
        if self.line:
            return [phase.on_stages(self.line, *each) for each in found]
        assert self.link
        return [phase.on_ranks(self.link, *each) for each in found]

    def turn(self, phase: PhaseCost) -> Turn | None:
        """The first step to more ranks that makes a token slower."""
        found = self.forecasts(phase)
        pairs = zip(found, found[1:], strict=False)
        return next((Turn(few, many) for few, many in pairs if many.seconds > few.seconds), None)

    def content(self) -> dict[str, Any]:
        """For JSON: seconds, bytes and bytes a second; sums over the steps, forecasts a token."""
        phases = {
            name: phase.content() | {"forecast": [asdict(each) for each in self.forecasts(phase)]}
            for name, phase in self.phases.items()
        }
        ways = {"link": self.link and self.link.content(), "line": self.line and self.line.content()}
        return {"ranks": self.ranks, "stages": self.stages, **ways, "crowded": self.crowded, "left_out": self.left_out,
                "phases": phases}  # fmt: skip
