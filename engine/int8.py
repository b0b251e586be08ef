"""Vectors in eight bits: whole numbers from -127 to 127 and one float32 scale each."""

from __future__ import annotations

from typing import Any

import numpy as np


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 [..., n] as int8 [..., n] and float32 scales [...]: the largest magnitude becomes 127."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=-1) / np.float32(127)
    with np.errstate(invalid="ignore"):
        return np.rint(x / np.where(scale == 0, np.float32(1), scale)[..., None]).astype(np.int8), scale


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return values * scale[..., None].astype(np.float32)


class Int8Array(np.ndarray[Any, Any]):
    """float32 vectors that hold what int8 can: whatever is written is rounded. `pages.view(Int8Array)`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if np.ndim(value):
            value = np.where(np.isfinite(value).all(axis=-1, keepdims=True), dequantise(*quantise(value)), np.nan)
        super().__setitem__(key, value)
