"""The CPU's pages of keys and values, as arrays: for the oracle and for tests."""

from __future__ import annotations

import numpy as np

from engine import abi
from engine.int8 import Int8Array, dequantise, quantise
from engine.plan import Tensor


def _cache_views(tensor: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Writable views of a packed cache (page.h has the layout): keys and values [pages, heads, PAGE, head_dim], in as
    many dimensions more as their lines are interleaved, and the scales of int8 [pages, 2, heads, PAGE]."""
    pages, _, heads, page, head_dim = tensor.shape
    inputs = {abi.BFLOAT16: 2, abi.INT8: 4}.get(tensor.dtype, 1)  # that share a line
    width, depth = -(-head_dim // abi.constants.PANEL) * abi.constants.PANEL, -(-head_dim // inputs) * inputs
    count = pages * heads * page * (depth + width) * tensor.dtype.itemsize
    flat = tensor.storage[:count].view(tensor.dtype).reshape(pages, heads, page * (depth + width))
    keys = flat[..., : page * depth].reshape(pages, heads, depth // inputs, page, inputs).transpose(0, 1, 3, 2, 4)
    values = flat[..., page * depth :].reshape(pages, heads, page // inputs, width, inputs).transpose(0, 1, 2, 4, 3)
    scales = None
    if tensor.dtype == abi.INT8:
        scales = tensor.storage[count:].view(np.float32).reshape(pages, heads, 2, page).swapaxes(1, 2)
    return keys, values[..., :head_dim], scales


def unpack_cache(tensor: Tensor) -> np.ndarray:
    """The logical cache; what int8 stands for as float32."""
    keys, values, scales = _cache_views(tensor)
    pages, _, heads, page, head_dim = tensor.shape
    keys = np.reshape(keys, (pages, heads, page, -1))[..., :head_dim]
    logical = np.stack([keys, np.reshape(values, (pages, heads, page, head_dim))], axis=1)
    return logical if scales is None else dequantise(logical, scales).view(Int8Array)


def pack_cache(tensor: Tensor, array: np.ndarray) -> None:
    keys, values, scales = _cache_views(tensor)
    if scales is not None:
        array, scales[...] = quantise(array)
    pages, _, heads, page, head_dim = tensor.shape
    depth = keys.shape[3] * keys.shape[4]
    padded = np.zeros((pages, heads, page, depth), tensor.dtype)
    padded[..., :head_dim] = array[:, 0]
    keys[...] = padded.reshape(keys.shape)
    values[...] = array[:, 1].reshape(values.shape)
