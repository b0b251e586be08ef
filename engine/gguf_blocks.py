"""The blocks that GGUF tensors are made of: so many weights of a row in so many bytes, and what they stand for.

Source: the format's definition, ggml's ggml-common.h. Arithmetic is float32 in its order of operations, so that every
value is bit for bit the format's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]  # [blocks, bytes of a block]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """How the weights of a row are stored: blocks of `size` weights in `nbytes` bytes each.

    decode: bytes [blocks, nbytes] -> [blocks, size], float32, or the dtype itself where a block is one plain number.
    """

    name: str
    size: int
    nbytes: int
    decode: Callable[[Bytes], npt.NDArray[Any]]

    @property
    def is_plain(self) -> bool:
        return self.size == 1


def _plain(name: str, dtype: npt.DTypeLike) -> BlockType:
    kind = np.dtype(dtype).newbyteorder("<")
    return BlockType(name, 1, kind.itemsize, lambda blocks: blocks.view(kind))


def _halves(blocks: Bytes, at: int) -> Floats:
    """The float16 at a byte of each block: [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2n]: all low halves of the bytes, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 bits as [blocks, 32], each worth 16: the high bit of a weight of five."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Floats:
    return _halves(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    weights = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _halves(blocks, 0) * (weights.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    weights = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _halves(blocks, 0) * weights.astype(np.float32) + _halves(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of six bits each, in twelve bytes: [blocks, 8] twice."""
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    high_scales, high_minima = rest & 15 | scales >> 6 << 4, rest >> 4 | minima >> 6 << 4
    pairs = (scales & 63, high_scales), (minima & 63, high_minima)
    return tuple(np.concatenate(pair, axis=1).astype(np.float32) for pair in pairs)  # type: ignore[return-value]


def _super_blocks(blocks: Bytes, weights: Bytes) -> Floats:
    """d · scale · weight - dmin · minimum, for eight groups of 32: weights [blocks, 8, 32]."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = _halves(blocks, 0) * scales, _halves(blocks, 2) * minima
    return (scales[:, :, None] * weights.astype(np.float32) - minima[:, :, None]).reshape(len(blocks), 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _super_blocks(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    group = np.arange(8, dtype=np.uint8)[:, None]  # bit g of a byte belongs to group g
    high = (blocks[:, None, 16:48] >> group & 1) << np.uint8(4)
    return _super_blocks(blocks, low | high)


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))  # two halves of 128 weights
    pairs = blocks[:, 128:192].reshape(-1, 2, 32)
    high = np.concatenate([pairs >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    weights = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[:, :, None] * weights).reshape(len(blocks), 256)


# By the number that stands for them in a file.
TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        0: _plain("F32", np.float32),
        1: _plain("F16", np.float16),
        2: BlockType("Q4_0", 32, 18, _q4_0),
        3: BlockType("Q4_1", 32, 20, _q4_1),
        6: BlockType("Q5_0", 32, 22, _q5_0),
        7: BlockType("Q5_1", 32, 24, _q5_1),
        8: BlockType("Q8_0", 32, 34, _q8_0),
        12: BlockType("Q4_K", 256, 144, _q4_k),
        13: BlockType("Q5_K", 256, 176, _q5_k),
        14: BlockType("Q6_K", 256, 210, _q6_k),
        30: _plain("BF16", ml_dtypes.bfloat16),
    }
)
BLOCKS: Mapping[str, BlockType] = MappingProxyType({block.name: block for block in TYPES.values()})
OTHERS: Mapping[int, str] = MappingProxyType(  # that files hold and this engine does not read
    {
        9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
        20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
        29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
    }
)  # fmt: skip
