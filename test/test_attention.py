"""attention over pages against float64: GQA, page ends, windows, chunks, and whatever must not be read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from harness import (
    AROUND_TWO_PAGES,
    ATTENTION_CASES,
    CACHE_DTYPES,
    QKV,
    AttentionCase,
    AttentionRig,
    Part,
    assert_close,
    assert_same_bits,
    cpu_devices,
    error_limit,
    exact_attention,
    host_devices,
    isa_pairs,
    normal,
    rounded,
    rounds_to_bf16,
    sequences,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import BFLOAT16, FLOAT16, FLOAT32, INT8
from engine.device import Device
from engine.errors import UsageError
from engine.kvcache import PAGE
from engine.ops.attention import KINDS, FlashAttention, MultiHeadAttention, StreamingAttention
from engine.ops.kv_store import Ring

every_dtype = pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)
CHUNKED = (
    AttentionCase(8, 2, 24, (70, 30)),
    AttentionCase(3, 1, 64, (131,)),
    AttentionCase(4, 4, 16, (140, 66), window=5),
    AttentionCase(4, 2, 40, (129, 64), window=70),
    AttentionCase(2, 1, 24, (1090, 3), kv_block=64),
    AttentionCase(1, 1, 16, (900,), window=386),  # all that 64 rows see is one block; with one more it is not
    AttentionCase(1, 1, 16, (900,), window=387),
)
SINKS = (
    AttentionCase(4, 2, 16, (200, 3, 70), window=64, sink=4),
    AttentionCase(4, 1, 24, (330, 64), window=5, sink=1),
    AttentionCase(2, 2, 40, (300,), window=70, sink=64),
    AttentionCase(3, 1, 16, (400,), window=100, sink=130),
    AttentionCase(2, 1, 16, (1300,), window=1100, sink=4, kv_block=128),
    AttentionCase(1, 1, 16, (900,), window=258, sink=65),
    AttentionCase(1, 1, 16, (900,), window=259, sink=65),
)


def case_name(case: AttentionCase) -> str:
    window = f"-window{case.window}" if case.window else ""
    sink = f"-sink{case.sink}" if case.sink else ""
    return f"{case.heads}of{case.kv_heads}x{case.head_dim}-{max(case.lengths)}{window}{sink}"


def assert_exact(outputs: list[np.ndarray], case: AttentionCase, data: list[QKV], device: Device,
                 dtype: np.dtype) -> None:  # fmt: skip
    for length, output, sequence in zip(case.lengths, outputs, data, strict=True):
        exact = exact_attention(case, sequence, dtype)
        assert_close(output, exact, error_limit(device, dtype), (device.description, case, length))


def assert_same(outputs: list[np.ndarray], expected: list[np.ndarray], what: object) -> None:
    for slot, (output, other) in enumerate(zip(outputs, expected, strict=True)):
        assert_same_bits(output, other, (what, f"sequence {slot}"))


@every_dtype
@every_kind
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=case_name)
def test_several_sequences_in_one_step(case: AttentionCase, kind: str, dtype: np.dtype) -> None:
    case = replace(case, kind=kind)
    data = sequences(case)
    for device in host_devices() if kind == "standard" else cpu_devices():
        assert_exact(AttentionRig(device, case, dtype).run_whole(data), case, data, device, dtype)


@every_dtype
@every_kind
@pytest.mark.parametrize("case", CHUNKED, ids=case_name)
def test_chunks_and_single_rows_give_the_bits_of_one_go(case: AttentionCase, kind: str, dtype: np.dtype) -> None:
    case = replace(case, kind=kind)
    data = sequences(case)
    for device in cpu_devices():
        whole = AttentionRig(device, case, dtype).run_whole(data)
        for chunk in (1, 7, 25, 64, 100) if max(case.lengths) < 1000 else (300,):
            chunked = AttentionRig(device, case, dtype).run_chunks(data, chunk)
            assert_same(chunked, whole, (device.description, f"chunks of {chunk}"))


@every_dtype
def test_decoding_agrees_with_float64(dtype: np.dtype) -> None:
    """A prompt, then row by row over a page's end, with the sequences in changing order."""
    case = AttentionCase(6, 2, 40, (70, 69))
    data = sequences(case)
    for device in host_devices():
        rig = AttentionRig(device, case, dtype)
        first, second = rig.run(data, [Part(0, 0, 61), Part(1, 0, 60)])
        pieces = [[first], [second]]
        for step in range(9):
            parts = [Part(0, 61 + step, 62 + step), Part(1, 60 + step, 61 + step)]
            parts = parts[:: 1 if step % 2 else -1]
            for part, output in zip(parts, rig.run(data, parts), strict=True):
                pieces[part.slot].append(output)
        assert_exact([np.concatenate(p) for p in pieces], case, data, device, dtype)


@every_dtype
@every_kind
def test_a_sequence_alone_has_the_bits_it_has_in_company(kind: str, dtype: np.dtype) -> None:
    """Whatever the others hold, wherever the pages lie."""
    case = AttentionCase(6, 3, 24, (65, 20, 130), window=70, kind=kind)
    data, others = sequences(case), sequences(case, seed=1)
    for device in cpu_devices():
        together = AttentionRig(device, case, dtype).run_whole(data)
        company = AttentionRig(device, case, dtype).run_whole([others[0], data[1], others[2]])
        assert_same_bits(company[1], together[1], device.description)
        for slot, length in enumerate(case.lengths):
            alone = AttentionRig(device, replace(case, lengths=(length,)), dtype, shuffled=False)
            assert_same_bits(alone.run_whole([data[slot]])[0], together[slot], (device.description, slot))


@every_dtype
@every_kind
def test_two_threads_give_the_bits_of_one(kind: str, dtype: np.dtype) -> None:
    for case in (ATTENTION_CASES[3], ATTENTION_CASES[5], AttentionCase(1, 1, 8, (1,)), AttentionCase(2, 1, 8, (2100,))):
        case = replace(case, kind=kind)
        data = sequences(case)
        for one, two in isa_pairs():
            expected = AttentionRig(one, case, dtype).run_whole(data)
            assert_same(AttentionRig(two, case, dtype).run_whole(data), expected, (one.description, case))


@every_dtype
@every_kind
def test_a_window_of_the_whole_length_is_full_attention(kind: str, dtype: np.dtype) -> None:
    full = AttentionCase(4, 2, 24, AROUND_TWO_PAGES, kind=kind)
    data = sequences(full)
    for device in cpu_devices():
        expected = AttentionRig(device, full, dtype).run_whole(data)
        for window in (max(AROUND_TWO_PAGES), 100_000):
            rig = AttentionRig(device, replace(full, window=window), dtype)
            assert_same(rig.run_whole(data), expected, (device.description, window))


@every_kind
def test_a_window_of_one_returns_the_values(kind: str) -> None:
    """e^0 / 1 = 1: bit for bit the row's own value; of bytes, whose weights are whole numbers, as good as that."""
    case = AttentionCase(4, 2, 16, (70,), window=1, kind=kind)
    data = sequences(case)
    for device in host_devices():
        for dtype in CACHE_DTYPES:
            values = np.repeat(rounded(data[0].v, dtype).astype(np.float32), 2, axis=1).reshape(70, -1)
            out = AttentionRig(device, case, dtype).run_whole(data)[0]
            if dtype == INT8 and device.type == "cpu":
                assert_close(out, values, 1e-13, device.description)
            else:
                assert_same_bits(out, values, (device.description, str(dtype)))


def whole_numbers(case: AttentionCase, seed: int) -> list[QKV]:
    """Queries and keys of whole numbers that every dtype holds exactly, so that all devices make the same scores: with
    127 in each key, the scale of an int8 cache is 1."""
    rng, result = np.random.default_rng(seed), []
    for length in case.lengths:
        q = rng.integers(-8, 9, (length, case.heads, case.head_dim)).astype(np.float32)
        k = rng.integers(-127, 128, (length, case.kv_heads, case.head_dim)).astype(np.float32)
        k[..., 0] = 127
        result.append(QKV(q, k, normal(rng, *k.shape), np.zeros_like(q)))
    return result


@every_dtype
@every_kind
def test_scores_of_great_magnitude(kind: str, dtype: np.dtype) -> None:
    """Scores thousands apart: all the weight lies on the largest, and nothing overflows."""
    case = AttentionCase(4, 2, 64, (130, 65, 3), scale=1.0, kind=kind)
    data = whole_numbers(case, 0)
    for device in host_devices():
        assert_exact(AttentionRig(device, case, dtype).run_whole(data), case, data, device, dtype)


@every_kind
def test_whole_numbers_of_wide_heads_do_not_overflow(kind: str) -> None:
    """Bytes and words all as large as they get: 1,024 products of 127 and 32,767 would be more than 2^31."""
    case = AttentionCase(1, 1, 1024, (66,), scale=2**-10, kind=kind)
    sign = np.where(np.arange(66) % 3, 1, -1).astype(np.float32)[:, None, None]
    ones = np.ones((66, 1, 1024), np.float32)
    data = [QKV(ones, sign * ones, normal(np.random.default_rng(5), 66, 1, 1024), np.zeros_like(ones))]
    for device in host_devices():
        assert_exact(AttentionRig(device, case, INT8).run_whole(data), case, data, device, INT8)


@every_dtype
@every_kind
def test_scores_far_below_zero(kind: str, dtype: np.dtype) -> None:
    """Every score below -50,000, so that a finite sentinel for "not visible" would win the softmax."""
    for window in (None, 9):
        case = AttentionCase(2, 1, 64, (130, 64, 2), window=window, scale=1.0, kind=kind)
        rng = np.random.default_rng(2)
        data = [
            QKV(
                np.full((n, 2, 64), -16, np.float32),
                (250 + rng.integers(-1, 2, (n, 1, 64)) * (rng.random((n, 1, 64)) < 0.01)).astype(np.float32),
                normal(rng, n, 1, 64),
                np.zeros((n, 2, 64), np.float32),
            )
            for n in case.lengths
        ]
        scores = np.einsum("qhd,khd->hqk", data[0].q, np.repeat(data[0].k, 2, axis=1))
        assert scores.max() < -5e4 and len(np.unique(scores)) > 1
        for device in host_devices():
            assert_exact(AttentionRig(device, case, dtype).run_whole(data), case, data, device, dtype)


@every_kind
def test_equal_scores_average_the_values(kind: str) -> None:
    """Queries of zero: every visible position weighs the same, so one too many or too few shows at once."""
    for window in (None, 5, 64):
        case = AttentionCase(2, 2, 8, (200,), window=window, kind=kind)
        data = [replace(sequences(case)[0], q=np.zeros((200, 2, 8), np.float32))]
        for device in host_devices():
            assert_exact(AttentionRig(device, case, FLOAT32).run_whole(data), case, data, device, FLOAT32)


@every_dtype
@every_kind
def test_queries_are_rounded_only_for_the_dot_instruction(kind: str, dtype: np.dtype) -> None:
    """And to 16 bits for a cache of bytes; float32's accuracy elsewhere. Of queries rounded to bf16, what is left is
    the rounding of weights."""
    case = AttentionCase(2, 1, 64, (100,), kind=kind)
    data = sequences(case)
    for device in cpu_devices():
        rounded = rounds_to_bf16(device, dtype)
        exact = exact_attention(case, data[0], dtype, BFLOAT16 if rounded else FLOAT32)
        out = AttentionRig(device, case, dtype).run_whole(data)[0]
        limit = 3e-6 if rounded else 5e-9 if dtype == INT8 else 1e-12
        assert_close(out, exact, limit, device.description)


@every_dtype
@every_kind
def test_a_recycled_page_holds_nothing_of_its_last_owner(kind: str, dtype: np.dtype) -> None:
    """Sequences of NaN and infinities give their pages back; the next ones have the bits of a fresh cache."""
    case = AttentionCase(2, 1, 24, (100, 70), kind=kind)
    data = sequences(case)
    nan = [replace(s, k=np.full_like(s.k, np.nan), v=np.full_like(s.v, np.inf)) for s in data]
    for device in host_devices():
        fresh = AttentionRig(device, case, dtype).run_whole(data)
        rig = AttentionRig(device, case, dtype)
        with np.errstate(invalid="ignore"):
            rig.run_whole(nan)
        table = rig.step.arrays["page_table"]
        table[0, :2], table[1, :2] = table[1, :2].copy(), table[0, :2].copy()
        assert_same(rig.run_whole(data), fresh, device.description)


@every_dtype
@every_kind
def test_later_positions_weigh_exactly_nothing(kind: str, dtype: np.dtype) -> None:
    """However large their values are: e^-87 would already show."""
    case = AttentionCase(2, 1, 24, (70,), kind=kind)
    data = sequences(case)[0]
    largest = np.float32(6e4 if dtype == FLOAT16 else 3e38)
    huge = replace(data, v=np.where(np.arange(70)[:, None, None] < 40, data.v, largest))
    for device in cpu_devices():
        plain, loud = (AttentionRig(device, case, dtype).run_whole([d])[0] for d in (data, huge))
        assert_same_bits(loud[:40], plain[:40], device.description)


@every_kind
def test_nan_does_not_cross_sequences(kind: str) -> None:
    case = AttentionCase(2, 1, 16, (70, 30, 64), kind=kind)
    data = sequences(case)
    ill = [data[0], replace(data[1], v=np.full_like(data[1].v, np.nan)), data[2]]
    for device in cpu_devices():
        well, sick = (AttentionRig(device, case, FLOAT32).run_whole(d) for d in (data, ill))
        assert_same_bits(sick[0], well[0], device.description)
        assert_same_bits(sick[2], well[2], device.description)
        assert np.isnan(sick[1]).all(), device.description


@every_dtype
@pytest.mark.parametrize("case", SINKS, ids=case_name)
def test_sinks_and_a_window(case: AttentionCase, dtype: np.dtype) -> None:
    """In one go and in chunks; with all pages kept, and with pages that take turns."""
    case = replace(case, kind="streaming")
    data = sequences(case)
    sink_pages, chunk = -(-case.sink // PAGE), 50
    ring = Ring(sink_pages, -(-((case.window or 0) + chunk) // PAGE) + 1)
    for device in host_devices() if max(case.lengths) < 1000 else cpu_devices():
        whole = AttentionRig(device, case, dtype).run_whole(data)
        assert_exact(whole, case, data, device, dtype)
        recycled = AttentionRig(device, replace(case, ring=ring), dtype).run_chunks(data, chunk)
        if device.type == "cpu":
            assert_same(recycled, whole, (device.description, "recycled pages"))
        else:
            assert_exact(recycled, case, data, device, dtype)


@every_dtype
def test_one_row_far_along(dtype: np.dtype) -> None:
    """Forty ranges, more than are computed at once, have the bits that they have where a tile goes through them."""
    length = 40_100
    case = AttentionCase(2, 1, 8, (length,), kind="streaming", kv_block=1024)
    data = sequences(case)
    for pair in isa_pairs():
        for device in pair:
            rig = AttentionRig(device, case, dtype)
            rig.store(data, [Part(0, 0, length)])
            tile = rig.run(data, [Part(0, length - 2, length)])[0]
            for i in (0, 1):
                row = length - 2 + i
                alone = rig.run(data, [Part(0, row, row + 1)])[0][0]
                assert_same_bits(alone, tile[i], (device.description, row))
        exact = exact_row(case, data[0], length - 1, dtype)
        assert_close(tile[1], exact, error_limit(device, dtype), device.description)


def exact_row(case: AttentionCase, sequence: QKV, row: int, dtype: np.dtype) -> np.ndarray:
    """exact_attention of one row of a single KV head."""
    k, v = (rounded(x[: row + 1, 0], dtype) for x in (sequence.k, sequence.v))
    scores = sequence.q[row].astype(np.float64) @ k.T * case.exact_scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True) @ v).reshape(-1)


@every_dtype
@every_kind
def test_a_single_nan_is_not_hidden(kind: str, dtype: np.dtype) -> None:
    """One element of one key or value, wherever it stands: every row that sees it says so, also the row whose block
    holds nothing else that it sees."""
    case = AttentionCase(2, 1, 16, (300,), kind=kind, kv_block=64)
    for where, position, dim in (("k", 0, 0), ("k", 64, 7), ("k", 256, 15), ("v", 64, 0), ("v", 70, 9)):
        data = sequences(case)[0]
        ill = getattr(data, where).copy()
        ill[position, 0, dim] = np.nan
        for device in cpu_devices():
            out = AttentionRig(device, case, dtype).run_whole([replace(data, **{where: ill})])[0]
            assert np.isnan(out[position:]).any(axis=1).all(), (device.description, where, position)


def test_unsuitable_shapes_are_refused() -> None:
    rig = AttentionRig(host_devices()[0], AttentionCase(4, 2, 8, (3,)), FLOAT32)
    inputs = rig.step.tensors
    where = (rig.kv, inputs["pos"], inputs["seq"], inputs["page_table"])
    with pytest.raises(UsageError, match="attn: 3 heads do not divide by 2 KV heads"):
        MultiHeadAttention(3, name="attn", device=rig.device).record(rig.out, *where)
    with pytest.raises(UsageError, match="attn: query width 32, expected 48"):
        MultiHeadAttention(6, name="attn", device=rig.device).record(rig.out, *where)
    with pytest.raises(UsageError, match="attn: window 0, expected 1 to 2147483647"):
        MultiHeadAttention(4, window=0, name="attn")
    with pytest.raises(UsageError, match="attn: scale -1, expected a positive number"):
        MultiHeadAttention(4, scale=-1, name="attn")
    with pytest.raises(UsageError, match="attn: sinks need a window"):
        StreamingAttention(4, sink=1, name="attn")
    with pytest.raises(UsageError, match="attn: sinks need queries of their own"):
        StreamingAttention(4, sink=1, window=5, name="attn", device=rig.device).record(rig.out, *where)
    with pytest.raises(UsageError, match="attn: kv_block 96, expected"):
        FlashAttention(4, kv_block=96, name="attn")
    with pytest.raises(UsageError, match="attn: q_block -1, expected"):
        FlashAttention(4, q_block=-1, name="attn")


@settings(max_examples=50, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    eighths=st.integers(1, 9),
    dtype=st.sampled_from(CACHE_DTYPES),
    lengths=st.lists(st.integers(1, 2 * PAGE + 3), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(1, 140)),
    sink=st.integers(0, 100),
    kind=st.sampled_from(list(KINDS)),
    blocks=st.tuples(st.sampled_from([None, 1, 5, 32]), st.sampled_from([None, 64, 128])),
    chunk=st.integers(1, 140),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_in_any_chunks(kv_heads: int, group: int, eighths: int, dtype: np.dtype, lengths: list[int],
                                 window: int | None, sink: int, kind: str, blocks: tuple[int | None, int | None],
                                 chunk: int, seed: int) -> None:  # fmt: skip
    case = AttentionCase(kv_heads * group, kv_heads, 8 * eighths, tuple(lengths), window, kind=kind,
                         sink=sink if kind == "streaming" and window else 0, q_block=blocks[0],
                         kv_block=blocks[1])  # fmt: skip
    data = sequences(case, seed)
    if len(lengths) * max(lengths) > 40 * chunk:
        chunk = max(lengths)
    for device in cpu_devices()[::2]:
        whole = AttentionRig(device, case, dtype).run_whole(data)
        assert_exact(whole, case, data, device, dtype)
        assert_same(AttentionRig(device, case, dtype).run_chunks(data, chunk), whole, device.description)
