"""The page tables: what a sequence is given, what it gives back, and what is left."""

from __future__ import annotations

import numpy as np
import pytest
from harness import CACHE_DTYPES, assert_same_bits, cpu_devices, devices, normal, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import INT8
from engine.attention_choice import Policy
from engine.errors import RillError
from engine.kvcache import PAGE, Group, KVCache, cache_tensors, group_layers, ring_of
from engine.ops.kv_store import EVERY_PAGE, Ring


def make_cache(slots: int = 3, pages_per_slot: int = 4, pages: int = 12) -> KVCache:
    return KVCache([], np.zeros((slots, pages_per_slot), np.int32), pages)


def pages_of_slot(cache: KVCache, slot: int) -> list[int]:
    return cache.page_table[slot, : cache.held[slot]].tolist()


@pytest.mark.parametrize(
    "length, pages", [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3), (256, 4)]
)
def test_as_many_pages_as_the_length_needs(length: int, pages: int) -> None:
    cache = make_cache()
    cache.reserve(1, length)
    assert len(pages_of_slot(cache, 1)) == cache.used_pages() == pages


def test_growing_keeps_what_is_held_and_runs_on() -> None:
    cache = make_cache()
    cache.reserve(0, 10)
    cache.reserve(1, 10)
    first, second = pages_of_slot(cache, 0), pages_of_slot(cache, 1)
    cache.reserve(0, 10)
    assert pages_of_slot(cache, 0) == first
    cache.reserve(1, 4 * PAGE)
    assert pages_of_slot(cache, 1) == list(range(second[0], second[0] + 4)), "pages lie in a run where they can"
    cache.reserve(0, 4 * PAGE)
    assert pages_of_slot(cache, 0)[0] == first[0] and cache.used_pages() == 8


def test_sequences_that_grow_together_lie_in_runs_of_their_own() -> None:
    cache = make_cache()
    for length in range(1, 4 * PAGE + 1, 7):
        for slot in (2, 0, 1):
            cache.reserve(slot, length)
    for slot in range(3):
        pages = pages_of_slot(cache, slot)
        assert pages == list(range(pages[0], pages[0] + 4))


def test_a_shorter_length_keeps_its_pages_and_frees_the_rest() -> None:
    cache = make_cache()
    cache.reserve(0, 200)
    pages = pages_of_slot(cache, 0)
    assert cache.truncate(0, 300) == 200, "no more than was reserved"
    assert cache.truncate(0, 65) == 65
    assert pages_of_slot(cache, 0) == pages[:2] and cache.used_pages() == 2
    assert cache.truncate(0, 64) == 64 and pages_of_slot(cache, 0) == pages[:1]
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
    assert len(pages_of_slot(cache, 1)) == 1, "what was given stays accounted for"
    cache.truncate(1, 0)
    cache.truncate(0, 64)
    cache.reserve(1, 256)
    assert cache.used_pages() == 5


def test_scattered_pages_are_all_found() -> None:
    """When no run is left, single pages are given."""
    cache = make_cache(slots=6, pages_per_slot=6, pages=6)
    for slot in range(6):
        cache.reserve(slot, 1)
    order = {slot: pages_of_slot(cache, slot)[0] for slot in range(6)}
    assert sorted(order.values()) == list(range(6))
    freed = sorted(order[slot] for slot in (0, 2, 5))
    for slot in (0, 2, 5):
        cache.truncate(slot, 0)
    cache.reserve(0, 3 * PAGE)
    assert sorted(pages_of_slot(cache, 0)) == freed


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 5 * PAGE)), max_size=30))
def test_no_page_is_lost_or_held_twice(calls: list[tuple[int, bool, int]]) -> None:
    cache, lengths = make_cache(pages=7), [0, 0, 0]
    for slot, grow, length in calls:
        before = pages_of_slot(cache, slot)
        if grow:
            try:
                cache.reserve(slot, length)
                lengths[slot] = max(lengths[slot], length)
            except RillError:
                assert length > 4 * PAGE or cache.free.sum() == 0
                cache.truncate(slot, lengths[slot])
        else:
            lengths[slot] = min(length, lengths[slot])
            assert cache.truncate(slot, length) == lengths[slot]
        after = pages_of_slot(cache, slot)
        assert len(after) == -(-lengths[slot] // PAGE)
        kept = min(len(before), len(after))
        assert after[:kept] == before[:kept], "pages in use never move"
        held = [page for s in range(3) for page in pages_of_slot(cache, s)]
        assert len(set(held)) == len(held) and not cache.free[held].any()
        assert cache.used_pages() == len(held)


# Rings.


@pytest.mark.parametrize("max_rows", [1, 2, 63, 64, 65, 512])
@pytest.mark.parametrize("policy", [
    Policy(1), Policy(2), Policy(64), Policy(65), Policy(1020, 4), Policy(100, 64), Policy(37, 65), Policy(1, 1),
], ids=str)  # fmt: skip
def test_no_row_of_a_step_misses_a_page_that_the_step_overwrote(policy: Policy, max_rows: int) -> None:
    """Wherever the step begins; and one page less would not do."""
    assert policy.window
    ring = ring_of(policy, max_rows)
    shorter = ring._replace(ring_pages=ring.ring_pages - 1)
    missed = 0
    for start in range(20 * PAGE, 21 * PAGE):
        needed = {*range(policy.sink), *range(start - policy.window + 1, start + max_rows)}
        pages = np.unique(np.array(sorted(needed)) // PAGE)
        assert len(np.unique(ring.entries(pages))) == len(pages) <= sum(ring)
        missed += not shorter.ring_pages or len(np.unique(shorter.entries(pages))) < len(pages)
    assert missed


def test_layers_that_keep_alike_share_pages() -> None:
    full, narrow, wide = Policy(), Policy(64), Policy(1020, 4)
    mixed = group_layers([full, narrow, full, narrow, narrow], max_rows=64, most=100)
    assert [(g.policy, g.layers, g.entries, g.ring) for g in mixed] == [
        (full, [0, 2], 100, EVERY_PAGE), (narrow, [1, 3, 4], 3, Ring(0, 3)),
    ]  # fmt: skip
    assert [g.ring for g in group_layers([wide, narrow], 64, None)] == [Ring(1, 18), Ring(0, 3)]
    assert [g.entries for g in group_layers([wide], 64, 20)] == [19]
    for most in (19, 3, 1):  # a ring would save nothing
        assert group_layers([wide, wide], 64, most) == [Group(wide, [0, 1], most, EVERY_PAGE)]


def make_ring(policy: Policy, max_rows: int, slots: int = 2) -> KVCache:
    (group,) = group_layers([policy], max_rows, None)
    table = np.zeros((slots, group.entries), np.int32)
    return KVCache([], table, slots * group.entries, policy.window, group.ring)


def test_a_sequence_without_end_takes_no_more_than_its_ring() -> None:
    cache = make_ring(Policy(100, 4), max_rows=70)
    for length in range(1, 50 * PAGE, 70):
        cache.reserve(0, length)
        assert cache.used_pages() == min(-(-length // PAGE), 5)
    cache.reserve(0, 2**31 - 1)
    assert sorted(pages_of_slot(cache, 0)) == list(range(5)) and cache.used_pages() == 5
    cache.reserve(1, 2**31 - 1)
    assert sorted(pages_of_slot(cache, 1)) == list(range(5, 10))
    assert cache.truncate(0, 0) == 0 and cache.used_pages() == 5


@pytest.mark.parametrize("policy", [Policy(2), Policy(65), Policy(100, 4), Policy(130, 70)], ids=str)
def test_usable_is_what_no_later_page_has_taken_the_place_of(policy: Policy) -> None:
    """Against a model that notes which page each entry was last written for."""
    assert policy.window
    for max_rows in (1, 60):
        cache, rng = make_ring(policy, max_rows), np.random.default_rng(max_rows)
        there: dict[int, int] = {}  # entry -> page
        length, outcomes = 0, set()
        for _ in range(150):
            for _ in range(int(rng.integers(1, 400 // max_rows))):
                last = length + int(rng.integers(1, max_rows + 1))
                cache.reserve(0, last)
                there |= {int(cache.ring.entries(page)): page for page in range(length // PAGE, -(-last // PAGE))}
                length = last
            wanted = int(rng.integers(max(1, length - 4 * PAGE), length + 1))
            first = max(0, wanted - policy.window + 1)
            needed = {*range(min(policy.sink, wanted)), *range(first, wanted)}
            intact = all(there[int(cache.ring.entries(p // PAGE))] == p // PAGE for p in needed)
            usable = cache.usable(0, wanted)
            assert usable in (0, wanted) and (intact or not usable), "never more than there is"
            assert usable or not intact or first < cache.ring.sink_pages * PAGE, "and no less"
            outcomes.add(intact)
            length = cache.truncate(0, wanted)
            assert length == usable
            there = there if length else {}
        assert outcomes == {True, False}


def test_what_a_cancelled_step_overwrote_counts() -> None:
    """Its pages were reserved, and perhaps written, although its sequence has not grown."""
    cache = make_ring(Policy(64), max_rows=128)  # four pages
    cache.reserve(0, 4 * PAGE)
    assert cache.usable(0, 70) == 70
    cache.reserve(0, 6 * PAGE)
    assert cache.usable(0, 4 * PAGE) == 4 * PAGE, "the step's own rows can be formed again"
    assert cache.usable(0, 70) == 0
    assert cache.truncate(0, 4 * PAGE) == 4 * PAGE
    assert cache.usable(0, 70) == 0, "what is gone does not come back"
    assert cache.truncate(0, 70) == 0 and cache.used_pages() == 0
    cache.reserve(0, 3 * PAGE)
    assert cache.usable(0, 70) == 70


def test_a_cache_uploads_and_downloads_as_pages_of_keys_and_values() -> None:
    """Whatever the kernels' layout is: odd numbers of heads, widths that are no whole panels, each dtype."""
    rng = np.random.default_rng(0)
    for dtype in CACHE_DTYPES:
        for kv_heads, head_dim in ((1, 8), (3, 24), (2, 40), (1, 128)):
            logical = normal(rng, 3, 2, kv_heads, PAGE, head_dim)
            expected = rounded(logical, dtype).astype(np.float32)
            for device in cpu_devices() if dtype == INT8 else devices():
                tensor = cache_tensors(1, 3, kv_heads, head_dim, dtype)[0]
                device.upload(tensor, logical)
                what = (device.description, str(dtype), kv_heads, head_dim)
                assert_same_bits(np.asarray(device.download(tensor), np.float32), expected, what)


def test_bytes_of_a_page_are_what_is_allocated() -> None:
    for device in devices():
        for head_dim in (8, 40, 128):
            for dtype in CACHE_DTYPES if device.type == "cpu" else CACHE_DTYPES[:3]:  # the oracle widens int8
                tensor = cache_tensors(1, 5, 3, head_dim, dtype)[0]
                device.allocate([tensor])
                assert tensor.storage.nbytes == 5 * 3 * device.cache_bytes(dtype, head_dim)
                assert not np.asarray(tensor.storage).view(np.uint8).any(), "a new cache holds zeros"
