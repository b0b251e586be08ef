"""The page tables: what a sequence is given, what it gives back, and what is left."""

from __future__ import annotations

import numpy as np
import pytest
from harness import CACHE_DTYPES, devices, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import BFLOAT16
from engine.errors import RillError
from engine.kvcache import PAGE, KVCache, cache_tensors


def make_cache(slots: int = 3, pages_per_slot: int = 4, pages: int = 12) -> KVCache:
    return KVCache([], np.zeros((slots, pages_per_slot), np.int32), pages)


def pages_of(cache: KVCache, slot: int) -> list[int]:
    return cache.page_table[slot, : cache.held[slot]].tolist()


@pytest.mark.parametrize(
    "length, pages", [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3), (256, 4)]
)
def test_as_many_pages_as_the_length_needs(length: int, pages: int) -> None:
    cache = make_cache()
    cache.reserve(1, length)
    assert len(pages_of(cache, 1)) == cache.used_pages() == pages


def test_growing_keeps_what_is_held_and_runs_on() -> None:
    cache = make_cache()
    cache.reserve(0, 10)
    cache.reserve(1, 10)
    first, second = pages_of(cache, 0), pages_of(cache, 1)
    cache.reserve(0, 10)
    assert pages_of(cache, 0) == first
    cache.reserve(1, 4 * PAGE)
    assert pages_of(cache, 1) == list(range(second[0], second[0] + 4)), "pages lie in a run where they can"
    cache.reserve(0, 4 * PAGE)
    assert pages_of(cache, 0)[0] == first[0] and cache.used_pages() == 8


def test_sequences_that_grow_together_lie_in_runs_of_their_own() -> None:
    cache = make_cache()
    for length in range(1, 4 * PAGE + 1, 7):
        for slot in (2, 0, 1):
            cache.reserve(slot, length)
    for slot in range(3):
        pages = pages_of(cache, slot)
        assert pages == list(range(pages[0], pages[0] + 4))


def test_a_shorter_length_keeps_its_pages_and_frees_the_rest() -> None:
    cache = make_cache()
    cache.reserve(0, 200)
    pages = pages_of(cache, 0)
    assert cache.truncate(0, 300) == 4 * PAGE, "no more than is held"
    assert cache.truncate(0, 65) == 65
    assert pages_of(cache, 0) == pages[:2] and cache.used_pages() == 2
    assert cache.truncate(0, 64) == 64 and pages_of(cache, 0) == pages[:1]
    assert cache.truncate(0, 0) == 0 and cache.used_pages() == 0
    cache.reserve(2, 4 * PAGE)
    assert cache.used_pages() == 4


def test_longer_than_the_table_or_fuller_than_the_pool_is_refused() -> None:
    cache = make_cache(pages=5)
    with pytest.raises(RillError, match="a sequence of 257 positions: the cache holds 256"):
        cache.reserve(0, 257)
    cache.reserve(0, 256)
    with pytest.raises(RillError, match="the KV cache is full"):
        cache.reserve(1, 65)
    assert len(pages_of(cache, 1)) == 1, "what was given stays accounted for"
    cache.truncate(1, 0)
    cache.truncate(0, 64)
    cache.reserve(1, 256)
    assert cache.used_pages() == 5


def test_scattered_pages_are_all_found() -> None:
    """When no run is left, single pages are given."""
    cache = make_cache(slots=6, pages_per_slot=6, pages=6)
    for slot in range(6):
        cache.reserve(slot, 1)
    order = {slot: pages_of(cache, slot)[0] for slot in range(6)}
    assert sorted(order.values()) == list(range(6))
    freed = sorted(order[slot] for slot in (0, 2, 5))
    for slot in (0, 2, 5):
        cache.truncate(slot, 0)
    cache.reserve(0, 3 * PAGE)
    assert sorted(pages_of(cache, 0)) == freed


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 5 * PAGE)), max_size=30))
def test_no_page_is_lost_or_held_twice(calls: list[tuple[int, bool, int]]) -> None:
    cache, lengths = make_cache(pages=7), [0, 0, 0]
    for slot, grow, length in calls:
        before = pages_of(cache, slot)
        if grow:
            try:
                cache.reserve(slot, length)
                lengths[slot] = max(lengths[slot], length)
            except RillError:
                assert length > 4 * PAGE or cache.free.sum() == 0
        else:
            usable = cache.truncate(slot, length)
            assert usable == min(length, len(before) * PAGE)
        after = pages_of(cache, slot)
        kept = min(len(before), len(after))
        assert after[:kept] == before[:kept], "pages in use never move"
        held = [page for s in range(3) for page in pages_of(cache, s)]
        assert len(set(held)) == len(held) and not cache.free[held].any()
        assert cache.used_pages() == len(held)


def test_a_cache_uploads_and_downloads_as_pages_of_keys_and_values() -> None:
    """Whatever the kernels' layout is: odd numbers of heads, widths that are no whole panels, both dtypes."""
    rng = np.random.default_rng(0)
    for dtype in CACHE_DTYPES:
        for kv_heads, head_dim in ((1, 8), (3, 24), (2, 40), (1, 128)):
            logical = normal(rng, 3, 2, kv_heads, PAGE, head_dim, dtype=dtype)
            for device in devices():
                tensor = cache_tensors(1, 3, kv_heads, head_dim, dtype)[0]
                device.upload(tensor, logical)
                assert (device.download(tensor) == logical).all(), (device.description, kv_heads, head_dim)


def test_bytes_of_a_page_are_what_is_allocated() -> None:
    for device in devices():
        for head_dim in (8, 40, 128):
            tensor = cache_tensors(1, 5, 3, head_dim, BFLOAT16)[0]
            device.allocate([tensor])
            assert tensor.storage.nbytes == 5 * 3 * device.cache_bytes(BFLOAT16, head_dim)
            assert not np.asarray(tensor.storage).view(np.uint8).any(), "a new cache holds zeros"
