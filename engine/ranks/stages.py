"""Ranks as the stages of a pipeline: rows go from stage to stage, and nothing else has to be on time.

Rank 0 is in the last stage: there the logits are made, of which it samples, so that no logits travel. The ranks that
share a stage's layers do their collectives among themselves; the first of them speaks with the other stages, and one
copy of the rows goes over, however many ranks share a stage.

Every step sends exactly one message from each stage to the next: its rows, or why there are none. So a stage may stop
wherever it is, and no message is ever left for a later step. Besides there are notes, which come when they come: rank 0
asks to stop, and a stage that is at work says that it is alive to those that wait for it.
"""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from engine.device import Cancelled, TokenError
from engine.ranks.comm import Comm
from engine.ranks.split import Stage
from engine.ranks.watch import ALIVE

ROWS, STOPPED, BAD_TOKEN = range(3)  # the tag of a message from stage to stage
STOP = ALIVE + 1  # the tag of a note: steps up to this number are to stop


@cache
def open_stages(comm: Comm, tp: int, pp: int) -> Comm:
    """What the collectives of a model go by that pp stages of tp ranks each hold. All ranks call it."""
    return Stages(comm, tp, pp) if pp > 1 else comm


class Stages(Comm):
    """This rank's stage, and its way to those before and after."""

    def __init__(self, everyone: Comm, tp: int, pp: int) -> None:
        vars(self).update(vars(everyone))
        self.leads = everyone.rank == 0
        block = everyone.rank // tp
        with everyone.watch.waiting():
            self.line = everyone.world.Dup()
            self.share(everyone.world.Split(block, everyone.rank))
        self.stage = Stage((block - 1) % pp, pp)
        self.before, self.after = ((block + way) % pp * tp for way in (-1, 1))
        self.first_ranks = range(tp, everyone.size, tp)  # of all stages but the last
        self.told = self.begun = self.stop_until = 0
        self._shown = time.monotonic()

    # What a plan's collectives do.

    def send(self, x: np.ndarray, pending: np.ndarray) -> None:
        """The next stage gets x + pending."""
        self.send_to(self.after, x, pending)

    def receive(self, x: np.ndarray) -> None:
        """x becomes what the stage before sends. Raises what has stopped that one."""
        self.receive_from(self.before, x)

    def send_to(self, rank: int, x: np.ndarray, pending: np.ndarray) -> None:
        """The stage of which that rank is the first gets x + pending."""
        x += pending
        if self.rank == 0:
            self._wait(self.line.Isend(x, rank, ROWS))

    def receive_from(self, rank: int, x: np.ndarray) -> None:
        """As receive, from the stage of which that rank is the first."""
        came = np.zeros(2, np.int32)
        if self.rank == 0:
            status = self.mpi.Status()
            message = self.line.Irecv(x, rank, self.mpi.ANY_TAG)
            self._wait(message, status=status, meanwhile=self._pass_stop_on)
            came[:] = status.Get_tag(), x.reshape(-1)[:1].view(np.int32)[0]
        if self.size > 1:
            self.broadcast(came)
        if came[0] == STOPPED:
            raise Cancelled
        if came[0] == BAD_TOKEN:
            raise TokenError(int(came[1]))
        if self.size > 1:
            self.broadcast(x)

    def pass_on(self, error: Exception) -> None:
        """Tells the next stage why no rows come."""
        if self.rank == 0 and not self.stage.is_last:
            row = np.array([error.row if isinstance(error, TokenError) else 0], np.int32).view(np.float32)
            self._wait(self.line.Isend(row, self.after, BAD_TOKEN if isinstance(error, TokenError) else STOPPED))

    def agreed_to_stop(self) -> bool:
        """Whether rank 0 has been asked to stop the step at hand, as far as this stage has heard."""
        if self.rank == 0:
            self._pass_stop_on()
            self._hear_of_stop()
        flag = np.array([self.stopped or self.begun <= self.stop_until], np.int32)
        if self.size > 1:
            self.broadcast(flag)
        return bool(flag[0])

    def _pass_stop_on(self) -> None:
        """Rank 0 lets the other stages know, once."""
        if self.leads and self.stopped and self.stop_until < self.told:
            self.stop_until = self.told
            self.notes.send(self.first_ranks, STOP, self.told)

    def _hear_of_stop(self) -> None:
        for told in self.notes.read(0, STOP):
            self.stop_until = max(self.stop_until, told)

    def show_life(self) -> None:
        """A stage may take longer over a step than others wait for one that says nothing."""
        if self.rank == 0 and time.monotonic() - self._shown > self.patience / 4:
            self._shown = time.monotonic()
            self.notes.send(self.others, ALIVE)
