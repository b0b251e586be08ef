from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer
from engine.plan import Tensor, op
from engine.ranks.split import WHOLE, Split


@op("x", collective=True)
def all_reduce(x: np.ndarray) -> None:
    """x becomes its sum over all ranks, on every rank. Of one rank, that is x."""


class AllReduce(Layer):
    """Sums what every rank has computed from its part of a model. One rank records nothing.

    forward: x [rows, width] -> x, in place.
    """

    def __init__(self, split: Split = WHOLE, name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.split = split

    def record(self, x: Tensor) -> Tensor:
        if self.split.ranks > 1:
            self.check(x.base is None, "only a whole tensor lies in one piece")
            self.plan_of(x).record(all_reduce, self.name, x=x)
        return x
