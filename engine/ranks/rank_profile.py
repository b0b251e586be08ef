"""Profiles of all ranks at once, and what the cost of a step is made of: engine/ranks/cost.py says what is what."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from engine.errors import UsageError
from engine.machine import available_cores
from engine.plan import Node
from engine.profile import Profile, ProfiledStep, Replay, event, process_name, thread_name
from engine.ranks.comm import PROFILE, Comm
from engine.ranks.cost import Cost, Link, PhaseCost
from engine.ranks.split import Split

if TYPE_CHECKING:
    from engine.device import Program
    from engine.runner import Runner

FORECAST = (1, 2, 4, 8, 16)  # ranks
ROUNDS, IN_A_ROW = 5, 10  # sums of a size that are timed: medians, and one after the other
MOST_COLLECTIVES = 1 << 21  # whose times are kept


@dataclass
class Logged:
    """A replay of nodes from `first` on. times: TIMES [collectives] of the first thread, which does them. phase: of the
    step that it belongs to, where rank 0 knows that it happened; seconds: of that step, in its first replay."""

    first: int
    nodes: int
    rows: int
    logit_rows: int
    called: int
    returned: int
    times: np.ndarray
    phase: str = ""
    seconds: float = 0.0


class RankProfile(Profile):
    """A profile on every rank at once; that of rank 0 comes to have the cost.

    cost: None until the end, and where there is nothing to tell, or `no_cost`.
    """

    def __init__(self, runner: Runner, keep_trace: bool = False) -> None:
        super().__init__(runner, keep_trace)
        assert runner.comm is not None
        self.comm: Comm = runner.comm
        self.outer = runner.plan.profile
        self.log: list[Logged] = []
        self.not_logged = 0
        self._room = MOST_COLLECTIVES
        self._everyone = np.empty((0, self.comm.size, 2), np.int64)  # what was logged, by rank, since each one's zero
        self._collectives = cache(self._find_collectives)
        self._logit_rows, config = runner.step.tensors["logit_rows"], runner.config
        self._heads = (config.num_attention_heads, config.num_key_value_heads,
                       min(config.intermediate_size, config.vocab_size))  # fmt: skip
        self.comm.beat()
        self.zero = time.perf_counter_ns()  # at nearly the same time on every rank

    def replay(self, program: Program, first: int, last: int) -> None:
        try:
            super().replay(program, first, last)
        finally:
            self._log(self._replays[-1])
            if self.comm.rank:
                self._replays.clear()  # steps are rank 0's

    def _log(self, replay: Replay) -> None:
        which = self._collectives(replay.first, replay.times.shape[1])
        self._room -= len(which)
        if self._room < 0:
            self.not_logged += 1
            return
        times = replay.times[0, which]
        self.log.append(Logged(replay.first, replay.times.shape[1], int(self.arrays["rows"][0]), replay.logit_rows,
                               replay.called, replay.returned or replay.called, times))  # fmt: skip

    def _find_collectives(self, first: int, count: int) -> np.ndarray:
        nodes = self.plan.nodes[first : first + count]
        return np.array([i for i, node in enumerate(nodes) if node.op.collective], np.int64)

    def _keep(self, step: ProfiledStep) -> None:
        super()._keep(step)
        if self.not_logged:
            return
        mine = self.log[-len(step.replays) :]
        mine[0].seconds = (step.end - step.begin) / 1e9
        for logged in mine:
            logged.phase = step.phase

    # The end, on all ranks.

    def settle(self) -> None:
        """Brings the times of all ranks together and measures what lies between them."""
        mine = np.concatenate([np.empty((0, 2), np.int64), *map(spans, self.log)]) - self.zero
        collectives = [node for node in self.plan.nodes if node.op.collective]
        about = [len(mine), [(node.op.name, node.label) for node in collectives]]
        if not len(mine):
            return
        if len(set(self.comm.exchange(str(hash_of(about))))) > 1:
            self.no_cost = "the ranks' collectives are not the same"
            return
        self._everyone = on_all(self.comm, mine)
        row, rows = row_bytes(collectives[0]), collectives[0].written[0].shape[0]
        link = measure_link(self.comm, row, rows)
        if self.comm.rank == 0:
            self.cost = self._sum_up(link)

    def _sum_up(self, link: Link) -> Cost:
        ranks = self.comm.size
        phases = {name: PhaseCost(np.zeros(ranks), np.zeros(ranks)) for name in self.phases}
        for logged, durations in self._by_replay():
            if logged.phase:
                phase = phases[logged.phase]
                phase.add(durations / 1e9)
                phase.tokens += logged.rows if logged.seconds else 0  # once a step
                phase.seconds += logged.seconds
                phase.size += self._size(logged)
        found = {name: phase for name, phase in phases.items() if phase.tokens}
        for phase in found.values():
            phase.add_way(link)
        splits_all = not any(node.op.name == "all_gather" for node in self.plan.nodes)
        fits = {n: self._fits(n) for n in sorted({*FORECAST, ranks})} if splits_all else {}
        crowded = self.comm.sharing * self.threads > available_cores()
        return Cost(ranks, found, link, fits, crowded, self.not_logged)

    def _by_replay(self) -> Iterator[tuple[Logged, np.ndarray]]:
        """Each with the nanoseconds [1 + collectives, ranks] of the whole and of each collective."""
        start = 0
        for logged in self.log:
            part = self._everyone[start : start + 1 + len(logged.times)]
            start += len(part)
            yield logged, part[:, :, 1] - part[:, :, 0]

    def _size(self, logged: Logged) -> int:
        """Bytes of what came out of its collectives."""
        nodes = [self.plan.nodes[logged.first + i] for i in self._collectives(logged.first, logged.nodes)]
        rows = (logged.logit_rows if node.rows is self._logit_rows else logged.rows for node in nodes)
        return sum(row_bytes(node) * count for node, count in zip(nodes, rows, strict=True))

    def _fits(self, ranks: int) -> bool:
        try:
            Split(0, ranks).check(*self._heads)
        except UsageError:
            return False
        return True

    # The trace.

    def about(self) -> dict[str, Any]:
        return {"cost": self.cost.content()} if self.cost else {}

    def _trace_events(self) -> Iterator[dict[str, Any]]:
        """The other ranks are processes of their own, each with a line of what it did between and in collectives. Where
        clocks differ, they agree in when the profile began, to within a message or so."""
        yield from super()._trace_events()
        yield process_name(0, "rank 0")
        shown = sum(len(step.replays) for step in self.trace)
        shift = self.zero - (self.trace[0].begin if self.trace else 0)
        for rank in range(1, self.comm.size if shown and len(self._everyone) else 1):
            yield process_name(rank, f"rank {rank}")
            yield thread_name(0, "replays", rank)
            yield from self._rank_events(rank, shown, shift)

    def _rank_events(self, rank: int, shown: int, shift: int) -> Iterator[dict[str, Any]]:
        start = 0
        for logged in self.log:
            (begin, end), *collectives = (self._everyone[start:, rank] + shift)[: 1 + len(logged.times)].tolist()
            start += 1 + len(logged.times)
            if not logged.phase:
                continue
            shown -= 1
            if shown < 0:
                return
            for i, (left, right) in zip(self._collectives(logged.first, logged.nodes), collectives, strict=True):
                node = self.plan.nodes[logged.first + int(i)]
                yield event("compute", "segment", 0, begin, left, {}, rank)
                yield event(node.op.name, "node", 0, left, right, {"layer": node.label}, rank)
                begin = right
            yield event("compute", "segment", 0, begin, end, {}, rank)


@contextmanager
def profile_ranks(runner: Runner, keep_trace: bool) -> Iterator[RankProfile]:
    """On rank 0: a profile while this lasts, on all ranks."""
    comm = runner.comm
    assert comm is not None
    with comm.turn():
        comm.command(PROFILE, runner.number, True)
        profile = RankProfile(runner, keep_trace)
        runner.plan.profile = profile
    try:
        yield profile
    finally:
        if runner.closed or comm.ended:
            runner.plan.profile = profile.outer
        else:
            with comm.turn():
                comm.command(PROFILE, runner.number, False)
                runner.plan.profile = profile.outer
                profile.settle()


def follow_profile(runner: Runner, begins: bool) -> None:
    """What another rank does about it."""
    if begins:
        runner.plan.profile = RankProfile(runner)
    else:
        profile = runner.plan.profile
        assert isinstance(profile, RankProfile)
        runner.plan.profile = profile.outer
        profile.settle()


def measure_link(comm: Comm, row: int, rows: int) -> Link:
    """Times sums of a row of so many bytes and of so many such rows, all ranks together: several one after the other,
    for over a slow link ranks take turns in coming late. One round is to warm up."""
    arrays = [np.zeros((count, row // 4), np.float32) for count in (1, rows)]
    times = np.zeros((1 + ROUNDS, 2), np.int64)
    for found in times:
        for i, array in enumerate(arrays):
            comm.beat()
            begin = time.perf_counter_ns()
            for _ in range(IN_A_ROW):
                comm.all_reduce(array)
            found[i] = time.perf_counter_ns() - begin
    each = on_all(comm, times)[1:].mean(axis=1) / IN_A_ROW / 1e9
    seconds = np.median(each, axis=0)
    return Link.through(comm.size, (row, float(seconds[0])), (row * rows, float(seconds[1])))


def on_all(comm: Comm, mine: np.ndarray) -> np.ndarray:
    """What every rank has [n, m]: [n, ranks, m]."""
    found = np.empty((len(mine), comm.size * mine.shape[1]), mine.dtype)
    comm.all_gather(mine, found)
    return found.reshape(len(mine), comm.size, mine.shape[1])


def spans(logged: Logged) -> np.ndarray:
    """int64 [1 + collectives, 2]: when the replay and each of its collectives began and ended."""
    both = np.stack([logged.times["begin"], logged.times["end"]], axis=1)
    return np.concatenate([np.array([[logged.called, logged.returned]], np.int64), both])


def row_bytes(node: Node) -> int:
    """Bytes of a row of what comes out of a collective."""
    tensor = node.written[0]
    return tensor.width * tensor.dtype.itemsize


def hash_of(content: Any) -> int:
    """The same in every process."""
    return crc32(json.dumps(content).encode())
