"""What only Hopper GPUs run: attention of many rows by wgmma and TMA (native/cuda/flash_attention_hopper.cu).

TMA copies boxes of a matrix that a tensor map describes: 128 bytes that only the driver can write, and that a kernel
takes as its first argument.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from engine import abi
from engine.cuda.launches import Launch, TensorMap, ceil_div, in_tiles, n, row_bytes
from engine.errors import RillError

if TYPE_CHECKING:
    from engine.cuda.driver import Driver

abi.ffi.cdef("""
    int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *start, const uint64_t *sizes,
                               const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                               int swizzle, int promotion, int fill);
""")

BFLOAT16, NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_TO_256B, FILL_WITH_ZEROS = 9, 0, 3, 3, 0  # of CUtensorMap…
MAP_BYTES, MAP_ALIGNMENT = 128, 64
SWIZZLED = 128  # bytes of a row of a box
WIDTHS = (64, 128)  # head_dim rounded up: the kernels that there are


def wanted(driver: Driver) -> bool:
    """Whether the environment has RILL_CUDA_HOPPER=1. Raises RillError if this GPU cannot."""
    if os.environ.get("RILL_CUDA_HOPPER", "") in ("", "0"):
        return False
    if not driver.hopper:
        raise RillError(f"RILL_CUDA_HOPPER=1 is for GPUs of compute capability 9.0, which this is not: "
                        f"{driver.description}")  # fmt: skip
    return True


def takes(op_name: str, op: Any, rows: int) -> bool:
    """Whether a node is attention that there is a kernel for."""
    return op_name in ("flash_attention", "streaming_attention") and in_tiles(op, rows) and op.head_dim <= max(WIDTHS)


def flash_attention(op: Any, rows: int) -> list[Launch]:
    """The cache as TMA sees it: a row a position, of which a box takes a page's."""
    width = min(width for width in WIDTHS if width >= op.head_dim)
    tile = n.PAGE * width * 2
    stride, address = row_bytes(op.head_dim, 2), int(abi.ffi.cast("uintptr_t", op.kv))
    cache = TensorMap(address, op.kv_pages * op.kv_heads * 2 * n.PAGE, stride // 2, stride, n.PAGE, SWIZZLED // 2)
    grid = op.heads, ceil_div(rows, n.HOPPER_QUERIES), 1
    shared = n.HOPPER_TILES * tile + 8 * SWIZZLED  # and what it takes to begin at a multiple of eight rows
    return [Launch(f"flash_attention_hopper_{width}", grid, n.HOPPER_THREADS, shared, map=cache)]


def encode(libcuda: Any, map: TensorMap) -> bytes:
    """A tensor map as the driver writes it."""
    new = abi.ffi.new
    room = new("char[]", MAP_BYTES + MAP_ALIGNMENT)
    start = int(abi.ffi.cast("uintptr_t", room))
    at = abi.ffi.cast("char *", ceil_div(start, MAP_ALIGNMENT) * MAP_ALIGNMENT)
    status = libcuda.cuTensorMapEncodeTiled(
        at, BFLOAT16, 2, abi.ffi.cast("void *", map.address), new("uint64_t[]", [map.columns, map.rows]),
        new("uint64_t[]", [map.stride]), new("uint32_t[]", [map.box_columns, map.box_rows]), new("uint32_t[]", [1, 1]),
        NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_TO_256B, FILL_WITH_ZEROS,
    )  # fmt: skip
    if status:
        raise RillError(f"a tensor map of {map}: the driver reports error {status}")
    return bytes(abi.ffi.buffer(at, MAP_BYTES))
