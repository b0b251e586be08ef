from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer
from engine.plan import Tensor, op
from engine.ranks.split import WHOLE, Split


@op("x", collective=True)
def gather(x: np.ndarray) -> None:
    """Rank 0 gets every rank's columns of x: those that Split.part gives it. One rank has them all."""


class Gather(Layer):
    """Brings together on rank 0 what each rank has written into its own columns. One rank records nothing.

    forward: x [rows, width] -> x, in place.
    """

    def __init__(self, split: Split = WHOLE, name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.split = split

    def record(self, x: Tensor) -> Tensor:
        if self.split.ranks > 1:
            self.plan_of(x).record(gather, self.name, x=x)
        return x
