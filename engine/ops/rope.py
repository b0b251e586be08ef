from __future__ import annotations

import numpy as np

from engine.layer import Layer
from engine.plan import Tensor, op


@op("x")
def rope(x: np.ndarray, angles: np.ndarray) -> None:
    half = angles.shape[1] // 2
    heads = x.reshape(len(x), x.shape[1] // (2 * half), 2, half)
    cosine, sine = angles[:, None, :half], angles[:, None, half:]
    first, second = heads[:, :, 0], heads[:, :, 1]
    rotated = np.stack([first * cosine - second * sine, second * cosine + first * sine], axis=2)
    x[...] = rotated.reshape(x.shape)


class RoPE(Layer):
    """Rotary position embedding (Su et al., 2021), first half of a head against second half, as Hugging Face
    checkpoints want it.

    forward: x [rows, heads · head_dim], angles [rows, head_dim] -> x, in a plan rotated in place.
    """

    def record(self, x: Tensor, angles: Tensor) -> Tensor:
        self.check(x.width % angles.width == 0, f"width {x.width} is no multiple of head_dim {angles.width}")
        self.plan_of(x, angles).record(rope, self.name, x=x, angles=angles)
        return x
