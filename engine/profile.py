"""Where the time of steps goes: every node timed, summed up by op, and each replay as a trace of events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from engine.abi import struct_dtype
from engine.work import Limits, PlanWork, Work, spans_of

if TYPE_CHECKING:
    from engine.device import Program
    from engine.ranks.cost import Cost
    from engine.runner import Runner

TIMES = struct_dtype("node_times")  # nanoseconds of the clock that time.perf_counter_ns reads
NEVER = np.iinfo(np.int64).max
MOST_EVENTS = 1_000_000  # of a trace: viewers take no more


@dataclass
class Replay:
    """Nodes as they ran, from `first` on. times: TIMES [threads, nodes], zeros where a thread did not run."""

    first: int
    logit_rows: int
    times: np.ndarray
    called: int = 0  # nanoseconds: when the device was called
    returned: int = 0

    def spent(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nanoseconds of each node: from when the first thread began until the last one was done, from then until the
        first one passed the barrier, and what the threads on average waited for the last one."""
        ran, end = self.times["end"] > 0, self.times["end"]
        begin, passed = (np.where(ran, self.times[name], NEVER).min(axis=0) for name in ("begin", "passed"))
        begin[0] = self.times["begin"][:, 0].max()  # threads that come late to a replay are no node's time
        last = end.max(axis=0)
        waiting = np.where(ran, last - np.maximum(end, begin), 0).sum(axis=0) / ran.sum(axis=0)
        return last - begin, passed - last, waiting


@dataclass
class ProfiledStep:
    """A step that happened, from when the engine began to form it until it had dealt with what came of it."""

    begin: int
    end: int
    spans: list[range]  # the positions of each sequence
    replays: list[Replay]

    @property
    def phase(self) -> str:
        return "decode" if all(len(span) == 1 for span in self.spans) else "prefill"


@dataclass(frozen=True)
class OpTime:
    """All calls of an op. waiting: the share of its time that threads waited for the last one; least: seconds at the
    machine's limits, where they are known."""

    op: str
    calls: int
    seconds: float
    waiting: float
    work: Work
    least: float | None


@dataclass
class Phase:
    """The sums over the prefill steps, in which some sequence has several rows, or over the decode steps."""

    kinds: PlanWork
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    barriers: float = 0.0  # seconds from the last thread's arrival until a thread goes on
    starting: float = 0.0  # seconds of the device's calls until all threads have begun, and after the last barrier
    python: float = 0.0  # seconds outside the device's calls
    works: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.kinds.nodes)
        self.calls, self.spent, self.waited = np.zeros(count, int), np.zeros(count), np.zeros(count)
        self.works = [Work()] * count

    def add(self, step: ProfiledStep) -> None:
        called = sum(replay.returned - replay.called for replay in step.replays)
        self.steps += 1
        self.rows += sum(map(len, step.spans))
        self.seconds += (step.end - step.begin) / 1e9
        self.python += (step.end - step.begin - called) / 1e9
        for replay in step.replays:
            self._add_replay(replay, step.spans)

    def _add_replay(self, replay: Replay, spans: list[range]) -> None:
        spent, barrier, waiting = replay.spent()
        self.starting += (replay.returned - replay.called - spent.sum() - barrier.sum()) / 1e9
        kind_of, count = self.kinds.kind_of[replay.first : replay.first + len(spent)], len(self.calls)
        calls = np.bincount(kind_of, minlength=count)
        self.calls += calls
        self.spent += np.bincount(kind_of, spent, count) / 1e9
        self.waited += np.bincount(kind_of, waiting, count) / 1e9
        self.barriers += barrier.sum() / 1e9
        for kind in np.flatnonzero(calls):
            self.works[kind] += self.kinds.of(int(kind), spans, replay.logit_rows) * int(calls[kind])

    def by_op(self, limits: Limits | None) -> list[OpTime]:
        """The ops that took any time, those first that took longest."""
        names = [node.op.name for node in self.kinds.nodes]
        found = []
        for op in dict.fromkeys(names):
            mine = [i for i, name in enumerate(names) if name == op and self.calls[i]]
            seconds, waited = float(self.spent[mine].sum()), float(self.waited[mine].sum())
            if seconds > 0:  # not so where a device has fused all of them into others
                least = sum(limits.seconds(self.works[i]) for i in mine) if limits else None
                work = sum((self.works[i] for i in mine), Work())
                found.append(OpTime(op, int(self.calls[mine].sum()), seconds, waited / seconds, work, least))
        return sorted(found, key=lambda each: -each.seconds)


class Profile:
    """What the steps of a runner took, for as long as it is the profile of its plan (see LLM.profile).

    phases: "prefill" and "decode" -> Phase. stopped: steps that did not happen because of a cancel or a failure. cost:
    each rank's part, where there are several and the profile has ended. The time that the profile itself takes between
    steps counts nowhere. The engine thread fills it; a step is in it before its requests end.
    """

    cost: Cost | None = None
    no_cost = ""  # why there is none, where several ranks have run something

    def __init__(self, runner: Runner, keep_trace: bool = False) -> None:
        self.plan, self.arrays = runner.plan, runner.step.arrays
        self.threads = int(getattr(runner.device, "threads", 1))
        self.keep_trace = keep_trace
        kinds = PlanWork(self.plan, runner.step)
        self.phases = {name: Phase(kinds) for name in ("prefill", "decode")}
        self.stopped = 0
        self.trace: list[ProfiledStep] = []
        self.left_out = 0  # steps that the trace has no place for
        self._events = 0
        self._begin: int | None = None  # of the step at hand
        self._resumed: int | None = None  # when the engine went on at once after the last step
        self._replays: list[Replay] = []

    # The engine's side.

    def begin_step(self) -> None:
        self.stopped += bool(self._replays)
        self._replays = []
        self._begin, self._resumed = self._resumed or time.perf_counter_ns(), None

    def replay(self, program: Program, first: int, last: int) -> None:
        """Replays nodes [first, last) of the plan, timed."""
        replay = Replay(first, int(self.arrays["logit_rows"][0]), np.zeros((self.threads, last - first), TIMES))
        self._replays.append(replay)
        replay.called = time.perf_counter_ns()
        program.run(first, last, replay.times)
        replay.returned = time.perf_counter_ns()

    def end_step(self, idle: bool) -> None:
        """idle: nothing is left to do, so that the next step is one that had to be waited for."""
        if self._begin is not None and self._replays:
            rows = int(self.arrays["rows"][0])
            spans = spans_of(self.arrays["pos"][:rows], self.arrays["seq"][:rows])
            step = ProfiledStep(self._begin, time.perf_counter_ns(), spans, self._replays)
            self.phases[step.phase].add(step)
            self._keep(step)
        self._begin, self._replays = None, []
        self._resumed = None if idle else time.perf_counter_ns()

    def _keep(self, step: ProfiledStep) -> None:
        self._events += 1 + sum(replay.times.size for replay in step.replays)
        if self.keep_trace and self._events <= MOST_EVENTS:
            self.trace.append(step)
        else:
            self.left_out += self.keep_trace

    # The reader's side.

    def dtypes(self) -> set[np.dtype]:
        """Of all products so far."""
        return {dtype for phase in self.phases.values() for work in phase.works for dtype in work.operations}

    def write_trace(self, file: IO[str]) -> None:
        """The steps in Chrome's trace event format, for Perfetto and chrome://tracing: a line of steps and one a
        thread, where what lies between two nodes is the wait for other threads. Times in microseconds."""
        file.write(json.dumps({"displayTimeUnit": "ms", **self.about()})[:-1] + ', "traceEvents": [\n')
        for i, each in enumerate(self._trace_events()):
            file.write((",\n" if i else "") + json.dumps(each))
        file.write("\n]}\n")

    def about(self) -> dict[str, Any]:
        """What a trace says beside its events."""
        return {}

    def _trace_events(self) -> Iterator[dict[str, Any]]:
        lines = ["steps", *(f"thread {t}" for t in range(self.threads))]
        for tid, name in enumerate(lines):
            yield thread_name(tid, name)
            yield {"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": tid, "args": {"sort_index": tid}}
        zero = self.trace[0].begin if self.trace else 0
        for step in self.trace:
            rows = sum(map(len, step.spans))
            args = {"phase": step.phase, "rows": rows, "sequences": len(step.spans),
                    "positions": [[span.start, span.stop - 1] for span in step.spans]}  # fmt: skip
            yield event(f"{step.phase} {rows}", "step", 0, step.begin - zero, step.end - zero, args)
            for replay in step.replays:
                for thread, times in enumerate(replay.times):
                    yield from self._node_events(replay.first, thread, times, zero)

    def _node_events(self, first: int, thread: int, times: np.ndarray, zero: int) -> Iterator[dict[str, Any]]:
        for i, (begin, end, passed) in enumerate(times.tolist(), first):
            if end:
                node = self.plan.nodes[i]
                args = {"layer": node.label, "node": i, "wait_us": (passed - end) / 1e3}
                yield event(node.op.name, "node", thread + 1, begin - zero, end - zero, args)


# Events of a trace.


def event(
    name: str, category: str, tid: int, begin: int, end: int, args: dict[str, Any], pid: int = 0
) -> dict[str, Any]:
    """From begin to end, in nanoseconds."""
    return {"name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid, "ts": begin / 1e3,
            "dur": (end - begin) / 1e3, "args": args}  # fmt: skip


def thread_name(tid: int, name: str, pid: int = 0) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def process_name(pid: int, name: str) -> dict[str, Any]:
    return {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
