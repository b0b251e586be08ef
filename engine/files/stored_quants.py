"""Quantised tensors in safetensors files, as tools/quantize.py writes them.

A matrix `name` [n, k] in format int4-32 is two tensors: `name.int4-32.quants`, uint8 [n, k] or, of 4 bits, two to
a byte [n, ceil(k / 2)], the first one low; and `name.int4-32.scales`, float16 [n, ceil(k / 32)].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.abi import INT4
from engine.errors import RillError
from engine.quantised import Format, QuantisedMatrix, format_of

QUANT_METHOD = "rill"  # in config.json's quantization_config
_NAME = re.compile(r"(.+)\.(int[48]-\d+)\.(quants|scales)")


def stored_names(name: str, format: Format) -> tuple[str, str]:
    """What the quants and the scales of a matrix are called."""
    return f"{name}.{format}.quants", f"{name}.{format}.scales"


def pack_pairs(quants: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two quants of 4 bits to a byte: [n, k] -> [n, ceil(k / 2)]."""
    even = np.zeros((len(quants), -(-quants.shape[1] // 2) * 2), np.uint8)
    even[:, : quants.shape[1]] = quants
    return even[:, ::2] | even[:, 1::2] << 4


@dataclass(frozen=True)
class QuantisedTensor:
    """A matrix as a checkpoint hands it out; `rows` and `read` decode it to float32."""

    name: str
    format: Format
    shape: tuple[int, ...]
    stored: Any  # the quants, checkpoint.StoredTensor
    scales: Any

    dtype = "F32"

    def quantised_rows(self, start: int, stop: int) -> QuantisedMatrix:
        quants, scales = (part.row_bytes(start, stop).reshape(stop - start, -1) for part in (self.stored, self.scales))
        if self.format.dtype == INT4:
            quants = np.stack([quants & 15, quants >> 4], axis=-1).reshape(stop - start, -1)[:, : self.shape[1]]
        return QuantisedMatrix(self.format, quants, scales.view(np.float16))

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.quantised_rows(start, stop)[:]

    def read(self) -> npt.NDArray[Any]:
        return self.rows(0, self.shape[0])


def find_quantised(name: str, shape: tuple[int, ...], tensors: Mapping[str, Any]) -> QuantisedTensor | None:
    """The quantised matrix of that name, if there is one. Raises RillError where its parts do not fit."""
    found = {match[2]: match for key in tensors if (match := _NAME.fullmatch(key)) and match[1] == name}
    if not found:
        return None
    format = format_of(next(iter(found)))
    if format is None or len(shape) != 2:
        raise RillError(f"tensor {name!r}: quantised in a format that is not known, {', '.join(found)}")
    n, k = shape
    wanted = (n, -(-k // 2) if format.dtype == INT4 else k), (n, -(-k // format.group))
    parts = [tensors.get(key) for key in stored_names(name, format)]
    for part, kind, expected, key in zip(parts, ("U8", "F16"), wanted, stored_names(name, format), strict=True):
        if part is None or part.dtype != kind or part.shape != expected:
            has = "missing" if part is None else f"{part.dtype} {list(part.shape)}"
            raise RillError(f"tensor {key!r} is {has}, expected {kind} {list(expected)}")
    return QuantisedTensor(name, format, shape, *parts)
