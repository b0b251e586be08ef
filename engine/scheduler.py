"""The engine thread: forms steps out of the requests at hand and runs them. It alone makes native calls; callers
queue requests and set flags."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import NamedTuple

from engine.device import Cancelled, NotFiniteError
from engine.errors import RillError
from engine.request import Request
from engine.runner import Runner
from engine.step import Segment

SMALLEST_BUDGET = 16  # rows of a step after it has been stopped again and again


class Part(NamedTuple):
    """What a request has in a step: its next tokens, which stand in the step from `first_row` on."""

    request: Request
    segment: Segment
    first_row: int

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + len(self.segment.tokens))


class Scheduler:
    """Up to max_batch requests run in shared steps, more wait their turn. A slot keeps the tokens of its last
    sequence in the cache, for the next prompt that begins with them."""

    def __init__(self, runner: Runner, max_batch: int) -> None:
        self.runner = runner
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.cached: list[list[int]] = [[] for _ in range(max_batch)]  # what a free slot holds
        self.free_slots = set(range(max_batch))
        self.budget = runner.most_rows  # rows of the next step
        self.changed = threading.Condition()
        self.closed = False
        self.pid = os.getpid()
        self.thread = threading.Thread(target=self._loop, name="rill-engine", daemon=True)
        self.thread.start()

    # Called from any thread.

    def submit(self, requests: list[Request]) -> None:
        if os.getpid() != self.pid:
            raise RillError("this process was forked from the one that loaded the model: load it in the child, or "
                            "start the child with the spawn method")  # fmt: skip
        with self.changed:
            if self.closed:
                raise RillError("the engine has been closed")
            self.waiting.extend(requests)
            self.changed.notify()

    def cancel(self, requests: list[Request]) -> None:
        """Ends requests at once, wherever they are; others go on unharmed. Takes no lock: signal handlers call it."""
        for request in requests:
            request.cancelled = True  # before the flag: the engine clears the flag first, then looks for these
        self.runner.cancel(True)

    def close(self) -> None:
        """Cancels all requests and waits for the engine thread to end. In the middle of a turn it does not wait, for
        that thread may need it: a model that nobody closed may be collected anywhere."""
        if os.getpid() != self.pid:
            return  # a forked child has no engine thread, and perhaps a lock that nobody will release
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.runner.cancel(True)
        if threading.current_thread() is not self.thread and not self.runner.in_turn:
            self.thread.join()

    # The engine thread.

    def _loop(self) -> None:
        while self._wait():
            try:
                self._step()
                self.budget = self.runner.most_rows
            except Cancelled:
                # The step did not happen; it is formed anew without those who left. It gets smaller each time, so
                # that requests which come and go cannot keep a long prompt from ever being read.
                self.budget = max(SMALLEST_BUDGET, len(self.cached), self.budget // 2)
            except BaseException as error:  # whatever it is, callers must not wait for ever
                self._fail(list(self.running), error)
        self.runner.close()

    def _wait(self) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.running or self.closed)
            return bool(self.waiting or self.running)

    def _step(self) -> None:
        profile = self.runner.plan.profile
        if profile:
            profile.begin_step()
        self.runner.cancel(False)
        self._drop_cancelled()
        self._admit()
        if not self.running:
            return
        parts = self._compose()
        wants = [want for part in parts for want in part.request.wants(part.segment.tokens, part.first_row)]
        try:
            self.runner.run([part.segment for part in parts], wants)
        except NotFiniteError as error:
            self._blame(next(part for part in parts if wants[error.row].row in part.rows))
            return
        for part in parts:
            request = part.request
            request.computed += len(part.segment.tokens)
            if request.computed + 1 == len(request.tokens):
                self.runner.step.history.write(request.slot, request.computed, request.tokens[-1:])
            if request.want_logits and request.computed == len(request.tokens):
                request.finish_reason = "stop"
        if profile:
            profile.end_step(idle=all(r.finish_reason for r in self.running))
        self._release([r for r in self.running if r.finish_reason])

    def _compose(self) -> list[Part]:
        """The next step: a row for each sequence that generates, the rest for prompts in order of arrival."""
        parts: list[Part] = []
        rows, most = 0, self.budget
        if self.runner.plan.profile or any(len(r.tokens) - r.computed == 1 for r in self.running):
            most = min(most, self.runner.max_rows)  # what is timed runs alone; who generates waits for no long prompt
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.computed > 1):
            tokens = request.tokens[request.computed : request.computed + most - rows]
            if tokens:
                parts.append(Part(request, Segment(request.slot, request.computed, tokens), rows))
                rows += len(tokens)
        return parts

    def _admit(self) -> None:
        while self.free_slots and (request := self._next_waiting()):
            if self._is_leaving(request):
                self._end(request)
                continue
            slot = max(sorted(self.free_slots), key=lambda s: self._gain(s, request))
            request.slot, request.history = slot, self.runner.step.history
            self.running.append(request)
            self.free_slots.remove(slot)
            request.computed = self.runner.truncate(slot, self._reusable(slot, request))
            request.timings.cached_tokens = request.computed
            request.started = time.perf_counter()
            request.history.write(slot, 0, request.prompt)

    def _next_waiting(self) -> Request | None:
        with self.changed:
            return self.waiting.popleft() if self.waiting else None

    def _reusable(self, slot: int, request: Request) -> int:
        """Tokens of the prompt that a slot holds already. One row at least must be computed, for its logits."""
        if request.needs_every_row:
            return 0
        return self.runner.usable(slot, common_prefix(self.cached[slot], request.prompt[:-1]))

    def _gain(self, slot: int, request: Request) -> int:
        """What a request saves in a slot, less what is thrown away there: a conversation keeps its slot."""
        reusable = self._reusable(slot, request)
        return reusable - (len(self.cached[slot]) - reusable)

    def _is_leaving(self, request: Request) -> bool:
        return request.cancelled or self.closed

    def _drop_cancelled(self) -> None:
        with self.changed:
            gone = [r for r in self.waiting if self._is_leaving(r)]
            if gone:
                self.waiting = deque(r for r in self.waiting if r not in gone)
        for request in gone:
            self._end(request)
        self._release([r for r in self.running if self._is_leaving(r)])

    def _release(self, requests: list[Request]) -> None:
        """Takes requests out of the batch. What they computed stays in the cache if it can be trusted."""
        for request in requests:
            self.running.remove(request)
            self.cached[request.slot] = request.tokens[: request.computed] if request.is_sound else []
            self.free_slots.add(request.slot)
            self._end(request)

    def _blame(self, part: Part) -> None:
        """Fails the request whose logits are not finite."""
        where = self.runner.first_not_finite(part.rows)
        self._fail([part.request], RillError(f"the logits are not finite; first seen at {where}"))

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        for request in requests:
            request.fail(error)
        self._release(requests)

    def _end(self, request: Request) -> None:
        request.finish_reason = request.finish_reason or "cancelled"
        request.finish()


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    count = min(len(a), len(b))
    if a[:count] == b[:count]:
        return count
    return next(i for i in range(count) if a[i] != b[i])
