"""rope_angles against angles reduced exactly, at positions where careless precision is lost."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
from harness import Bench, assert_same_bits, devices, isa_pairs

from engine.abi import LAST_POS
from engine.ops.rope_angles import RoPEAngles, rope_angles

TWO_PI = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
POSITIONS = (0, 1, 2, 63, 64, 1000, 4095, 99_999, 100_001, 123_457, 1_000_003, 2**31 - 1)


def inverse_frequencies(head_dim: int, theta: float = 10_000.0) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def exact_cos_sin(pos: int, frequency: float) -> tuple[float, float]:
    """cos and sin of the exact product, reduced in 80 decimal digits."""
    with localcontext() as context:
        context.prec = 80
        reduced = float(Decimal(int(pos)) * Decimal(float(frequency)) % TWO_PI)
    return math.cos(reduced), math.sin(reduced)


def exact_angles(positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """[rows, head_dim]: cosines, then sines."""
    pairs = np.array([[exact_cos_sin(p, f) for f in inv_freq] for p in positions])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1)


def allowed_error(positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """Half a unit in the last place of a float32 up to 1, and of the double product that the angle is."""
    radians = np.abs(np.outer(positions, inv_freq))
    return np.tile(2.0**-25 * 1.01 + radians * 2.0**-53 * 1.01, 2)


def test_every_position_and_head_dim() -> None:
    positions = np.array(POSITIONS, np.int32)
    for head_dim, theta in ((2, 1e4), (8, 1e4), (40, 5e5), (128, 1e6), (256, 5e6)):
        inv_freq = inverse_frequencies(head_dim, theta)
        exact, allowed = exact_angles(positions, inv_freq), allowed_error(positions, inv_freq)
        for device in devices():
            layer, bench = RoPEAngles(inv_freq, device=device), Bench(device, rows=len(positions))
            angles = bench.row_input(np.full(exact.shape, np.nan, np.float32))
            bench.record(rope_angles, pos=bench.row_input(positions), inv_freq=layer.inv_freq, angles=angles,
                         last_pos=LAST_POS, scaling=1.0)  # fmt: skip
            bench.run()
            what, error = (device.description, head_dim), np.abs(bench.result(angles) - exact) / allowed
            assert error.max() <= 1, f"{what}: {error.max():.2f} of what is allowed"
            assert np.isnan(angles.storage[len(positions) :]).all(), f"{what}: wrote below its rows"


def test_scaling_multiplies_both() -> None:
    """YaRN's attention factor."""
    positions, inv_freq = np.array([0, 5, 70_000], np.int32), inverse_frequencies(32)
    scaling = 0.1 * math.log(4) + 1
    for device in devices():
        out = RoPEAngles(inv_freq, scaling, device=device).forward(positions)
        exact = exact_angles(positions, inv_freq) * scaling
        assert np.abs(out - exact).max() < 1.1e-7, device.description


def test_positions_beyond_the_last_count_as_it() -> None:
    """How sinks are seen from behind a window: the distance to them stops growing."""
    positions, inv_freq = np.array([0, 1, 1022, 1023, 1024, 70_000, 2**31 - 1], np.int32), inverse_frequencies(40)
    for device in devices():
        clamped = RoPEAngles(inv_freq, device=device, last_pos=1023).forward(positions)
        plain = RoPEAngles(inv_freq, device=device).forward(np.minimum(positions, 1023))
        assert_same_bits(clamped, plain, device.description)


def test_bits_depend_neither_on_other_rows_nor_on_threads() -> None:
    positions, inv_freq = np.arange(99_990, 100_027, dtype=np.int32), inverse_frequencies(40)
    for pair in isa_pairs():
        one, two = (RoPEAngles(inv_freq, device=device) for device in pair)
        many = one.forward(positions)
        assert_same_bits(one.forward(positions[20:21])[0], many[20], pair[0].description)
        assert_same_bits(two.forward(positions), many, pair[0].description)
