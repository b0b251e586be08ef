"""The CPU's pages of keys and values, as arrays: for the oracle and for tests."""

from __future__ import annotations

import numpy as np

from engine import abi
from engine.int8 import Int8Array, dequantise, quantise
from engine.plan import Tensor


def _cache_views(tensor: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Writable views of a packed cache (page.h has the layout), positions before dimensions: keys [pages, heads,
    panels, PANEL, lines, inputs], values [pages, heads, lines, inputs, panels, PANEL], the scales of int8 [pages, 2,
    heads, PAGE]."""
    pages, _, heads, page, head_dim = tensor.shape
    panel = abi.constants.PANEL
    inputs = {abi.BFLOAT16: 2, abi.INT8: 4}.get(tensor.dtype, 1)  # that share a line
    width, depth = -(-head_dim // panel) * panel, -(-head_dim // inputs) * inputs
    count = pages * heads * page * (depth + width) * tensor.dtype.itemsize
    flat = tensor.storage[:count].view(tensor.dtype).reshape(pages, heads, page * (depth + width))
    keys = flat[..., : page * depth].reshape(pages, heads, page // panel, depth // inputs, panel, inputs)
    values = flat[..., page * depth :].reshape(pages, heads, width // panel, page // inputs, panel, inputs)
    scales = None
    if tensor.dtype == abi.INT8:
        scales = tensor.storage[count:].view(np.float32).reshape(pages, heads, 2, page).swapaxes(1, 2)
    return keys.transpose(0, 1, 2, 4, 3, 5), values.transpose(0, 1, 3, 5, 2, 4), scales


def unpack_cache(tensor: Tensor) -> np.ndarray:
    """The logical cache; what int8 stands for as float32."""
    *views, scales = _cache_views(tensor)
    pages, _, heads, page, head_dim = tensor.shape
    logical = np.stack([np.reshape(view, (pages, heads, page, -1))[..., :head_dim] for view in views], axis=1)
    return logical if scales is None else dequantise(logical, scales).view(Int8Array)


def pack_cache(tensor: Tensor, array: np.ndarray) -> None:
    *views, scales = _cache_views(tensor)
    if scales is not None:
        array, scales[...] = quantise(array)
    pages, _, heads, page, head_dim = tensor.shape
    for view, part in zip(views, (array[:, 0], array[:, 1]), strict=True):
        padded = np.zeros((pages, heads, page, view[0, 0].size // page), tensor.dtype)
        padded[..., :head_dim] = part
        view[...] = padded.reshape(view.shape)
