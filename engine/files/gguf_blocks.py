"""The blocks that GGUF tensors are made of: so many weights of a row in so many bytes, and what they stand for.

Source: the format's definition, ggml's ggml-common.h. Arithmetic is float32 in its order of operations, so that every
value is bit for bit the format's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine.abi import INT4, INT8, UINT4, UINT8
from engine.quantised import ZERO, Format

Bytes = npt.NDArray[np.uint8]  # [blocks, bytes of a block]
Floats = npt.NDArray[np.float32]


class Split(NamedTuple):
    """What blocks hold: quants uint8 [blocks, size], from zero up; scales float32 [blocks, groups], and minimums where
    a type has them."""

    quants: Bytes
    scales: Floats
    minimums: Floats | None = None


@dataclass(frozen=True)
class BlockType:
    """How the weights of a row are stored: blocks of `size` weights in `nbytes` bytes each; either plain numbers of a
    dtype, one to a block, or quantised in some format."""

    name: str
    size: int
    nbytes: int
    plain: np.dtype | None = None
    format: Format | None = None
    split: Callable[[Bytes], Split] | None = None

    @property
    def is_plain(self) -> bool:
        return self.plain is not None

    def decode(self, blocks: Bytes) -> npt.NDArray[Any]:
        """[blocks, nbytes] -> [blocks, size], plain numbers or float32."""
        if self.split is None or self.format is None:
            return blocks.view(self.plain or np.uint8)
        quants, scales, minimums = self.split(blocks)
        groups = quants.reshape(len(blocks), -1, self.format.group).astype(np.float32) - ZERO[self.format.dtype]
        values = scales[:, :, None] * groups
        if minimums is not None:
            values += minimums[:, :, None]
        return values.reshape(len(blocks), self.size)


def _plain(name: str, dtype: npt.DTypeLike) -> BlockType:
    kind = np.dtype(dtype).newbyteorder("<")
    return BlockType(name, 1, kind.itemsize, plain=kind)


def _halves(blocks: Bytes, at: int) -> Floats:
    """The float16 at a byte of each block: [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2n]: all low halves of the bytes, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 bits as [blocks, 32], each worth 16: the high bit of a weight of five."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Split:
    return Split(_nibbles(blocks[:, 2:]), _halves(blocks, 0))


def _q4_1(blocks: Bytes) -> Split:
    return Split(_nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _q5_0(blocks: Bytes) -> Split:
    return Split((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)) + np.uint8(128 - 16), _halves(blocks, 0))


def _q5_1(blocks: Bytes) -> Split:
    return Split(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: Bytes) -> Split:
    return Split(blocks[:, 2:] + np.uint8(128), _halves(blocks, 0))  # from -128 … 127 to 0 … 255


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of six bits each, in twelve bytes: [blocks, 8] twice."""
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    high_scales, high_minima = rest & 15 | scales >> 6 << 4, rest >> 4 | minima >> 6 << 4
    pairs = (scales & 63, high_scales), (minima & 63, high_minima)
    return tuple(np.concatenate(pair, axis=1).astype(np.float32) for pair in pairs)  # type: ignore[return-value]


def _super_blocks(blocks: Bytes, weights: Bytes) -> Split:
    """d · scale · weight - dmin · minimum, for eight groups of 32: weights [blocks, 8, 32]."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return Split(weights.reshape(len(blocks), 256), _halves(blocks, 0) * scales, -(_halves(blocks, 2) * minima))


def _q4_k(blocks: Bytes) -> Split:
    return _super_blocks(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Split:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    group = np.arange(8, dtype=np.uint8)[:, None]  # bit g of a byte belongs to group g
    high = (blocks[:, None, 16:48] >> group & 1) << np.uint8(4)
    return _super_blocks(blocks, low | high)


def _q6_k(blocks: Bytes) -> Split:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))  # two halves of 128 weights
    pairs = blocks[:, 128:192].reshape(-1, 2, 32)
    high = np.concatenate([pairs >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    weights = (low | high << 4).reshape(len(blocks), 256) + np.uint8(128 - 32)
    return Split(weights, _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))


# By the number that stands for them in a file.
TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        0: _plain("F32", np.float32),
        1: _plain("F16", np.float16),
        2: BlockType("Q4_0", 32, 18, None, Format(INT4, 32), _q4_0),
        3: BlockType("Q4_1", 32, 20, None, Format(UINT4, 32), _q4_1),
        6: BlockType("Q5_0", 32, 22, None, Format(INT8, 32), _q5_0),
        7: BlockType("Q5_1", 32, 24, None, Format(UINT8, 32), _q5_1),
        8: BlockType("Q8_0", 32, 34, None, Format(INT8, 32), _q8_0),
        12: BlockType("Q4_K", 256, 144, None, Format(UINT4, 32), _q4_k),
        13: BlockType("Q5_K", 256, 176, None, Format(UINT8, 32), _q5_k),
        14: BlockType("Q6_K", 256, 210, None, Format(INT8, 16), _q6_k),
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
