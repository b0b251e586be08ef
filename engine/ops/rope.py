from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer
from engine.plan import Tensor, op


@op("out")
def rope(x: np.ndarray, angles: np.ndarray, out: np.ndarray) -> None:
    half = angles.shape[1] // 2
    heads = x.reshape(len(x), x.shape[1] // (2 * half), 2, half)
    cosine, sine = angles[:, None, :half], angles[:, None, half:]
    first, second = heads[:, :, 0], heads[:, :, 1]
    rotated = np.stack([first * cosine - second * sine, second * cosine + first * sine], axis=2)
    out[...] = rotated.reshape(x.shape)


class RoPE(Layer):
    """Rotary position embedding (Su et al., 2021), first half of a head against second half, as Hugging Face
    checkpoints want it.

    in_place: whether a plan's x is overwritten.
    forward: x [rows, heads · head_dim], angles [rows, head_dim] -> [rows, heads · head_dim].
    """

    def __init__(self, name: str = "", device: Device | None = None, in_place: bool = False) -> None:
        super().__init__(name, device)
        self.in_place = in_place

    def record(self, x: Tensor, angles: Tensor) -> Tensor:
        self.check(x.width % angles.width == 0, f"width {x.width} is no multiple of head_dim {angles.width}")
        plan = self.plan_of(x, angles)
        out = x if self.in_place else plan.new(x.width, x, f"{self.name}.out")
        plan.record(rope, self.name, x=x, angles=angles, out=out)
        return out
