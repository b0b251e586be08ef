"""embedding: exact rows of the packed table, and ids that it does not have."""

from __future__ import annotations

import numpy as np
import pytest
from harness import WEIGHT_DTYPES, WIDTHS, Bench, assert_same_bits, devices, isa_pairs, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import BFLOAT16, FLOAT16, FLOAT32
from engine.device import TokenError
from engine.errors import UsageError
from engine.ops.embedding import Embedding, embedding


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_every_row_of_tables_of_every_shape(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    for hidden, vocab_size in (*((width, 17) for width in WIDTHS), *((33, n) for n in (1, 15, 16, 32, 1000))):
        table = normal(rng, vocab_size, hidden, dtype=dtype)
        ids = rng.permutation(vocab_size).astype(np.int32)
        for device in devices():
            layer, bench = Embedding(table, device=device), Bench(device, rows=len(ids))
            out = bench.row_input(np.full((len(ids), hidden), np.nan, np.float32))
            token = bench.row_input(ids)
            bench.record(embedding, token=token, table=layer.table, out=out, vocab_size=vocab_size, first_id=0,
                         ids=vocab_size)  # fmt: skip
            bench.run()
            what = (device.description, hidden, vocab_size)
            assert_same_bits(bench.result(out), table[ids].astype(np.float32), what)
            assert np.isnan(out.storage[len(ids) :]).all(), f"{what}: wrote below the step's rows"


def test_every_half_precision_number() -> None:
    """Zeros of both signs, subnormals and infinities too."""
    for dtype in (FLOAT16, BFLOAT16):
        every = np.arange(65536, dtype=np.uint16).view(dtype)
        table = every[~np.isnan(every.astype(np.float32))][:, None]
        ids = np.arange(len(table), dtype=np.int32)
        for device in devices():
            out = Embedding(table, device=device).forward(ids)
            assert_same_bits(out, table.astype(np.float32), (device.description, str(dtype)))


def test_a_part_of_the_table_gives_zeros_for_other_ids() -> None:
    table, ids = normal(np.random.default_rng(3), 40, 9), np.array([0, 12, 13, 39, 26, 27, 25], np.int32)
    for device in devices():
        for first, stop in ((0, 13), (13, 27), (27, 40)):
            layer, bench = Embedding(table[first:stop], device=device), Bench(device, rows=len(ids))
            out = bench.row_input(np.full((len(ids), 9), np.nan, np.float32))
            bench.record(embedding, token=bench.row_input(ids), table=layer.table, out=out, vocab_size=40,
                         first_id=first, ids=stop - first)  # fmt: skip
            bench.run()
            here = ((ids >= first) & (ids < stop))[:, None]
            assert_same_bits(bench.result(out), np.where(here, table[ids], np.float32(0)), (device.description, first))


def test_widened_once() -> None:
    table, ids = normal(np.random.default_rng(1), 20, 33, dtype=BFLOAT16), np.array([19, 0, 7], np.int32)
    for device in devices():
        layer = Embedding(table, dtype="float32", device=device)
        assert layer.table.dtype == FLOAT32
        assert_same_bits(layer.forward(ids), table[ids].astype(np.float32), device.description)


def test_ids_outside_the_table_are_refused_and_the_device_goes_on() -> None:
    """Also those that the padding of the last panel would answer."""
    table = normal(np.random.default_rng(2), 18, 8)
    for device in (*devices(), isa_pairs()[-1][1]):
        layer = Embedding(table, device=device)
        for row in (0, 2, 6):
            for bad in (-1, 18, 31, 2**31 - 1, -(2**31)):
                ids = np.arange(7, dtype=np.int32)
                ids[row] = bad
                with pytest.raises(TokenError, match=f"^row {row} holds a token id outside the vocabulary$"):
                    layer.forward(ids)
        ids = np.array([17, 0], np.int32)
        assert_same_bits(layer.forward(ids), table[ids], device.description)


def test_two_threads_give_the_bits_of_one() -> None:
    table = normal(np.random.default_rng(3), 100, 72, dtype=BFLOAT16)
    ids = np.arange(99, -1, -3, dtype=np.int32)
    for pair in isa_pairs():
        for device in pair:
            out = Embedding(table, device=device).forward(ids)
            assert_same_bits(out, table[ids].astype(np.float32), device.description)


def test_ids_of_another_type_are_refused() -> None:
    for device in devices():
        with pytest.raises(UsageError, match="embed: .*int64, expected int32"):
            Embedding(np.ones((4, 4), np.float32), name="embed", device=device).forward(np.zeros(3, np.int64))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 40), st.sampled_from(WEIGHT_DTYPES),
    st.lists(st.integers(-3, 55), max_size=9), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_ids(vocab_size: int, hidden: int, dtype: np.dtype, ids: list[int], seed: int) -> None:
    table = normal(np.random.default_rng(seed), vocab_size, hidden, dtype=dtype)
    token = np.array(ids, np.int32)
    bad = [row for row, i in enumerate(ids) if not 0 <= i < vocab_size]
    for device in devices()[::2]:
        layer = Embedding(table, device=device)
        if bad:
            named = "|".join(map(str, bad)) if device.type == "cuda" else bad[0]  # whose blocks run in any order
            with pytest.raises(TokenError, match=f"^row ({named}) "):
                layer.forward(token)
        else:
            assert_same_bits(layer.forward(token), table[token].astype(np.float32), device.description)
