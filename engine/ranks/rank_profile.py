"""Profiles of all ranks at once, and what the cost of a step is made of: engine/ranks/cost.py says what is what."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import numpy as np

from engine.errors import UsageError
from engine.machine import available_cores
from engine.plan import Node, Tensor
from engine.profile import Profile, ProfiledStep, Replay, event, process_name, thread_name
from engine.ranks.comm import PROFILE, Comm
from engine.ranks.cost import Cost, Line, Link, PhaseCost
from engine.ranks.links import all_rows, links_of_stages, measure_line, on_all
from engine.ranks.segments import Segments
from engine.ranks.split import Split, Stage
from engine.ranks.stages import Stages

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.device import Program
    from engine.runner import Runner

FORECAST = (1, 2, 4, 8, 16)  # ranks, or stages
MESSAGES = ("receive", "send")  # from stage to stage; other collectives are among the ranks of a stage
MOST_COLLECTIVES = 1 << 21  # whose times are kept
REPLAY = 16  # collectives: what is kept of a replay takes as much memory at least


@dataclass
class Logged:
    """A replay of nodes from `first` on. times: TIMES [collectives] of the first thread, which does them. phase: of the
    step that it belongs to, where rank 0 knows that it happened; seconds: of that step, in its first replay; fills: as
    many rows of prompts as a step can have, so that more may follow at once."""

    first: int
    rows: int
    logit_rows: int
    called: int
    returned: int
    times: np.ndarray
    phase: str = ""
    seconds: float = 0.0
    fills: bool = False


class Collective(NamedTuple):
    """Of a rank's plan. row: bytes of what comes out of it; of_logits: its rows are those that want logits."""

    name: str
    label: str
    row: int
    of_logits: bool

    @staticmethod
    def of(node: Node, logit_rows: Tensor) -> Collective:
        return Collective(node.op.name, node.label, row_bytes(node), node.rows is logit_rows)

    @property
    def is_message(self) -> bool:
        return self.name in MESSAGES


@dataclass
class RankLog:
    """All that a rank did. replays: int64 [1 + collectives, 3] each: -1 and when it began and ended, then for each
    collective which one it was, and likewise; since the rank's own zero."""

    collectives: list[Collective]
    replays: list[np.ndarray]


class RankProfile(Profile):
    """A profile on every rank at once; that of rank 0 comes to have the cost.

    cost: None until the end, and where there is nothing to tell, or `no_cost`.
    """

    def __init__(self, runner: Runner, keep_trace: bool = False) -> None:
        super().__init__(runner, keep_trace)
        assert runner.comm is not None and runner.peers is not None
        self.comm: Comm = runner.comm
        self.peers: Comm = runner.peers
        assert isinstance(runner.plan.program, Segments)
        self.program = runner.plan.program
        self.outer = runner.plan.profile
        self.log: list[Logged] = []
        self.not_logged = 0
        self.runner = runner
        self._ranks: list[RankLog] = []
        self._collectives = cache(self._find_collectives)
        count = np.array([[len(self._collectives(0, len(self.plan.nodes)))]])
        self._room = MOST_COLLECTIVES // max(REPLAY, int(on_all(self.comm, count).max()))  # replays, on every rank
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
        if len(self.log) == self._room:
            self.not_logged += 1
            return
        times = replay.times[0, self._collectives(replay.first, replay.times.shape[1])]
        self.log.append(Logged(replay.first, int(self.arrays["rows"][0]), replay.logit_rows,
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
        mine[0].fills = mine[0].rows == self.runner.max_rows and all(len(span) > 1 for span in step.spans)
        for logged in mine:
            logged.phase = step.phase

    # The end, on all ranks.

    def settle(self) -> None:
        """Brings the times of all ranks together and measures what lies between them."""
        logit_rows = self.runner.step.tensors["logit_rows"]
        found = [Collective.of(node, logit_rows) for node in self.plan.nodes if node.op.collective]
        if not self._agree(found):
            self.no_cost = "the ranks' collectives are not the same"
            return
        if not self.log:
            return
        rows = self.runner.max_rows
        among = [each for each in found if not each.is_message]
        links = links_of_stages(self.comm, self.peers, among[0].row if self.peers.size > 1 else 0, rows,
                                self.program.short_sum())  # fmt: skip
        line = None
        if isinstance(self.peers, Stages):
            row = next(each.row for each in found if each.is_message)
            line = measure_line(self.comm, self.peers, row, rows, self.runner.step.shared.nbytes)
        self._ranks = self._bring_together(found)
        if self.comm.rank == 0:
            with self.comm.watch.busy():
                self.cost = self._sum_up(links, line)

    def _agree(self, found: list[Collective]) -> bool:
        """Whether all ranks have replayed as often, and those of a stage with the same collectives."""
        mine = [self.peers.stage.index, len(self.log), str(hash_of(found))]
        said = [json.loads(text) for text in self.comm.exchange(json.dumps(mine))]
        return len({count for _, count, _ in said}) == 1 and len({(s, h) for s, _, h in said}) == self.peers.stage.count

    def _bring_together(self, found: list[Collective]) -> list[RankLog]:
        own = np.concatenate([np.empty((0, 3), np.int64), *map(self._spans, self.log)]) - [0, self.zero, self.zero]
        about = np.frombuffer(json.dumps(found).encode(), np.uint8)[:, None]
        logs = []
        for rows, text in zip(all_rows(self.comm, own), all_rows(self.comm, about), strict=True):
            collectives = [Collective(*each) for each in json.loads(text.tobytes())]
            logs.append(RankLog(collectives, np.split(rows, np.flatnonzero(rows[:, 0] < 0)[1:])))
        return logs

    def _spans(self, logged: Logged) -> np.ndarray:
        """As in RankLog."""
        first = len(self._collectives(0, logged.first))
        which = np.arange(first, first + len(logged.times))
        each = np.stack([which, logged.times["begin"], logged.times["end"]], axis=1)
        return np.concatenate([np.array([[-1, logged.called, logged.returned]], np.int64), each])

    def _sum_up(self, links: list[Link | None], line: Line | None) -> Cost:
        """links: of the ranks of each stage, that of rank 0 first."""
        stages, width = self.peers.stage.count, self.peers.size
        phases = {name: PhaseCost(stages, width) for name in self.phases}
        for i, logged in enumerate(self.log):
            if logged.phase:
                phase = phases[logged.phase]
                phase.tokens += logged.rows if logged.seconds else 0  # once a step
                phase.seconds += logged.seconds
                for block in range(stages):
                    phase.add(block, *self._of_stage(block, i, line))
        self._count_steps(phases)
        found = {name: phase for name, phase in phases.items() if phase.tokens}
        for phase in found.values():
            for shared, link in zip(phase.shared, links, strict=True):
                if link:
                    shared.add_way(link)
        splits_all = line is not None or not any(node.op.name == "all_gather" for node in self.plan.nodes)
        numbers = sorted({*FORECAST, stages if line else width}) if splits_all else ()
        shares = {n: largest_share(self.runner.config, n, stages=line is not None) for n in numbers}
        crowded = self.comm.place.sharing * self.threads > available_cores()
        return Cost(width * stages, stages, found, None if line else links[0], line, shares, crowded, self.not_logged)

    def _count_steps(self, phases: dict[str, PhaseCost]) -> None:
        """A full step of a prompt lets stages begin the next one at once, but where they take one after the other."""
        ahead, before = self.runner.most_rows > self.runner.max_rows, None
        for logged in self.log:
            if logged.seconds:
                follows = ahead and before and before.fills and logged.phase == before.phase == "prefill"
                phases[logged.phase].steps += 1
                phases[logged.phase].runs += not follows
                before = logged

    def _of_stage(self, block: int, i: int, line: Line | None) -> tuple[np.ndarray, np.ndarray, int]:
        """Of a stage's ranks in replay i: seconds [1 + collectives, ranks] of the whole and of each collective; the way
        of each that is a message, NaN for others; the bytes of what came out of these."""
        width, stages, logged = self.peers.size, self.peers.stage.count, self.log[i]
        logs = self._ranks[block * width : (block + 1) * width]
        parts = np.stack([log.replays[i] for log in logs], axis=1)
        ways, size = [], 0
        for which in parts[1:, 0, 0]:
            each = logs[0].collectives[which]
            if each.is_message:
                assert line
                boundary = (block - 1) % stages - (each.name == "receive")
                ways.append(line.boundaries[boundary].seconds(1, logged.rows * each.row, 2))
            else:
                ways.append(np.nan)
                size += each.row * (logged.logit_rows if each.of_logits else logged.rows)
        return (parts[:, :, 2] - parts[:, :, 1]) / 1e9, np.array(ways), size

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
        for rank, log in enumerate(self._ranks if shown else []):
            if rank:
                yield process_name(rank, f"rank {rank}")
                yield thread_name(0, "replays", rank)
                yield from self._rank_events(rank, log, shown, shift)

    def _rank_events(self, rank: int, log: RankLog, shown: int, shift: int) -> Iterator[dict[str, Any]]:
        happened = [rows for logged, rows in zip(self.log, log.replays, strict=True) if logged.phase]
        for rows in happened[:shown]:
            (_, begin, end), *collectives = (rows + [0, shift, shift]).tolist()
            for which, left, right in collectives:
                each = log.collectives[which]
                yield event("compute", "segment", 0, begin, left, {}, rank)
                yield event(each.name, "node", 0, left, right, {"layer": each.label}, rank)
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


def largest_share(config: ModelConfig, count: int, stages: bool) -> float | None:
    """Of the computing, among so many ranks or so many stages; None where there cannot be as many."""
    try:
        if stages:
            Stage(0, count).check(config.num_hidden_layers)
            layers = [len(Stage(i, count).layers(config.num_hidden_layers)) for i in range(count)]
            return max(layers) / sum(layers)
        Split(0, count).check(config.num_attention_heads, config.num_key_value_heads,
                              min(config.intermediate_size, config.vocab_size))  # fmt: skip
    except UsageError:
        return None
    return 1 / count


def row_bytes(node: Node) -> int:
    """Bytes of a row of what comes out of a collective."""
    tensor = node.written[0]
    return tensor.width * tensor.dtype.itemsize


def hash_of(content: Any) -> int:
    """The same in every process."""
    return crc32(json.dumps(content).encode())
