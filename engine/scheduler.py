"""The engine thread: forms steps out of the requests at hand and runs them. It alone makes native calls; callers
queue requests and set flags."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

from engine.device import Cancelled, NotFiniteError
from engine.errors import RillError
from engine.request import Request
from engine.runner import Runner, Segment, Want


class Scheduler:
    """Up to max_batch requests run in shared steps, more wait their turn. A slot keeps the tokens of its last
    sequence in the cache, for the next prompt that begins with them."""

    def __init__(self, runner: Runner, max_batch: int) -> None:
        self.runner = runner
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.cached: list[list[int]] = [[] for _ in range(max_batch)]  # tokens of each slot that nobody holds
        self.free_slots = set(range(max_batch))
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
        """Ends requests at once, wherever they are. Others go on unharmed."""
        for request in requests:
            request.cancelled = True  # before the flag: the engine clears the flag first, then looks for these
        self.runner.device.cancel(True)
        with self.changed:
            self.changed.notify()

    def close(self) -> None:
        """Cancels all requests and waits for the engine thread to end."""
        with self.changed:
            self.closed = True
            for request in [*self.waiting, *self.running]:
                request.cancelled = True
            self.changed.notify()
        self.runner.device.cancel(True)
        if os.getpid() == self.pid:
            self.thread.join()

    # The engine thread.

    def _loop(self) -> None:
        while self._wait():
            try:
                self._step()
            except Cancelled:
                continue  # the step did not happen; it is formed anew without those who left
            except Exception as error:  # whatever it is, callers must not wait for ever
                self._fail(list(self.running), error)

    def _wait(self) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.running or self.closed)
            return bool(self.waiting or self.running)

    def _step(self) -> None:
        self.runner.device.cancel(False)
        self._drop_cancelled()
        self._admit()
        if not self.running:
            return
        segments, wants, owners = self._compose()
        try:
            self.runner.run(segments, wants)
        except NotFiniteError as error:
            row = wants[error.row].row
            where = self.runner.first_not_finite(row)
            self._fail([owners[row]], RillError(f"the logits are not finite; first seen at {where}"))
            return
        for segment in segments:
            request = next(r for r in self.running if r.slot == segment.slot)
            request.computed += len(segment.tokens)
            self.runner.write_history(request.slot, request.computed, request.tokens[request.computed :])
            if request.want_logits and request.computed == len(request.tokens):
                request.finish_reason = "stop"
        self._release([r for r in self.running if r.finish_reason])

    def _compose(self) -> tuple[list[Segment], list[Want], dict[int, Request]]:
        """The next step: a row for each sequence that generates, the rest for prompts in order of arrival. Returns
        whose each row is, too."""
        left = self.runner.max_rows
        segments: list[Segment] = []
        wants: list[Want] = []
        owners: dict[int, Request] = {}
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.computed > 1):
            tokens = request.tokens[request.computed : request.computed + left]
            if not tokens:
                break
            first_row = self.runner.max_rows - left
            wants += request.wants(len(tokens), first_row)
            segments.append(Segment(request.slot, request.computed, tokens))
            owners.update((first_row + i, request) for i in range(len(tokens)))
            left -= len(tokens)
        return segments, wants, owners

    def _admit(self) -> None:
        while self.free_slots:
            with self.changed:
                if not self.waiting:
                    return
                request = self.waiting.popleft()
            if request.cancelled:
                self._end(request)
                continue
            slot = max(sorted(self.free_slots), key=lambda s: common_prefix(self.cached[s], request.prompt))
            self.free_slots.remove(slot)
            request.slot, request.history_start = slot, slot * self.runner.step.history_length
            self.running.append(request)
            reusable = 0 if request.needs_every_row else common_prefix(self.cached[slot], request.prompt[:-1])
            request.computed = self.runner.cache.truncate(slot, reusable)
            request.timings.cached_tokens = request.computed
            request.started = time.perf_counter()
            self.runner.write_history(slot, 0, request.prompt)

    def _drop_cancelled(self) -> None:
        with self.changed:
            gone = [r for r in self.waiting if r.cancelled]
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
        for request in gone:
            self._end(request)
        self._release([r for r in self.running if r.cancelled])

    def _release(self, requests: list[Request]) -> None:
        """Takes requests out of the batch. What they computed stays in the cache."""
        for request in requests:
            self.running.remove(request)
            self.cached[request.slot] = request.tokens[: request.computed]
            self.free_slots.add(request.slot)
            self._end(request)

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            request.error = error
            request.computed = 0  # what is in the cache cannot be trusted
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
