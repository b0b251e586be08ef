from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer
from engine.plan import Tensor, op


@op("x", collective=True)
def receive(x: np.ndarray) -> None:
    """x becomes what the stage before has sent. Where there is none, it stays as it is."""


class Receive(Layer):
    """The beginning of a stage that follows another one: rows as that one has left them.

    forward: token [rows] -> x [rows, width].
    """

    def __init__(self, width: int, name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.width = width

    def record(self, token: Tensor) -> Tensor:
        plan = self.plan_of(token)
        x = plan.new(self.width, token, f"{self.name}.x")
        plan.record(receive, self.name, x=x)
        return x
