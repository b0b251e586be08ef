"""add_rmsnorm: the exact sum, and bit for bit what rmsnorm makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FLOAT32_LIMIT, WIDTHS, Bench, assert_close, assert_same_bits, devices, isa_pairs, normal
from test_rmsnorm import exact_rmsnorm

from engine.errors import UsageError
from engine.ops.add_rmsnorm import AddRMSNorm, add_rmsnorm
from engine.ops.rmsnorm import RMSNorm


def test_every_width_as_misaligned_views() -> None:
    rng = np.random.default_rng(0)
    for device in devices():
        for width in WIDTHS:
            x, delta, weight = normal(rng, 5, width), normal(rng, 5, width), normal(rng, width)
            layer, bench = AddRMSNorm(weight, 1e-5, device=device), Bench(device, rows=5)
            total, out = bench.written(x), bench.output(width)
            added = bench.view(delta)
            bench.record(add_rmsnorm, x=total, delta=added, weight=layer.weight, out=out, eps=1e-5)
            bench.run()
            what = (device.description, width)
            assert_same_bits(bench.result(total), x + delta, what)
            assert_close(bench.result(out), exact_rmsnorm(x + delta, weight, 1e-5), FLOAT32_LIMIT, what)
            norm = RMSNorm(weight, 1e-5, device=device).forward(x + delta)
            assert_same_bits(bench.result(out), norm, what)


def test_bits_depend_neither_on_other_rows_nor_on_threads() -> None:
    rng = np.random.default_rng(1)
    x, delta, weight = normal(rng, 25, 72), normal(rng, 25, 72), normal(rng, 72)
    for one, two in isa_pairs():
        layer = AddRMSNorm(weight, 1e-6, device=one)
        many = layer.forward(x, delta)
        for row in (0, 12, 24):
            alone = layer.forward(x[row : row + 1], delta[row : row + 1])[0]
            assert_same_bits(alone, many[row], (one.description, row))
        assert_same_bits(AddRMSNorm(weight, 1e-6, device=two).forward(x, delta), many, two.description)


def test_widths_that_do_not_fit_are_refused() -> None:
    for device in devices():
        layer = AddRMSNorm(np.ones(5, np.float32), 1e-6, "post_norm", device)
        with pytest.raises(UsageError, match="post_norm: widths 5 and 6, expected 5"):
            layer.forward(np.ones((2, 5), np.float32), np.ones((2, 6), np.float32))
