from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer, Source, vector
from engine.plan import Tensor, op


@op("out")
def rmsnorm(x: np.ndarray, weight: np.ndarray, out: np.ndarray, *, groups: int, eps: float) -> None:
    vectors = x.reshape(len(x), groups, len(weight))
    scale = 1 / np.sqrt(np.mean(vectors * vectors, axis=-1, keepdims=True) + eps)
    out[...] = (vectors * scale * weight).reshape(x.shape)


class RMSNorm(Layer):
    """x / sqrt(mean(x²) + eps) · weight, over vectors of weight's width (Zhang and Sennrich, 2019).

    weight: [width]. in_place: in a plan, the result replaces x.
    forward: x [rows, n · width] -> [rows, n · width], each of the n vectors by itself, as the norms of query and key
    heads need it.
    """

    def __init__(
        self, weight: Source, eps: float, name: str = "", device: Device | None = None, in_place: bool = False
    ) -> None:
        super().__init__(name, device)
        self.in_place = in_place
        self.weight = vector(f"{self.name}.weight", weight)
        self.eps = eps
        self.check(len(self.weight.shape) == 1, f"weight of shape {self.weight.shape}, expected one dimension")

    def record(self, x: Tensor) -> Tensor:
        width = self.weight.width
        self.check(x.width % width == 0, f"input width {x.width} is no multiple of the weight's {width}")
        plan = self.plan_of(x)
        out = x if self.in_place else plan.new(x.width, x, f"{self.name}.out")
        plan.record(rmsnorm, self.name, x=x, weight=self.weight, out=out, groups=x.width // width, eps=self.eps)
        return out
