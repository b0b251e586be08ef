"""A plan that ranks replay together: collectives cut it into segments, which a device replays as ever, and between two
segments Python calls MPI. On one machine, those of a short step need no cut: native code does them by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np

from engine.device import Cancelled, Program
from engine.plan import Node, Plan
from engine.ranks.comm import Comm

LONG_STEP = 16  # rows: such a step looks at each collective whether it is to stop, shorter ones are soon over
LOOK_UP = 8  # nodes after which a stage looks as well, since it may have no collective for long


class Segments(Program):
    """A lowered plan, replayed by every rank at the same time."""

    def __init__(self, plan: Plan, comm: Comm) -> None:
        assert plan.program is not None
        self.plan, self.program, self.comm = plan, plan.program, comm
        self.met: dict[int, int] = {}  # collectives that native code does by itself, of so many rows at most
        if comm.window and comm.window.meeting:
            half = comm.window.meeting.half
            self.met = {i: self._most_rows(plan.nodes[i], half) for i in self.program.meet(comm.window.meeting)}
        self.ends = cache(self._ends)

    def begin(self) -> None:
        self.program.begin()

    def _most_rows(self, node: Node, half: int) -> int:
        """Of a step in which native code does this collective, which cannot be stopped then. LONG_STEP: of any."""
        width = node.written[0].width
        if node.op.name == "gather":  # one row after the other
            return LONG_STEP if width <= half else 0
        return min(LONG_STEP - 1, half // (self.comm.size * width))

    def short_sum(self) -> Callable[[], None] | None:
        """Does what a step of one row does at a sum, with what there is; None where that is a message."""
        for i, node in enumerate(self.plan.nodes):
            if node.op.name == "all_reduce" and self.met.get(i, 0):
                node.rows.storage[0] = 1
                return partial(self.program.run, i, i + 1)
        return None

    def _ends(self, first: int, last: int, rows: int) -> list[int]:
        """Where the segments of nodes [first, last) end, in a step of so many rows."""
        among = ((i, self.plan.nodes[i]) for i in range(first, last))
        return [*(i for i, node in among if node.op.collective and rows > self.met.get(i, 0)), last]

    def run(self, first: int, last: int, times: np.ndarray | None = None) -> None:
        if first >= last:
            return  # rank 0's plan has nodes that the others' have not
        begin = first
        for end in self.ends(first, last, min(LONG_STEP, int(self.plan.nodes[first].rows.storage[0]))):
            for start, stop in self._pieces(begin, end):
                part = None if times is None else np.ascontiguousarray(times[:, start - first : stop - first])
                self.program.run(start, stop, part)
                if times is not None:
                    times[:, start - first : stop - first] = part
            if end < last:
                self._join(end, None if times is None else times[0, end - first : end - first + 1])
            begin = end + 1

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Nodes [begin, end) in one go; on most devices, those of a stage in pieces, with a look around between two."""
        cuts = self.comm.stage.count > 1 and not self.program.whole
        most = LOOK_UP if cuts else len(self.plan.nodes)
        for start in range(begin, end, most):
            if start > begin:
                self._look(start)
            yield start, min(start + most, end)

    def _look(self, index: int) -> None:
        """Raises Cancelled on all ranks of a stage or on none."""
        self.comm.show_life()
        if int(self.plan.nodes[index].rows.storage[0]) >= LONG_STEP and self.comm.agreed_to_stop():
            raise Cancelled

    def _join(self, index: int, times: np.ndarray | None) -> None:
        """Does a collective; raises Cancelled on all ranks or on none."""
        node = self.plan.nodes[index]
        begin = time.perf_counter_ns()
        with self.plan.device.exchanged(node) as arrays:
            if node.op.name != "receive":  # what has been sent is received, or the next step would take it for its own
                self._look(index)
            getattr(self.comm, node.op.name)(**arrays)
        if times is not None:
            end = time.perf_counter_ns()
            times[0] = begin, end, end
