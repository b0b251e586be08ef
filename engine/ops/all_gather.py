from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer
from engine.plan import Tensor, op
from engine.ranks.split import WHOLE, Split


@op("out", collective=True)
def all_gather(x: np.ndarray, out: np.ndarray) -> None:
    """Every rank's x side by side, on every rank. Of one rank, that is x."""
    out[...] = x


class AllGather(Layer):
    """Puts together what every rank has made, as wide on each. One rank records nothing.

    forward: x [rows, width] -> [rows, ranks · width].
    """

    def __init__(self, split: Split = WHOLE, name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.split = split

    def record(self, x: Tensor) -> Tensor:
        if self.split.ranks == 1:
            return x
        plan = self.plan_of(x)
        out = plan.new(x.width * self.split.ranks, x, f"{self.name}.out")
        plan.record(all_gather, self.name, x=x, out=out)
        return out
