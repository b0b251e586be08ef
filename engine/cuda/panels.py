"""Quantised matrices as they lie on a GPU: panels of lines and heads (layout: native/cuda/quants.cuh)."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.abi import INT4, UINT4, UINT8
from engine.cuda.launches import ceil_div, n
from engine.quantised import Format, QuantisedMatrix

STEP = 16  # inputs that tensor cores take at once
HALVES = (2, 8)  # outputs of a panel: g, then g + 8

Bytes = npt.NDArray[np.uint8]


class Panels:
    """The layout of matrices of a format that have k inputs."""

    def __init__(self, format: Format, k: int) -> None:
        self.format, self.k = format, k
        self.four_bits = format.dtype in (INT4, UINT4)
        self.kinds = 2 if format.dtype in (UINT8, UINT4) else 1  # scales, and minimums where there are some
        self.steps = 4 if self.four_bits else 2
        self.lines = ceil_div(k, self.steps * STEP)
        self.inputs = self.lines * self.steps * STEP
        self.groups = ceil_div(self.inputs, format.group)
        self.line_bytes = self.lines * n.WARP * n.LINE
        self.bytes = self.line_bytes + self.groups * n.PANEL * 2 * self.kinds  # of a panel

    def pack(self, matrix: QuantisedMatrix) -> Bytes:
        """[panels, bytes]"""
        panels = ceil_div(matrix.shape[0], n.PANEL)
        lines = self._spread(matrix.quants, panels, self.lines, self.steps, 4, 4)  # [panel][half][g][line][step][t][4]
        if self.four_bits:
            lines = lines[:, :1] | lines[:, 1:] << 4
        lines = lines.transpose(0, 3, 2, 5, 4, 1, 6)
        kinds = [a for a in (matrix.scales, matrix.minimums) if a is not None]
        heads = np.stack([self._spread(kind, panels, self.groups) for kind in kinds])  # [kind][panel][half][g][group]
        heads = np.ascontiguousarray(heads.transpose(1, 4, 3, 0, 2)).view(np.uint8)
        parts = lines.reshape(panels, self.line_bytes), heads.reshape(panels, self.bytes - self.line_bytes)
        return np.concatenate(parts, axis=1)

    def _spread(self, values: npt.NDArray[Any], panels: int, *width: int) -> npt.NDArray[Any]:
        """Rows [panels, half, 8, *width], zeros beyond their end and below the last."""
        rows, k = values.shape
        whole = np.zeros((panels * n.PANEL, prod(width)), values.dtype)
        whole[:rows, :k] = values
        return whole.reshape(panels, *HALVES, *width)

    def unpack(self, panels: Bytes) -> QuantisedMatrix:
        """All rows of some panels [panels, bytes]."""
        count = len(panels)
        lines = panels[:, : self.line_bytes].reshape(count, self.lines, 8, 4, self.steps, 2 - self.four_bits, 4)
        if self.four_bits:
            lines = np.concatenate([lines & 15, lines >> 4], axis=5)
        quants = lines.transpose(0, 5, 2, 1, 4, 3, 6).reshape(count * n.PANEL, self.inputs)
        heads = np.ascontiguousarray(panels[:, self.line_bytes :]).view(np.float16)
        heads = heads.reshape(count, self.groups, 8, self.kinds, 2).transpose(3, 0, 4, 2, 1)
        scales, *minimums = heads.reshape(self.kinds, count * n.PANEL, self.groups)
        return QuantisedMatrix(self.format, quants[:, : self.k], scales, *minimums)
