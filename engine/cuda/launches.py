"""How each op is launched on a GPU: kernels, blocks, threads, scratch. A function for each op, by its name.

Each gets the op's argument struct and how many rows there are, and gives the launches in order. Kernels read the number
of rows from the step, so that a launch for many rows serves fewer, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine import abi

abi.ffi.cdef((abi.SOURCES / "cuda" / "launch.h").read_text("utf-8"))
n = abi.constants


# As kernels' names end.
DTYPES = {n.DTYPE_F32: "f32", n.DTYPE_BF16: "bf16", n.DTYPE_F16: "f16", n.DTYPE_I8: "i8", n.DTYPE_I4: "i4",
          n.DTYPE_U8: "u8", n.DTYPE_U4: "u4"}  # fmt: skip

FLASH_WIDTHS = (64, 96, 128, 256)  # head_dim rounded up: the kernels that there are


class TensorMap(NamedTuple):
    """A matrix of bf16 in the GPU's memory, its rows `stride` bytes apart, and the boxes that Hopper copies of it."""

    address: int
    rows: int
    columns: int
    stride: int
    box_rows: int
    box_columns: int


class Launch(NamedTuple):
    """A kernel, its blocks, the threads of each, its dynamic shared memory; `share` bytes of scratch for each piece of
    work as the kernel cuts it, of which there are `shares`; what it takes before its arguments, if anything. together:
    its blocks wait for each other."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int = 0
    share: int = 0
    shares: int = 0
    map: TensorMap | None = None
    together: bool = False


def rmsnorm(op: Any, rows: int) -> list[Launch]:
    return [Launch("rmsnorm", (rows * op.groups, 1, 1), min(threads_for(op.weight_width), n.THREADS))]


def add_rmsnorm(op: Any, rows: int) -> list[Launch]:
    return [Launch("add_rmsnorm", (rows, 1, 1), min(threads_for(op.weight_width), n.THREADS))]


def embedding(op: Any, rows: int) -> list[Launch]:
    return [Launch("embedding", (rows, 1, 1), threads_for(op.out_width))]


def rope_angles(op: Any, rows: int) -> list[Launch]:
    return [Launch("rope_angles", blocks_for(rows * op.angles_width // 2), n.THREADS)]


def rope(op: Any, rows: int) -> list[Launch]:
    return [Launch("rope", blocks_for(rows * op.x_width // 2), n.THREADS)]


def swiglu(op: Any, rows: int) -> list[Launch]:
    return [Launch("swiglu", blocks_for(rows * op.out_width), n.THREADS)]


def kv_store(op: Any, rows: int) -> list[Launch]:
    return [Launch("kv_store", (rows * (op.k_width // op.head_dim), 1, 1), 2 * n.WARP)]


def rmsnorm_rope_kv_store(rope: Any, store: Any, rows: int) -> Launch:
    """Blocks for KV heads, then for pairs of query heads."""
    heads, kv_heads = rope.x_width // store.head_dim, store.k_width // store.head_dim
    return Launch("rmsnorm_rope_kv_store", (rows * (kv_heads + ceil_div(heads - kv_heads, 2)), 1, 1), 2 * n.WARP)


def matmul(op: Any, rows: int, name: str = "matmul") -> list[Launch]:
    dtype = DTYPES[op.weight_dtype]
    if rows > n.FEW:
        grid = ceil_div(op.out_width, n.TILE), ceil_div(rows, n.TILE), 1
        tensors = op.weight_group or dtype == "bf16"
        return [Launch(f"{name}_many_{dtype}", grid, n.TENSOR_THREADS if tensors else n.THREADS)]
    return [few_rows(name, op, op.out_width, rows)]


def few_rows(name: str, op: Any, width: int, rows: int) -> Launch:
    """A matmul of up to FEW rows, by itself or fused. width: of what comes out; half the matrix's, if two outputs make
    one."""
    outputs = n.PANEL if op.weight_group else n.THREADS // n.WARP  # of a block
    count = "few" if op.weight_group or rows > 1 else "one"
    panels = op.out_width // width if op.weight_group else 1  # of a block
    blocks = ceil_div(width, outputs) if rows else 0
    return Launch(f"{name}_{count}_{DTYPES[op.weight_dtype]}", (blocks, 1, 1), panels * n.THREADS)


def logits(op: Any, rows: int) -> list[Launch]:
    return matmul(op, rows, "logits")


def attention(op: Any, rows: int) -> list[Launch]:
    blocks = min(rows * op.heads, n.STANDARD_BLOCKS)  # each keeps all scores of a query in memory
    threads = min(n.THREADS, ceil_div(positions_seen(op), n.WARP) * n.WARP)
    share = ceil_div(4 * positions_seen(op), n.LINE) * n.LINE
    return [Launch(f"attention_{DTYPES[op.kv_dtype]}", (blocks, 1, 1), threads, share=share, shares=blocks)]


def in_tiles(op: Any, rows: int) -> bool:
    """Whether attention is for the kernels that multiply tiles of rows by pages."""
    fits = op.kv_dtype == n.DTYPE_BF16 and op.head_dim <= max(FLASH_WIDTHS)
    return bool(rows > n.SPLIT_ROWS and fits and not op.sink)


def flash_attention(op: Any, rows: int) -> list[Launch]:
    if not in_tiles(op, rows):
        return split_attention(op, rows)
    width = min(width for width in FLASH_WIDTHS if width >= op.head_dim)
    shared = 3 * n.QUERIES * (width + n.LINE // 2) * 2  # queries, keys and values
    return [Launch(f"flash_attention_{width}", (op.heads, ceil_div(rows, n.QUERIES), 1), n.TENSOR_THREADS, shared)]


streaming_attention = flash_attention


def split_attention(op: Any, rows: int) -> list[Launch]:
    """Ranges of keys in blocks of their own where there are few rows; of many rows, each walks all its keys."""
    group = op.heads // op.kv_heads
    dtype = DTYPES[op.kv_dtype]
    wide = row_bytes(op.head_dim, 4 if dtype == "f32" else 1 if dtype == "i8" else 2) > n.WARP * n.LINE
    kind, together = ("wide", 1) if wide else ("one", 1) if group == 1 else ("four", 4)
    ranges = ceil_div(positions_seen(op), n.RANGE) if rows <= n.SPLIT_ROWS else 1
    share = ceil_div(4 * (2 + op.head_dim), n.LINE) * n.LINE
    grid = rows, op.kv_heads * ceil_div(group, together), ranges
    walk = Launch(f"streaming_attention_{kind}_{dtype}", grid, n.SPLIT_THREADS)
    if ranges == 1:
        return [walk]
    scratch = {"share": share, "shares": rows * op.heads * ranges}
    return [walk._replace(**scratch),
            Launch("streaming_attention_merge", (rows, op.heads, ranges), n.SPLIT_THREADS, **scratch)]  # fmt: skip


def sample(op: Any, rows: int) -> list[Launch]:
    count, keys = op.vocab_size, 1 << (op.vocab_size - 1).bit_length()
    share = 8 * keys + 8 * ceil_div(count, n.GROUP) + 4 * count + 4 * ceil_div(count, 32)
    return [Launch("sample", (rows, 1, 1), threads_for(count), share=ceil_div(share, n.LINE) * n.LINE, shares=rows)]


def read_memory(lines: int) -> Launch:
    return Launch("read_memory", (min(ceil_div(lines, n.THREADS), n.MEASURE_BLOCKS), 1, 1), n.THREADS)


def multiply(dtype: str) -> tuple[Launch, int]:
    """Multiplying in registers, and the floating-point operations of a round of it."""
    operations = 2 * (8 * 16 * 8 * 16 // n.WARP if dtype == "bf16" else 16)
    launch = Launch(f"multiply_{dtype}", (n.MEASURE_BLOCKS, 1, 1), n.THREADS)
    return launch, operations * n.MEASURE_BLOCKS * n.THREADS


def positions_seen(op: Any) -> int:
    """The most positions that a row of attention can see."""
    capacity = op.page_table_stride * n.PAGE
    return int(min(op.sink + op.window, capacity) if op.window else capacity)


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def threads_for(width: int) -> int:
    """Whole warps, a thread for every fourth number of a row."""
    return int(min(max(ceil_div(width, 4 * n.WARP), 1) * n.WARP, n.MAX_THREADS))


def blocks_for(threads: int) -> tuple[int, int, int]:
    return ceil_div(threads, n.THREADS), 1, 1


def row_bytes(width: int, itemsize: int) -> int:
    """A row of a matrix or a position of a cache: whole lines (layouts: native/cuda/common.cuh)."""
    return int(ceil_div(width * itemsize, n.LINE) * n.LINE)
