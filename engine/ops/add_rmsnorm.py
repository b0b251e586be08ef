from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer, Source, vector
from engine.ops.rmsnorm import rmsnorm
from engine.plan import Tensor, op


@op("x", "out")
def add_rmsnorm(x: np.ndarray, delta: np.ndarray, weight: np.ndarray, out: np.ndarray, *, eps: float) -> None:
    x += delta
    rmsnorm.meaning(x, weight, out, groups=1, eps=eps)


class AddRMSNorm(Layer):
    """x += delta, then the RMSNorm of the sum (ops/rmsnorm.py).

    weight: [width]. forward: x, delta [rows, width] -> [rows, width]; in a plan x is updated in place.
    """

    def __init__(self, weight: Source, eps: float, name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.weight = vector(f"{self.name}.weight", weight)
        self.eps = eps

    def record(self, x: Tensor, delta: Tensor) -> Tensor:
        width = self.weight.width
        self.check(x.width == delta.width == width, f"widths {x.width} and {delta.width}, expected {width}")
        plan = self.plan_of(x, delta)
        out = plan.new(width, x, f"{self.name}.out")
        plan.record(add_rmsnorm, self.name, x=x, delta=delta, weight=self.weight, out=out, eps=self.eps)
        return out
