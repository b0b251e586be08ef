"""swiglu against float64; through it, the vector exponential that attention uses too."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FLOAT32_LIMIT, WIDTHS, Bench, assert_close, assert_same_bits, devices, isa_pairs, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.ops.swiglu import SwiGLU, swiglu


def exact_swiglu(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    return gate * np.exp(-np.logaddexp(0, -gate)) * up


def test_every_width_as_a_misaligned_view() -> None:
    rng = np.random.default_rng(0)
    for device in devices():
        for width in WIDTHS:
            x, bench = 4 * normal(rng, 5, 2 * width), Bench(device, rows=5)
            out = bench.output(width)
            bench.record(swiglu, x=bench.view(x), out=out)
            bench.run()
            assert_close(bench.result(out), exact_swiglu(x), FLOAT32_LIMIT, (device.description, width))


def test_every_gate_is_right_by_itself() -> None:
    """Relative error of each element, over all magnitudes of the gate: what a sum of squares would hide."""
    steps = np.arange(-86.5, 100, 0.0173)
    gate = np.concatenate([steps, [-1e-3, -1e-20, 1e-40, 1e-20, 1e4, 3e38]]).astype(np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    exact = exact_swiglu(x)
    for device in devices():
        error = np.abs(SwiGLU(device=device).forward(x) - exact) / np.abs(exact)
        worst = int(error.argmax())
        assert error.max() < 2.5e-7, f"{device.description}: {error.max():.3g} at gate {gate[worst]}"


def test_far_below_zero_and_signed_zeros() -> None:
    x = np.array([[-88, -100, -1e4, -3e38, 0.0, -0.0, 2, 2, 2, 2, 2, 2]], np.float32)
    for device in devices():
        out = SwiGLU(device=device).forward(x)[0]
        assert np.isfinite(out).all() and (np.abs(out[:3]) < 1e-30).all(), device.description
        assert abs(out[3]) < 20, f"{device.description}: e^87 is the largest divisor"
        assert_same_bits(out[4:], np.array([0.0, -0.0], np.float32), device.description)


def test_nan_is_not_hidden() -> None:
    x = np.ones((1, 40), np.float32)
    x[0, [3, 29]] = np.nan  # a gate, and an input of element 9
    for device in devices():
        out = SwiGLU(device=device).forward(x)[0]
        assert np.flatnonzero(np.isnan(out)).tolist() == [3, 9], device.description


def test_bits_depend_neither_on_other_rows_nor_on_threads() -> None:
    x = 4 * normal(np.random.default_rng(1), 25, 2 * 72)
    for one, two in isa_pairs():
        layer = SwiGLU(device=one)
        many = layer.forward(x)
        for row in (0, 12, 24):
            assert_same_bits(layer.forward(x[row : row + 1])[0], many[row], (one.description, row))
        assert_same_bits(SwiGLU(device=two).forward(x), many, two.description)


def test_an_odd_width_is_refused() -> None:
    for device in devices():
        with pytest.raises(UsageError, match="mlp.act: width 7 is odd"):
            SwiGLU("mlp.act", device).forward(np.ones((2, 7), np.float32))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.floats(0, 6), st.integers(0, 2**32 - 1))
def test_any_shape_and_scale(width: int, rows: int, exponent: float, seed: int) -> None:
    x = (normal(np.random.default_rng(seed), rows, 2 * width) * 2.0**exponent).astype(np.float32)
    for device in devices()[::2]:
        assert_close(SwiGLU(device=device).forward(x), exact_swiglu(x), FLOAT32_LIMIT, device.description)
