"""rope against float64, half against half, far out too."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    FLOAT32_LIMIT,
    Bench,
    assert_close,
    assert_same_bits,
    cpu_devices,
    devices,
    isa_pairs,
    normal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rope_angles import exact_angles, inverse_frequencies

from engine.errors import UsageError
from engine.ops.rope import RoPE, rope
from engine.ops.rope_angles import RoPEAngles

HEAD_DIMS = (2, 8, 16, 24, 30, 34, 40, 64, 80, 96, 128, 256)


def exact_rope(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Each pair (i, i + head_dim/2) as a complex number, turned."""
    half = angles.shape[1] // 2
    turn = (angles[:, :half] + 1j * angles[:, half:]).astype(np.complex128)[:, None]
    heads = x.astype(np.float64).reshape(len(x), x.shape[1] // (2 * half), 2, half)
    turned = (heads[:, :, 0] + 1j * heads[:, :, 1]) * turn
    return np.stack([turned.real, turned.imag], axis=2).reshape(x.shape)


@pytest.mark.parametrize("heads", [1, 3])
def test_every_head_dim_as_a_misaligned_view(heads: int) -> None:
    rng = np.random.default_rng(heads)
    for head_dim in HEAD_DIMS:
        x, angles = normal(rng, 5, heads * head_dim), normal(rng, 5, head_dim)
        for device in devices():
            bench = Bench(device, rows=5)
            turned = bench.written(x)
            bench.record(rope, x=turned, angles=bench.row_input(angles), out=turned)
            bench.run()
            exact = exact_rope(x, angles)
            assert_close(bench.result(turned), exact, FLOAT32_LIMIT, (device.description, head_dim))


def test_into_another_tensor_with_the_same_bits() -> None:
    """Of another stride; x stays as it is."""
    rng = np.random.default_rng(5)
    for head_dim in HEAD_DIMS:
        x, angles = normal(rng, 5, 3 * head_dim), normal(rng, 5, head_dim)
        for device in devices():
            bench = Bench(device, rows=5)
            given, there, in_place = bench.view(x), bench.output(x.shape[1]), bench.written(x)
            turn = bench.row_input(angles)
            bench.record(rope, x=given, angles=turn, out=there)
            bench.record(rope, x=in_place, angles=turn, out=in_place)
            bench.run()
            what = (device.description, head_dim)
            assert_same_bits(bench.result(given), x, what)
            assert_same_bits(bench.result(there), bench.result(in_place), what)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_layer_overwrites_its_input_only_where_it_is_told_to(in_place: bool) -> None:
    rng = np.random.default_rng(6)
    x, angles = normal(rng, 4, 2 * 16), normal(rng, 4, 16)
    for device in devices():
        bench = Bench(device, rows=4)
        given = bench.written(x)
        out = RoPE("turn", device, in_place=in_place).record(given, bench.row_input(angles))
        bench.run()
        assert (out is given) == in_place
        assert_close(bench.result(out), exact_rope(x, angles), FLOAT32_LIMIT, device.description)
        assert np.array_equal(bench.result(given), x) != in_place


def test_far_positions() -> None:
    """rope_angles and rope together, beyond position 100,000."""
    rng = np.random.default_rng(0)
    positions = np.array([100_001, 131_071, 1_000_003], np.int32)
    for head_dim, theta in ((64, 1e4), (128, 1e6)):
        inv_freq, x = inverse_frequencies(head_dim, theta), normal(rng, 3, 4 * head_dim)
        exact = exact_rope(x, exact_angles(positions, inv_freq))
        for device in devices():
            out = RoPE(device=device).forward(x, RoPEAngles(inv_freq, device=device).forward(positions))
            assert_close(out, exact, FLOAT32_LIMIT, (device.description, head_dim))


def test_a_turn_keeps_lengths_and_undoes_itself() -> None:
    rng = np.random.default_rng(1)
    x, radians = normal(rng, 6, 3 * 64), rng.uniform(-4, 4, (6, 32))
    angles = np.concatenate([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    back = angles * np.repeat([1, -1], 32).astype(np.float32)
    for device in devices():
        layer = RoPE(device=device)
        turned = layer.forward(x, angles)
        after, before = (np.linalg.norm(y.reshape(6, 3, 2, 32), axis=2) for y in (turned, x))
        assert np.allclose(after, before, rtol=1e-5), device.description
        assert np.allclose(layer.forward(turned, back), x, atol=1e-6), device.description


def test_bits_depend_neither_on_other_rows_nor_on_threads() -> None:
    rng = np.random.default_rng(2)
    x, angles = normal(rng, 25, 3 * 40), normal(rng, 25, 40)
    for one, two in isa_pairs():
        many = RoPE(device=one).forward(x, angles)
        for row in (0, 12, 24):
            alone = RoPE(device=one).forward(x[row : row + 1], angles[row : row + 1])[0]
            assert_same_bits(alone, many[row], (one.description, row))
        assert_same_bits(RoPE(device=two).forward(x, angles), many, two.description)


def test_heads_that_do_not_fit_are_refused() -> None:
    for device in devices():
        with pytest.raises(UsageError, match="attn.rope: width 12 is no multiple of head_dim 8"):
            RoPE("attn.rope", device).forward(np.ones((2, 12), np.float32), np.ones((2, 8), np.float32))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_any_shape(half: int, heads: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, angles = normal(rng, rows, heads * 2 * half), normal(rng, rows, 2 * half)
    for device in cpu_devices()[::2]:
        out = RoPE(device=device).forward(x, angles)
        assert_close(out, exact_rope(x, angles), FLOAT32_LIMIT, device.description)
