from __future__ import annotations

import numpy as np

from engine.layer import Layer
from engine.plan import Tensor, op


@op("out")
def swiglu(x: np.ndarray, out: np.ndarray) -> None:
    gate, up = np.split(x, 2, axis=1)
    out[...] = gate / (1 + np.exp(-gate)) * up


class SwiGLU(Layer):
    """silu(gate) · up (Shazeer, 2020). forward: [gate | up] of [rows, 2 · width] -> [rows, width]."""

    def record(self, x: Tensor) -> Tensor:
        self.check(x.width % 2 == 0, f"width {x.width} is odd")
        plan = self.plan_of(x)
        out = plan.new(x.width // 2, x, f"{self.name}.out")
        plan.record(swiglu, self.name, x=x, out=out)
        return out
