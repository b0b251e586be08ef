"""Matrices in few bits: each group of consecutive inputs of an output has a scale of its own.

    weight = (quant - zero) · scale + minimum

int8 and int4 count around zero and have no minimum; uint8 and uint4 count from zero up (what GGUF calls Q4_K is one).
Products with such a matrix round the other operand to 8 bits, too, with a scale for each row and group, so that the
sums within a group are sums of integers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.abi import INT4, INT8, UINT4, UINT8
from engine.errors import RillError

ZERO = {INT8: 128, INT4: 8, UINT8: 0, UINT4: 0}  # the quant that stands for zero, or for the minimum
LARGEST_SCALE = 6e4  # float16 ends at 65,504, and larger ones are tried
DEFAULT_GROUP = {INT8: 64, INT4: 32}
_NAME = re.compile(r"(int8|int4)(?:-(32|64|128))?")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """How a matrix is quantised. group: inputs that share a scale."""

    dtype: np.dtype
    group: int

    def __str__(self) -> str:
        return f"{self.dtype.name}-{self.group}"


def format_of(name: str) -> Format | None:
    """The format that a dtype's name asks for, such as "int8", "int4" or "int4-64"; None if it is another dtype."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    dtype = INT8 if found[1] == "int8" else INT4
    return Format(dtype, int(found[2] or DEFAULT_GROUP[dtype]))


@dataclass(frozen=True)
class QuantisedMatrix:
    """quants: uint8 [n, k], from zero up; scales, minimums: float16 [n, groups]. Rows asked for come as float32."""

    format: Format
    quants: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    minimums: npt.NDArray[np.float16] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quants.shape

    @property
    def dtype(self) -> np.dtype:
        return self.format.dtype

    @property
    def group(self) -> int:
        return self.format.group

    def __getitem__(self, rows: slice | npt.NDArray[np.int32]) -> Floats:
        scales = self._of_each_input(self.scales[rows])
        values = (self.quants[rows].astype(np.float32) - np.float32(ZERO[self.dtype])) * scales
        return values if self.minimums is None else values + self._of_each_input(self.minimums[rows])

    def quantised_rows(self, start: int, stop: int) -> QuantisedMatrix:
        """Rows [start, stop)."""
        minimums = None if self.minimums is None else self.minimums[start:stop]
        return QuantisedMatrix(self.format, self.quants[start:stop], self.scales[start:stop], minimums)

    def _of_each_input(self, of_groups: npt.NDArray[np.float16]) -> Floats:
        return np.repeat(of_groups.astype(np.float32), self.group, axis=-1)[..., : self.shape[1]]


def stack(parts: list[QuantisedMatrix]) -> QuantisedMatrix:
    """Matrices of one format, one below the other."""
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return QuantisedMatrix(parts[0].format, np.concatenate([part.quants for part in parts]),
                           np.concatenate([part.scales for part in parts]),
                           np.concatenate(minimums) if minimums else None)  # fmt: skip


def quantise(values: npt.NDArray[np.floating], format: Format, name: str = "") -> QuantisedMatrix:
    """Rounds a matrix [n, k]. Raises RillError where it holds what has no place in so few bits."""
    check_range(values, format, name)
    groups = _in_groups(values.astype(np.float32, copy=False), format.group)  # [n, groups, group]
    signed, scales = (_round_int8 if format.dtype == INT8 else _round_int4)(groups)
    quants = (signed + np.float32(ZERO[format.dtype])).astype(np.uint8)
    return QuantisedMatrix(format, _flat(quants)[:, : values.shape[1]], scales)


def check_range(values: npt.NDArray[np.floating], format: Format, name: str = "") -> None:
    """Raises RillError where a matrix holds what has no place in so few bits."""
    most = LARGEST_SCALE * (127 if format.dtype == INT8 else 8)
    if not (values.max(initial=0.0) < most and values.min(initial=0.0) > -most):
        raise RillError(f"{name or 'a matrix'}: holds numbers that are not finite or too large to be quantised")


def _in_groups(values: Floats, group: int) -> Floats:
    rows, width = values.shape
    padded = np.zeros((rows, -(-width // group), group), np.float32)
    _flat(padded)[:, :width] = values
    return padded


def _flat(groups: np.ndarray) -> np.ndarray:
    return groups.reshape(len(groups), groups.shape[1] * groups.shape[2])


def _round_int8(groups: Floats) -> tuple[Floats, npt.NDArray[np.float16]]:
    largest = np.abs(groups).max(axis=-1, initial=0.0)
    scales = (largest / np.float32(127)).astype(np.float16)
    short = scales.astype(np.float32) * np.float32(127.5) < largest  # of the smallest float16s the next is far away
    scales = np.where(short, np.nextafter(scales, np.float16(np.inf)), scales)
    return _divided(groups, scales, (-127, 127)), scales


def _divided(groups: Floats, scales: npt.NDArray[np.float16], limits: tuple[int, int]) -> Floats:
    """The nearest whole multiples of the scales within limits."""
    factors = np.divide(1, scales, out=np.zeros(scales.shape, np.float32), where=scales != 0, dtype=np.float32)
    multiples = groups * factors[..., None]
    np.rint(multiples, out=multiples)
    return np.clip(multiples, *limits, out=multiples)


def _round_int4(groups: Floats) -> tuple[Floats, npt.NDArray[np.float16]]:
    """Of some scales around the one that just reaches the largest magnitude, each fitted to what it rounds to by least
    squares, the one with the least squared error."""
    at = np.abs(groups).argmax(axis=-1)[..., None]
    full = np.take_along_axis(groups, at, axis=-1)[..., 0] / np.float32(-8)  # that number becomes -8
    best = np.zeros_like(groups)
    best_scales, least = np.zeros(full.shape, np.float16), np.full(full.shape, np.inf)
    for share in (0.85, 0.95, 1.05):
        rounded = _divided(groups, (full * np.float32(share)).astype(np.float16), (-8, 7))
        exact = _dot(groups, rounded) / np.maximum(_dot(rounded, rounded), 1)
        fitted = exact.astype(np.float32).astype(np.float16)
        rounded, scale = _divided(groups, fitted, (-8, 7)), fitted.astype(np.float64)
        error = scale * (scale * _dot(rounded, rounded) - 2 * _dot(groups, rounded))  # less the same for every scale
        better = error < least
        best[better], best_scales[better], least[better] = rounded[better], fitted[better], error[better]
    return best, best_scales


def _dot(a: Floats, b: Floats) -> npt.NDArray[np.float64]:
    """Of each group, with so many bits that the order of additions hardly ever decides anything."""
    product: npt.NDArray[np.float64] = np.einsum("ngi,ngi->ng", a, b, dtype=np.float64)
    return product


def round_inputs(x: Floats, group: int) -> Floats:
    """What a product with a quantised matrix makes of its other operand [rows, k]: 127 steps to the largest magnitude
    of a group; NaN where that is not finite."""
    groups = _in_groups(x, group)
    largest = np.abs(groups).max(axis=-1, keepdims=True, initial=0.0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        factors = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
        factors = np.where(np.isfinite(factors), factors, np.float32(0))
        scales = np.where(factors > 0, largest / np.float32(127), np.float32(0))
        rounded = np.where(np.isfinite(largest), np.rint(groups * factors) * scales, np.float32(np.nan))
    return _flat(rounded)[:, : x.shape[1]]
