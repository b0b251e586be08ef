from __future__ import annotations

import numpy as np

from engine.ops.rmsnorm import RMSNorm, rmsnorm
from engine.plan import Tensor, op


@op("x", "out")
def add_rmsnorm(x: np.ndarray, delta: np.ndarray, weight: np.ndarray, out: np.ndarray, *, eps: float) -> None:
    x += delta
    rmsnorm.meaning(x, weight, out, groups=1, eps=eps)


class AddRMSNorm(RMSNorm):
    """x += delta, then the RMSNorm of the sum.

    forward: x, delta [rows, width] -> [rows, width]; in a plan x is updated in place.
    """

    def record(self, x: Tensor, delta: Tensor) -> Tensor:  # type: ignore[override]
        width = self.weight.width
        self.check(x.width == delta.width == width, f"widths {x.width} and {delta.width}, expected {width}")
        plan = self.plan_of(x, delta)
        out = plan.new(width, x, f"{self.name}.out")
        plan.record(add_rmsnorm, self.name, x=x, delta=delta, weight=self.weight, out=out, eps=self.eps)
        return out
