"""rmsnorm against float64, on every device."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    FLOAT32_LIMIT,
    WIDTHS,
    Bench,
    assert_close,
    assert_same_bits,
    cpu_devices,
    devices,
    isa_pairs,
    normal,
    worst_row,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.ops.rmsnorm import RMSNorm, rmsnorm


def exact_rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """In float64; x [rows, groups · width]."""
    vectors = x.astype(np.float64).reshape(len(x), x.shape[1] // len(weight), len(weight))
    return (vectors / np.sqrt(np.mean(vectors**2, axis=-1, keepdims=True) + eps) * weight).reshape(x.shape)


@pytest.mark.parametrize("groups", [1, 3])
def test_every_width_as_a_misaligned_view(groups: int) -> None:
    rng = np.random.default_rng(groups)
    for device in devices():
        for width in WIDTHS:
            x, weight = normal(rng, 5, groups * width), normal(rng, width)
            layer, bench = RMSNorm(weight, 1e-5, device=device), Bench(device, rows=5)
            out = bench.output(x.shape[1])
            bench.record(rmsnorm, x=bench.view(x), weight=layer.weight, out=out, groups=groups, eps=1e-5)
            bench.run()
            exact = exact_rmsnorm(x, weight, 1e-5)
            assert_close(bench.result(out), exact, FLOAT32_LIMIT, (device.description, width))


def test_in_place_keeps_its_neighbours() -> None:
    """As on the heads of q within a tensor of q, k and v."""
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 4, 3 * 40), normal(rng, 40)
    for device in devices():
        layer = RMSNorm(weight, 1e-6, device=device)
        bench = Bench(device, rows=4)
        heads = bench.written(x)
        bench.record(rmsnorm, x=heads, weight=layer.weight, out=heads, groups=3, eps=1e-6)
        bench.run()
        assert_close(bench.result(heads), exact_rmsnorm(x, weight, 1e-6), FLOAT32_LIMIT, device.description)


def test_tiny_and_huge_rows() -> None:
    """eps decides where x² is far below it, and nowhere else; each row is judged by itself."""
    rng = np.random.default_rng(1)
    magnitudes = np.array([1e-30, 1e-12, 1e-6, 1e-3, 1, 1e6, 1e16], np.float32)[:, None]
    x, weight = normal(rng, 7, 72) * magnitudes, normal(rng, 72)
    for device in devices():
        for eps in (1e-5, 1e-6, 1e-12):
            out = RMSNorm(weight, eps, device=device).forward(x)
            error = worst_row(out, exact_rmsnorm(x, weight, eps))
            assert error <= FLOAT32_LIMIT, f"{device.description}, eps {eps}: {error:.3g}"
        zeros = RMSNorm(weight, 1e-6, device=device).forward(np.zeros((2, 72), np.float32))
        assert not zeros.any(), device.description


def test_bits_depend_neither_on_other_rows_nor_on_threads() -> None:
    rng = np.random.default_rng(2)
    x, weight = normal(rng, 37, 3 * 72), normal(rng, 72)
    for one, two in isa_pairs():
        layer = RMSNorm(weight, 1e-6, device=one)
        many = layer.forward(x)
        for row in (0, 7, 36):
            assert_same_bits(layer.forward(x[row : row + 1])[0], many[row], (one.description, row))
        assert_same_bits(RMSNorm(weight, 1e-6, device=two).forward(x), many, two.description)


def test_the_input_and_unsuitable_shapes() -> None:
    rng = np.random.default_rng(3)
    x = normal(rng, 4, 10)
    for device in devices():
        layer = RMSNorm(np.ones(5, np.float32), 1e-6, "block.norm", device)
        before = x.copy()
        spread = np.asfortranarray(x)
        assert_same_bits(layer.forward(spread), layer.forward(x), "non-contiguous input")
        assert_same_bits(x, before, "the input array")
        with pytest.raises(UsageError, match="block.norm: input width 12 is no multiple of the weight's 5"):
            layer.forward(np.ones((4, 12), np.float32))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 4), st.integers(0, 6), st.floats(-20, 20), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_any_shape_and_scale(width: int, groups: int, rows: int, exponent: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (normal(rng, rows, groups * width) * 2.0**exponent).astype(np.float32)
    weight = normal(rng, width)
    for device in cpu_devices()[::2]:
        out = RMSNorm(weight, 1e-6, device=device).forward(x)
        assert worst_row(out, exact_rmsnorm(x, weight, 1e-6)) <= FLOAT32_LIMIT, device.description
