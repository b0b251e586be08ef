"""kv_store: keys and values arrive in their pages, exactly rounded, and nothing else of the cache changes."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    CACHE_DTYPES,
    MARGIN,
    Bench,
    assert_same_bits,
    cpu_devices,
    devices,
    isa_pairs,
    normal,
    poison_cache,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import BFLOAT16, FLOAT32, INT8
from engine.device import Device
from engine.errors import UsageError
from engine.kvcache import PAGE, cache_tensors
from engine.layer import plan_input
from engine.ops.kv_store import EVERY_PAGE, KVStore, Ring, kv_store
from engine.plan import Tensor

every_dtype = pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
# A page table of two slots; page 2 belongs to nobody.
TABLE = np.array([[3, 0], [1, 4]], np.int32)
PAGES = 5


def make_cache(device: Device, kv_heads: int, head_dim: int, dtype: np.dtype) -> Tensor:
    kv = cache_tensors(1, PAGES, kv_heads, head_dim, dtype)[0]
    device.allocate([kv])
    poison_cache(kv)
    return kv


def store(
    device: Device, kv: Tensor, k: np.ndarray, v: np.ndarray, pos: list[int], seq: list[int], ring: Ring = EVERY_PAGE
) -> None:
    bench = Bench(device, rows=len(pos))
    positions, slots = (bench.row_input(np.array(x, np.int32)) for x in (pos, seq))
    table = plan_input(bench.plan, TABLE, None, "page_table")
    values = bench.view(v, right=MARGIN + 1)  # another stride than the keys'
    bench.record(kv_store, k=bench.view(k), v=values, kv=kv, pos=positions, seq=slots, page_table=table,
                 head_dim=kv.shape[4], kv_pages=PAGES, **ring._asdict())  # fmt: skip
    bench.run()


def expected_after(
    before: np.ndarray, k: np.ndarray, v: np.ndarray, pos: list[int], seq: list[int]
) -> np.ndarray:
    """What the logical cache [pages, 2, kv_heads, PAGE, head_dim] must hold."""
    after = before.copy()
    for p, s in zip(pos, seq, strict=True):
        if p % PAGE == 0:
            after[TABLE[s, p // PAGE]] = 0
    for row, (p, s) in enumerate(zip(pos, seq, strict=True)):
        page = after[TABLE[s, p // PAGE]]
        page[0, :, p % PAGE] = k[row].reshape(page.shape[1], -1).astype(before.dtype)
        page[1, :, p % PAGE] = v[row].reshape(page.shape[1], -1).astype(before.dtype)
    return after


@every_dtype
def test_rows_reach_their_slots_and_nothing_else_changes(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    steps = (
        (list(range(60)) + list(range(7)), [0] * 60 + [1] * 7),  # two prompts
        ([60, 7], [0, 1]),  # decode
        (list(range(61, 100)), [0] * 39),  # a chunk over the page's end
        ([8, 100], [1, 0]),
        (list(range(9, 65)), [1] * 56),  # one position on the next page
    )
    for kv_heads, head_dim in ((1, 8), (2, 24), (3, 40), (1, 64), (2, 2), (1, 128)):
        for device in devices():
            kv = make_cache(device, kv_heads, head_dim, dtype)
            for pos, seq in steps:
                k, v = normal(rng, len(pos), kv_heads * head_dim), normal(rng, len(pos), kv_heads * head_dim)
                expected = expected_after(device.download(kv), k, v, pos, seq)
                store(device, kv, k, v, pos, seq)
                what = (device.description, kv_heads, head_dim, pos[0])
                assert_same_bits(device.download(kv), expected, what)


@pytest.mark.parametrize("ring", [Ring(0, 2), Ring(1, 1), Ring(0, 1)], ids=str)
@every_dtype
def test_a_sequence_goes_round_its_ring(dtype: np.dtype, ring: Ring) -> None:
    """Two entries hold a sequence without end: page p lies where it would if there were no other round."""
    rng = np.random.default_rng(3)
    for device in devices():
        kv = make_cache(device, 2, 24, dtype)
        for start, count in ((0, 50), (50, 14), (64, 1), (65, 100), (165, 60), (63 * PAGE - 1, 3), (2**31 - 66, 65)):
            pos, seq = list(range(start, start + count)), [1] * count
            if ring.ring_pages == 1:  # its step may span no two pages that take turns in one entry
                pos = [p for p in pos if p // PAGE == pos[-1] // PAGE]
            k, v = (normal(rng, len(pos), 2 * 24) for _ in "kv")
            home = [int(ring.entries(p // PAGE)) * PAGE + p % PAGE for p in pos]
            expected = expected_after(device.download(kv), k, v, home, seq[: len(pos)])
            store(device, kv, k, v, pos, seq[: len(pos)], ring)
            assert_same_bits(device.download(kv), expected, (device.description, start))


def test_entries_of_a_ring() -> None:
    """The first pages stay; those after them take turns."""
    assert Ring(2, 3).entries(np.arange(11)).tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4]
    assert Ring(0, 2).entries(np.arange(5)).tolist() == [0, 1, 0, 1, 0]
    assert EVERY_PAGE.entries(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert EVERY_PAGE.entries(2**25) == 2**25


@every_dtype
def test_a_fresh_page_is_cleared_with_its_padding(dtype: np.dtype) -> None:
    """Values are padded to whole panels, which kernels read: stale NaN must go there too."""
    for device in cpu_devices():
        for head_dim in (8, 24, 40):
            kv = make_cache(device, 2, head_dim, dtype)
            zeros = np.zeros((1, 2 * head_dim), np.float32)
            store(device, kv, zeros, zeros, [64], [1])
            scales = PAGES * 2 * 2 * PAGE * 4 if dtype == INT8 else 0  # those of all pages come last
            parts = np.split(kv.storage, [len(kv.storage) - scales])
            pages = np.concatenate([part.reshape(PAGES, -1) for part in parts], axis=1)
            what, others = (device.description, head_dim), np.delete(pages, TABLE[1, 1], axis=0)
            assert not pages[TABLE[1, 1]].any(), f"{what}: stale bytes"
            assert (others == 0xFF).all(), f"{what}: other pages were touched"


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    """Ties, overflow, subnormals, infinities and NaN as ml_dtypes rounds them, and so does every ISA."""
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00000001,
                     0x00008000, 0x00018000, 0x80000000, 0x7F800000, 0xFF800000, 0xBF808000, 0x007FFFFF,
                     0x00800000, 0x7F7F7FFF], np.uint32)  # fmt: skip
    k = bits.view(np.float32)[None]
    for device in devices():
        kv = make_cache(device, 2, 8, BFLOAT16)
        store(device, kv, k, -k, [0], [0])
        got = device.download(kv)[TABLE[0, 0], :, :, 0].reshape(2, -1)
        assert_same_bits(got, np.concatenate([k, -k]).astype(BFLOAT16), device.description)
        store(device, kv, np.full_like(k, np.nan), k, [1], [0])
        keys = device.download(kv)[TABLE[0, 0], 0, :, 1]
        assert np.isnan(keys.astype(np.float32)).all(), device.description


@every_dtype
def test_two_threads_store_what_one_stores(dtype: np.dtype) -> None:
    """Clearing a page must come before every write to it, whoever does either."""
    rng = np.random.default_rng(1)
    pos, seq = list(range(100)) + list(range(65)), [0] * 100 + [1] * 65
    k, v = normal(rng, 165, 3 * 40), normal(rng, 165, 3 * 40)
    for one, two in isa_pairs():
        cache, other = make_cache(one, 3, 40, dtype), make_cache(two, 3, 40, dtype)
        store(one, cache, k, v, pos, seq)
        store(two, other, k, v, pos, seq)
        assert_same_bits(other.storage, cache.storage, one.description)


def test_a_cache_of_another_shape_is_refused() -> None:
    for device in devices():
        bench, kv = Bench(device, rows=2), make_cache(device, 2, 8, FLOAT32)
        k, v = bench.view(np.ones((2, 8), np.float32)), bench.view(np.ones((2, 16), np.float32))
        zeros = bench.row_input(np.zeros(2, np.int32))
        table = plan_input(bench.plan, TABLE, None, "page_table")
        with pytest.raises(UsageError, match=r"attn.store: widths 8 and 16, cache \(5, 2, 2, 64, 8\)"):
            KVStore("attn.store", device).record(k, v, kv, zeros, zeros, table)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 20), st.sampled_from(CACHE_DTYPES), st.integers(0, 100),
    st.integers(1, 28), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_chunk(kv_heads: int, half: int, dtype: np.dtype, start: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pos, seq = list(range(start, start + count)), [int(rng.integers(2))] * count
    k, v = normal(rng, count, kv_heads * 2 * half), normal(rng, count, kv_heads * 2 * half)
    for device in cpu_devices()[::2]:
        kv = make_cache(device, kv_heads, 2 * half, dtype)
        expected = expected_after(device.download(kv), k, v, pos, seq)
        store(device, kv, k, v, pos, seq)
        assert_same_bits(device.download(kv), expected, device.description)


