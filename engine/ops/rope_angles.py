from __future__ import annotations

import numpy as np

from engine.abi import LAST_POS
from engine.device import Device
from engine.layer import Layer, Weight
from engine.plan import Tensor, op


@op("angles")
def rope_angles(
    pos: np.ndarray, inv_freq: np.ndarray, angles: np.ndarray, *, last_pos: int, scaling: float
) -> None:
    radians = np.minimum(pos, last_pos)[:, None].astype(np.float64) * inv_freq
    angles[...] = np.concatenate([np.cos(radians), np.sin(radians)], axis=1) * scaling


class RoPEAngles(Layer):
    """The cosines and sines that every layer of a step rotates by, made once a step in double precision, since
    positions never stop growing.

    inv_freq: float64 [head_dim / 2]; scaling: factor of both (YaRN's attention factor); last_pos: positions beyond it
    count as it, which is how sinks are seen from behind a window.
    forward: pos [rows] int32 -> [rows, head_dim], cosines then sines.
    """

    def __init__(
        self, inv_freq: np.ndarray, scaling: float = 1.0, name: str = "", device: Device | None = None,
        last_pos: int = LAST_POS,
    ) -> None:  # fmt: skip
        super().__init__(name, device)
        self.inv_freq = Weight(f"{self.name}.inv_freq", [inv_freq], np.dtype(np.float64), "dense")
        self.scaling, self.last_pos = scaling, last_pos

    def record(self, pos: Tensor) -> Tensor:
        plan = self.plan_of(pos)
        angles = plan.new(2 * self.inv_freq.width, pos, f"{self.name}.out")
        plan.record(rope_angles, self.name, pos=pos, inv_freq=self.inv_freq, angles=angles, last_pos=self.last_pos,
                    scaling=self.scaling)  # fmt: skip
        return angles
