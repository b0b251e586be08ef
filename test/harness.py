"""What the tests of ops share: devices, cases as data, seeded values, ways to poison what must not be read.

The cases are plain data, for the benchmarks to run over the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from emulated_cuda import emulated_devices

from engine.abi import BFLOAT16, FLOAT16, FLOAT32, INT8
from engine.device import Device, open_device
from engine.device.cpu import available_isas
from engine.errors import RillError
from engine.kvcache import PAGE, KVCache, cache_tensors
from engine.layer import Weight, plan_input
from engine.ops.attention import KINDS, MultiHeadAttention
from engine.ops.kv_store import EVERY_PAGE, KVStore, Ring
from engine.plan import Op, Plan, Tensor
from engine.step import Step

WEIGHT_DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
CACHE_DTYPES = (FLOAT32, BFLOAT16, FLOAT16, INT8)
WIDTHS = (1, 2, 15, 16, 17, 31, 33, 72, 128, 1000)  # around every vector and panel
ROWS = (*range(1, 15), 25, 37, 130)  # around the row tiles of every ISA: 3, 6 and 12
CANARY = 1e30
MARGIN = 3  # columns on either side of a view: odd, so that no row is aligned
FLOAT32_LIMIT = 1e-10  # normalised mean squared error of float32 arithmetic
BFLOAT16_LIMIT = 1e-5  # and where inputs are rounded to bf16
FLOAT16_LIMIT = BFLOAT16_LIMIT / 64  # to f16, which has three bits more
WORD_LIMIT = 5e-8  # to whole numbers of 16 bits, which is done with what a cache of bytes is multiplied by


# Devices.


@cache
def isa_pairs() -> tuple[tuple[Device, Device], ...]:
    """The CPU with every ISA of this machine, on one thread and on two."""
    one, two = ([open_device("cpu", isa=isa, threads=n) for isa in available_isas()] for n in (1, 2))
    return tuple(zip(one, two, strict=True))


@cache
def devices() -> tuple[Device, ...]:
    """Those of the host, a GPU in emulation, and a GPU where there is one."""
    return (*host_devices(), *emulated_devices(), *gpu_devices())


@cache
def gpu_devices() -> tuple[Device, ...]:
    """The GPU; none where there is no GPU, or nothing to run on it."""
    try:
        return (open_device("cuda"),)
    except RillError:
        return ()


@cache
def host_devices() -> tuple[Device, ...]:
    """NumPy, and the CPU with every ISA on one thread: that two give the same bits is tested apart."""
    return (open_device("numpy"), *cpu_devices())


@cache
def cpu_devices() -> tuple[Device, ...]:
    return tuple(one for one, _ in isa_pairs())


def rounds_to_bf16(device: Device, dtype: np.dtype) -> bool:
    """Whether the other operand of bf16 weights or caches is rounded to bf16: the dot instruction, tensor cores."""
    rounds = device.type == "cuda" or getattr(device, "isa", "") in ("avx512_bf16", "avx512_amx")
    return rounds and dtype == BFLOAT16


def error_limit(device: Device, dtype: np.dtype) -> float:
    if dtype == INT8 and device.type == "cpu":
        return WORD_LIMIT
    return BFLOAT16_LIMIT if rounds_to_bf16(device, dtype) else FLOAT32_LIMIT


def product_limit(device: Device, dtype: np.dtype) -> float:
    """Of products with weights: cuBLAS takes f16 inputs for f16 weights."""
    return FLOAT16_LIMIT if dtype == FLOAT16 and getattr(device, "cublas", None) else error_limit(device, dtype)


# Values and comparisons.


def normal(rng: np.random.Generator, *shape: int, dtype: np.dtype = FLOAT32) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def nmse(actual: np.ndarray, exact: np.ndarray) -> float:
    """Squared error over squared magnitude; infinite where anything is not finite."""
    if not np.isfinite(actual).all():
        return np.inf
    error = np.sum(np.square(actual.astype(np.float64) - exact))
    return float(error / max(np.sum(np.square(exact.astype(np.float64))), np.finfo(np.float64).tiny))


def worst_row(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest error of a row, so that small rows count as much as large ones."""
    assert actual.shape == exact.shape, f"shape {actual.shape}, expected {exact.shape}"
    return max((nmse(a, e) for a, e in zip(actual, exact, strict=True)), default=0.0)


def assert_close(actual: np.ndarray, exact: np.ndarray, limit: float, what: object) -> None:
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    error = nmse(actual, exact)
    assert error <= limit, f"{what}: error {error:.3g}, allowed {limit:.3g}"


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: object) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{what}: shape or dtype"
    unsigned = f"u{actual.dtype.itemsize}"
    bits, wanted = (np.ascontiguousarray(x).view(unsigned) for x in (actual, expected))
    different = np.argwhere(bits != wanted)
    assert not len(different), f"{what}: {len(different)} elements differ, the first at {different[0]}"


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# One node with everything around its operands poisoned.


class Bench:
    """A plan fed by hand, whose operands lie as misaligned columns inside larger buffers.

    Around inputs there is NaN, which spoils results if it is read; around what a node writes, a number
    that `run` must find unchanged. Rows beyond the step's are treated alike.
    """

    def __init__(self, device: Device, rows: int, spare_rows: int = 2) -> None:
        self.device, self.count, self.capacity = device, rows, rows + spare_rows
        self.plan = Plan(device)
        self.rows = plan_input(self.plan, np.array([rows], np.int32), None, "rows")
        self.views: list[Tensor] = []

    def row_input(self, array: np.ndarray) -> Tensor:
        """An aligned tensor whose rows beyond the step's are NaN, or nonsense where it holds integers."""
        nonsense = -(2**31) if array.dtype.kind == "i" else np.nan
        whole = np.full((self.capacity, *array.shape[1:]), nonsense, array.dtype)
        whole[: len(array)] = array
        tensor = Tensor(whole.shape, whole.dtype, "input", self.plan, self.rows)
        self.device.upload(tensor, whole)
        return tensor

    def view(self, array: np.ndarray, around: float = np.nan, right: int = MARGIN) -> Tensor:
        """The array as columns of a wider tensor."""
        width = array.shape[1]
        whole = np.full((self.capacity, MARGIN + width + right), around, np.float32)
        whole[: len(array), MARGIN : MARGIN + width] = array
        owner = Tensor(whole.shape, FLOAT32, "owner", self.plan, self.rows)
        self.device.upload(owner, whole)
        return owner.columns(MARGIN, MARGIN + width)

    def written(self, array: np.ndarray) -> Tensor:
        """A view that the node updates."""
        self.views.append(self.view(array, CANARY, right=MARGIN + 2))  # inputs and outputs differ in stride
        return self.views[-1]

    def output(self, width: int) -> Tensor:
        return self.written(np.full((self.count, width), np.nan, np.float32))

    def record(self, op: Op, **arguments: Tensor | float | None) -> None:
        self.device.load([w for w in arguments.values() if isinstance(w, Weight) and w.storage is None])
        self.plan.record(op, "bench", **arguments)

    def run(self) -> None:
        self.plan.lower()
        poison_scratch(self.plan)
        self.plan.run()
        for view in self.views:
            around = view.owner.storage.copy()
            around[: self.count, view.column : view.column + view.width] = CANARY
            name = self.plan.nodes[-1].op.name
            assert (around == np.float32(CANARY)).all(), f"{name} wrote outside its output"

    def result(self, tensor: Tensor) -> np.ndarray:
        return self.device.download(tensor)


def poison_scratch(plan: Plan) -> None:
    """Fills a native program's scratch memory with NaN, whatever dtype it is read as."""
    scratch = getattr(plan.program, "scratch", None)
    if scratch is not None:
        scratch[:] = 0xFF


def poison_cache(tensor: Tensor) -> None:
    """Fills a cache with NaN, padding included."""
    if tensor.storage.dtype == np.uint8:
        tensor.storage[:] = 0xFF
    else:
        tensor.storage[...] = np.nan


# Matrices.


@dataclass(frozen=True)
class MatmulCase:
    outputs: int
    inputs: int


MATMUL_CASES = (
    *(MatmulCase(width, 33) for width in WIDTHS),
    *(MatmulCase(17, width) for width in WIDTHS),
    MatmulCase(1, 1), MatmulCase(128, 1000), MatmulCase(1000, 72),
)  # fmt: skip


# Attention.


@dataclass(frozen=True)
class AttentionCase:
    """A shape of attention, and the lengths of the sequences that a step of it holds."""

    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    window: int | None = None
    scale: float | None = None
    kind: str = "standard"
    sink: int = 0
    q_block: int | None = None
    kv_block: int | None = None
    ring: Ring = EVERY_PAGE

    @property
    def pages(self) -> int:
        """Of the longest sequence, as far as they are kept."""
        return sum(self.ring) or -(-max(self.lengths) // PAGE)

    def layer(self, device: Device) -> MultiHeadAttention:
        blocks = {} if self.kind in ("standard", "auto") else {"q_block": self.q_block, "kv_block": self.kv_block}
        sink = {"sink": self.sink} if self.sink else {}
        return KINDS[self.kind](self.heads, self.scale, self.window, device=device, **blocks, **sink)

    @property
    def exact_scale(self) -> float:
        return self.scale or self.head_dim**-0.5


SHORT, AROUND_ONE_PAGE, AROUND_TWO_PAGES = (5, 1, 20), (1, 63, 64, 65), (127, 128, 129, 200)
ATTENTION_CASES = (
    AttentionCase(4, 4, 8, AROUND_ONE_PAGE),
    AttentionCase(4, 2, 16, AROUND_TWO_PAGES),
    AttentionCase(6, 2, 24, AROUND_ONE_PAGE),
    AttentionCase(8, 1, 40, AROUND_TWO_PAGES),
    AttentionCase(3, 3, 64, AROUND_ONE_PAGE),
    AttentionCase(16, 2, 64, AROUND_ONE_PAGE),
    AttentionCase(4, 2, 80, SHORT),
    AttentionCase(3, 1, 96, AROUND_ONE_PAGE),
    AttentionCase(2, 1, 128, AROUND_TWO_PAGES),
    AttentionCase(30, 1, 8, SHORT),  # more query heads than fit into a tile
    AttentionCase(2, 1, 256, (66, 3)),
    AttentionCase(2, 1, 64, (70, 9), scale=0.3),
    AttentionCase(1, 1, 32, (1000,)),
    AttentionCase(4, 2, 16, AROUND_TWO_PAGES, window=1),
    AttentionCase(4, 2, 24, AROUND_TWO_PAGES, window=5),
    AttentionCase(6, 2, 40, AROUND_TWO_PAGES, window=64),
    AttentionCase(8, 1, 64, AROUND_TWO_PAGES, window=100),
    AttentionCase(2, 2, 16, AROUND_TWO_PAGES, window=200),
)


@dataclass(frozen=True)
class QKV:
    """Queries of one sequence [length, heads, head_dim], its keys and values [length, kv_heads, head_dim], and the
    queries that sinks are seen by."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_sink: np.ndarray


def sequences(case: AttentionCase, seed: int = 0) -> list[QKV]:
    """Random values for a case, in float32 as projections give them."""
    rng = np.random.default_rng(seed)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [QKV(*(normal(rng, n, h, case.head_dim) for h in heads)) for n in case.lengths]


def exact_attention(
    case: AttentionCase, sequence: QKV, dtype: np.dtype, query_dtype: np.dtype = FLOAT32
) -> np.ndarray:
    """Attention of a sequence in float64, after rounding cache and queries: [length, heads · head_dim]."""
    group, length = case.heads // case.kv_heads, len(sequence.q)
    q, q_sink = (x.astype(query_dtype).astype(np.float64) for x in (sequence.q, sequence.q_sink))
    k, v = (np.repeat(rounded(x, dtype), group, axis=1) for x in (sequence.k, sequence.v))
    scores = np.einsum("qhd,khd->hqk", q, k)
    scores[..., : case.sink] = np.einsum("qhd,khd->hqk", q_sink, k[: case.sink])
    distance, position = np.arange(length)[:, None] - np.arange(length), np.arange(length)
    outside = (distance >= (case.window or length)) & (position >= case.sink)
    scores[:, (distance < 0) | outside] = -np.inf
    return np.einsum("hqk,khd->qhd", softmax(scores * case.exact_scale), v).reshape(length, -1)


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Keys or values [..., head_dim] as a cache of that dtype holds them, in float64."""
    if dtype != INT8:
        return x.astype(dtype).astype(np.float64)
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.round(x / np.where(scale == 0, np.float32(1), scale)).astype(np.int8) * scale.astype(np.float64)


@dataclass(frozen=True)
class Part:
    """Some positions of a sequence: what a step takes of it."""

    slot: int
    start: int
    stop: int


class AttentionRig:
    """kv_store and attention over a cache and a step of their own, everything around them poisoned.

    Queries, keys and values are columns of one tensor, with NaN between them, below them, in the whole cache
    and in the scratch memory. Unused entries of the page table name a page of NaN. Pages are shuffled:
    neighbours in a sequence lie anywhere. As in a model, `run` stores the parts' keys and values and then
    attends.
    """

    def __init__(self, device: Device, case: AttentionCase, dtype: np.dtype, shuffled: bool = True) -> None:
        self.device, self.case = device, case
        slots, max_rows = len(case.lengths), sum(case.lengths) + 2
        self.plan = Plan(device)
        self.step = Step(device, self.plan, max_rows, slots, case.pages)
        self.pages = slots * case.pages + 1
        self.kv = cache_tensors(1, self.pages, case.kv_heads, case.head_dim, dtype)[0]
        device.allocate([self.kv])
        poison_cache(self.kv)
        self._hand_out_pages(shuffled)
        self._record(max_rows)

    def _hand_out_pages(self, shuffled: bool) -> None:
        order = np.arange(self.pages - 1)
        if shuffled:
            np.random.default_rng(7).shuffle(order)
        table = self.step.arrays["page_table"]
        self.cache = KVCache([self.kv], table, self.pages)
        table[:] = self.pages - 1
        for slot, length in enumerate(self.case.lengths):
            used = min(-(-length // PAGE), self.case.pages)
            table[slot, :used] = order[slot * self.case.pages :][:used]

    def _record(self, max_rows: int) -> None:
        case, inputs = self.case, self.step.tensors
        q, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
        self.columns = np.cumsum([MARGIN, q, MARGIN, kv, MARGIN, kv, MARGIN, q])
        width = self.columns[-1] + MARGIN
        self.qkv = Tensor((max_rows, int(width)), FLOAT32, "qkv", self.plan, inputs["rows"])
        self.device.upload(self.qkv, np.full(self.qkv.shape, np.nan, np.float32))
        edges = self.columns.tolist()
        queries, keys, values, sink_queries = (self.qkv.columns(*edges[i : i + 2]) for i in (0, 2, 4, 6))
        where = (inputs["pos"], inputs["seq"], inputs["page_table"])
        KVStore("store", self.device).record(keys, values, self.kv, *where, ring=case.ring)
        q_sink = sink_queries if case.sink else None
        self.out = self.plan.keep(case.layer(self.device).record(queries, self.kv, *where, q_sink, case.ring))
        self.plan.lower()
        poison_scratch(self.plan)

    def run(self, data: Sequence[QKV], parts: Iterable[Part]) -> list[np.ndarray]:
        """One step. Returns the output of each part: [positions, heads · head_dim]."""
        parts = list(parts)
        self._set_rows(data, parts)
        self.out.storage[...] = np.nan
        self.plan.run()
        rows = sum(part.stop - part.start for part in parts)
        assert np.isnan(self.out.storage[rows:]).all(), "attention wrote below the step's rows"
        result = self.device.download(self.out)
        ends = np.cumsum([part.stop - part.start for part in parts])
        return np.split(result, ends[:-1])

    def store(self, data: Sequence[QKV], parts: Sequence[Part]) -> None:
        """Keys and values only."""
        self._set_rows(data, parts)
        self.plan.run(0, 1)

    def _set_rows(self, data: Sequence[QKV], parts: Sequence[Part]) -> None:
        pos = [p for part in parts for p in range(part.start, part.stop)]
        seq = [part.slot for part in parts for _ in range(part.start, part.stop)]
        for name in ("token", "pos", "seq"):
            self.step.arrays[name][:] = 2**30
        self.step.set_rows([0] * len(pos), pos, seq)
        self._fill(data, parts)

    def _fill(self, data: Sequence[QKV], parts: Sequence[Part]) -> None:
        whole = self.qkv.storage
        whole[...] = np.nan
        for i, name in enumerate(("q", "k", "v", "q_sink")):
            rows = np.concatenate([getattr(data[p.slot], name)[p.start : p.stop] for p in parts])
            start, stop = self.columns[2 * i : 2 * i + 2]
            whole[: len(rows), start:stop] = rows.reshape(len(rows), -1)

    def run_whole(self, data: Sequence[QKV]) -> list[np.ndarray]:
        """All sequences in one step, each from its beginning to its end."""
        return self.run(data, [Part(slot, 0, length) for slot, length in enumerate(self.case.lengths)])

    def run_chunks(self, data: Sequence[QKV], chunk: int) -> list[np.ndarray]:
        """All sequences in steps of at most `chunk` positions of each."""
        pieces: list[list[Any]] = [[] for _ in self.case.lengths]
        for start in range(0, max(self.case.lengths), chunk):
            running = [(slot, length) for slot, length in enumerate(self.case.lengths) if start < length]
            parts = [Part(slot, start, min(start + chunk, length)) for slot, length in running]
            for part, output in zip(parts, self.run(data, parts), strict=True):
                pieces[part.slot].append(output)
        return [np.concatenate(p) for p in pieces]
