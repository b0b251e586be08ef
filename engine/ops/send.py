from __future__ import annotations

import numpy as np

from engine.layer import Layer
from engine.plan import Tensor, op


@op("x", collective=True)
def send(x: np.ndarray, pending: np.ndarray) -> None:
    """x += pending; the next stage of a pipeline gets x. Where there is no other, that is all."""
    x += pending


class Send(Layer):
    """The end of a stage that another one follows. What is still to be added to x is added first, so that one message
    of rows goes over.

    forward: x [rows, width], pending [rows, width] -> x, in place.
    """

    def record(self, x: Tensor, pending: Tensor) -> Tensor:
        self.check(x.base is None, "only a whole tensor lies in one piece")
        self.check(x.width == pending.width, f"{x.width} numbers a row, to which {pending.width} are added")
        self.plan_of(x, pending).record(send, self.name, x=x, pending=pending)
        return x
