"""matmul against float64: dtypes, shapes around every panel and tile, the independence of a row's bits."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    FLOAT32_LIMIT,
    MATMUL_CASES,
    ROWS,
    WEIGHT_DTYPES,
    Bench,
    MatmulCase,
    assert_close,
    assert_same_bits,
    cpu_devices,
    devices,
    isa_pairs,
    normal,
    product_limit,
    rounds_to_bf16,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import BFLOAT16, FLOAT16, FLOAT32
from engine.errors import UsageError
from engine.ops.matmul import Linear, matmul

every_dtype = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


def exact_matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.astype(np.float64).T


def scale_of(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """|x| · |w| of each output: what rounding errors are measured by where a sum cancels."""
    of_x, of_weight = (np.linalg.norm(m.astype(np.float64), axis=1) for m in (x, weight))
    return np.outer(of_x, of_weight)


def assert_matmul(out: np.ndarray, exact: np.ndarray, scale: np.ndarray, limit: float, what: object) -> None:
    """Relative to |x| · |w|; of enough outputs, where no cancellation weighs, to the result itself."""
    error = float(np.mean(((out - exact) / scale) ** 2)) if out.size else 0.0
    assert out.shape == exact.shape and error <= limit, f"{what}: error {error:.3g}, allowed {limit:.3g}"
    if out.size > 1000:
        assert_close(out, exact, limit, what)


@every_dtype
def test_every_shape_as_misaligned_views(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    for case in MATMUL_CASES:
        x, weight = normal(rng, 14, case.inputs), normal(rng, case.outputs, case.inputs, dtype=dtype)
        for device in devices():
            layer, bench = Linear([weight], device=device), Bench(device, rows=14)
            out = bench.output(case.outputs)
            bench.record(matmul, x=bench.view(x), weight=layer.matrices[0], bias=None, out=out)
            bench.run()
            exact, scale, limit = exact_matmul(x, weight), scale_of(x, weight), product_limit(device, dtype)
            assert_matmul(bench.result(out), exact, scale, limit, (device.description, case))


@every_dtype
def test_any_number_of_rows_has_the_bits_of_one_row(dtype: np.dtype) -> None:
    """So a row depends neither on the rows beside it nor on their number."""
    rng = np.random.default_rng(1)
    for case in (MatmulCase(72, 33), MatmulCase(17, 128), MatmulCase(1, 72)):
        x, weight = normal(rng, max(ROWS), case.inputs), normal(rng, case.outputs, case.inputs, dtype=dtype)
        for device in cpu_devices():
            layer = Linear([weight], device=device)
            alone = np.concatenate([layer.forward(x[r : r + 1]) for r in range(25)])
            most = layer.forward(x)
            exact, scale = exact_matmul(x, weight), scale_of(x, weight)
            assert_matmul(most, exact, scale, product_limit(device, dtype), (device.description, case))
            assert_same_bits(alone, most[:25], (device.description, case))
            for rows in ROWS:
                assert_same_bits(layer.forward(x[-rows:]), most[-rows:], (device.description, case, rows))


@every_dtype
def test_two_threads_give_the_bits_of_one(dtype: np.dtype) -> None:
    rng = np.random.default_rng(2)
    for case in (MatmulCase(1, 72), MatmulCase(33, 31), MatmulCase(1000, 128)):
        x, weight = normal(rng, 25, case.inputs), normal(rng, case.outputs, case.inputs, dtype=dtype)
        for pair in isa_pairs():
            one, two = (Linear([weight], device=device) for device in pair)
            for rows in (1, 25):
                what = (pair[0].description, case, rows)
                assert_same_bits(one.forward(x[:rows]), two.forward(x[:rows]), what)


@every_dtype
def test_prompts_with_a_bias_have_the_bits_of_single_rows(dtype: np.dtype) -> None:
    """So many rows that weights are widened for all of them at once, over more panels than are widened at a time."""
    rng = np.random.default_rng(4)
    for case in (MatmulCase(100, 1024), MatmulCase(33, 71)):
        x, weight = normal(rng, 61, case.inputs), normal(rng, case.outputs, case.inputs, dtype=dtype)
        bias = normal(rng, case.outputs)
        for pair in isa_pairs():
            one, two = (Linear([weight], [bias], device=device) for device in pair)
            what = (pair[0].description, case)
            out = one.forward(x)
            exact, scale = exact_matmul(x, weight) + bias, scale_of(x, weight)
            assert_matmul(out, exact, scale, product_limit(pair[0], dtype), what)
            assert_same_bits(two.forward(x), out, what)
            assert_same_bits(np.concatenate([one.forward(x[r : r + 1]) for r in range(61)]), out, what)


def test_rows_of_other_magnitudes_change_nothing() -> None:
    rng = np.random.default_rng(3)
    x, loud = normal(rng, 13, 72), normal(rng, 13, 72) * 1e18
    loud[6] = x[6]
    loud[3], loud[9] = np.nan, np.inf
    for dtype in WEIGHT_DTYPES:
        weight = normal(rng, 72, 72, dtype=dtype)
        for device in cpu_devices():
            layer = Linear([weight], device=device)
            assert_same_bits(layer.forward(loud)[6], layer.forward(x)[6], (device.description, str(dtype)))


@every_dtype
def test_of_no_inputs_the_bias_is_left(dtype: np.dtype) -> None:
    bias = normal(np.random.default_rng(5), 20)
    for device in devices():
        for rows in (1, 2, 30):
            out = Linear([np.zeros((20, 0), dtype)], [bias], device=device).forward(np.zeros((rows, 0), np.float32))
            assert np.array_equal(out, np.tile(bias, (rows, 1))), (device.description, rows)


def test_small_and_large_values() -> None:
    """Each row judged by itself. Magnitudes as far apart as float32 products allow without underflow."""
    rng = np.random.default_rng(4)
    weight = normal(rng, 128, 72) * 10.0 ** rng.integers(-6, 6, 72)  # some inputs weigh far more than others
    for magnitude in (1e-15, 1e-3, 1e4, 1e20):
        x = (normal(rng, 7, 72) * magnitude).astype(np.float32)
        for dtype in (FLOAT32, BFLOAT16):
            stored = weight.astype(dtype)
            for device in devices():
                out, limit = Linear([stored], device=device).forward(x), product_limit(device, dtype)
                assert_close(out, exact_matmul(x, stored), limit, (device.description, magnitude))


def test_every_half_precision_weight_is_exact() -> None:
    """All finite f16 and bf16 numbers, subnormals too: the product with 1 is the weight itself."""
    for dtype in (FLOAT16, BFLOAT16):
        every = np.arange(65536, dtype=np.uint16).view(dtype)
        numbers = every.astype(np.float32)
        normal_numbers = np.abs(numbers) >= np.finfo(np.float32).tiny
        for device in devices():
            flushes = rounds_to_bf16(device, dtype)  # the dot instruction reads subnormals as zero
            wanted = np.isfinite(numbers) & (normal_numbers | (numbers == 0) | ~np.bool_(flushes))
            column = np.where(wanted, numbers, 0).astype(dtype)[:, None]
            out = Linear([column], device=device).forward(np.ones((1, 1), np.float32))[0]
            assert np.array_equal(out, column[:, 0].astype(np.float32)), (device.description, str(dtype))


def test_odd_inputs_of_bf16_pairs() -> None:
    """The second half of the last pair is zero, in the weight and in x."""
    rng = np.random.default_rng(5)
    for inputs in (1, 3, 5, 127, 255):
        x, weight = normal(rng, 13, inputs), normal(rng, 16, inputs, dtype=BFLOAT16)
        for device in devices():
            bench = Bench(device, rows=13)
            out, layer = bench.output(16), Linear([weight], device=device)
            bench.record(matmul, x=bench.view(x), weight=layer.matrices[0], bias=None, out=out)
            bench.run()
            exact, scale, limit = exact_matmul(x, weight), scale_of(x, weight), product_limit(device, BFLOAT16)
            assert_matmul(bench.result(out), exact, scale, limit, (device.description, inputs))


def test_stacked_parts_of_mixed_dtypes_with_biases() -> None:
    """q, k and v as one multiplication: stored alike, as they are; stored differently, as few as there can be."""
    rng = np.random.default_rng(6)
    x, sizes = normal(rng, 7, 33), (5, 30, 17)
    biases = [normal(rng, n, dtype=d) for n, d in zip(sizes, WEIGHT_DTYPES, strict=True)]
    bias = np.concatenate([b.astype(np.float64) for b in biases])
    cases = {
        WEIGHT_DTYPES: [5, 30, 17], (BFLOAT16,) * 3: [52], (FLOAT16, BFLOAT16, FLOAT16): [5, 30, 17],
        (BFLOAT16, BFLOAT16, FLOAT32): [35, 17], (FLOAT32, FLOAT16, FLOAT16): [5, 47],
    }  # fmt: skip
    for dtypes, shapes in cases.items():
        weights = [normal(rng, n, 33, dtype=d) for n, d in zip(sizes, dtypes, strict=True)]
        exact = np.concatenate([exact_matmul(x, w) for w in weights], axis=1)
        for device in devices():
            layer = Linear(weights, biases, device=device)
            assert [weight.shape for weight in layer.matrices] == [(n, 33) for n in shapes]
            assert len({weight.name for weight in layer.matrices}) == len(shapes)
            out, limit = layer.forward(x), max(product_limit(device, w.dtype) for w in layer.matrices)
            assert_close(out, exact + bias, limit, (device.description, dtypes))
            one = Linear(weights, biases, dtype="float32", device=device)
            assert [(weight.dtype, weight.shape) for weight in one.matrices] == [(FLOAT32, (52, 33))]


def test_arrays_of_other_floats_are_float32() -> None:
    rng = np.random.default_rng(8)
    x, weights = normal(rng, 3, 31), [rng.standard_normal((20, 31)), normal(rng, 12, 31)]
    for device in devices():
        layer = Linear(weights, device=device)
        assert [(weight.dtype, weight.shape) for weight in layer.matrices] == [(FLOAT32, (32, 31))]
        assert_close(layer.forward(x), exact_matmul(x, np.concatenate(weights)), FLOAT32_LIMIT, device.description)


def test_float32_widens_once() -> None:
    rng = np.random.default_rng(7)
    x, weight = normal(rng, 7, 31), normal(rng, 33, 31, dtype=BFLOAT16)
    for device in devices():
        widened = Linear([weight], dtype="float32", device=device)
        assert widened.matrices[0].dtype == FLOAT32
        same = Linear([weight.astype(np.float32)], device=device).forward(x)
        assert_same_bits(widened.forward(x), same, device.description)


def test_unsuitable_shapes_are_refused() -> None:
    weight = np.ones((6, 5), np.float32)
    for device in devices():
        with pytest.raises(UsageError, match="mlp.down: input width 6, expected 5"):
            Linear([weight], name="mlp.down", device=device).forward(np.ones((2, 6), np.float32))
        with pytest.raises(UsageError, match="mlp.down: biases do not match 6 outputs"):
            Linear([weight], [np.ones(5, np.float32)], name="mlp.down", device=device)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 70), st.integers(1, 70), st.sampled_from(WEIGHT_DTYPES), st.booleans(),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_shape(rows: int, outputs: int, inputs: int, dtype: np.dtype, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = normal(rng, rows, inputs), normal(rng, outputs, inputs, dtype=dtype)
    bias = normal(rng, outputs) if biased else np.zeros(outputs, np.float32)
    for device in cpu_devices():
        layer = Linear([weight], [bias] if biased else [], device=device)
        out, exact = layer.forward(x), exact_matmul(x, weight) + bias
        scale = scale_of(x, weight) + np.abs(bias)
        assert_matmul(out, exact, scale, product_limit(device, dtype), device.description)
        if rows:
            assert_same_bits(layer.forward(x[-1:])[0], out[-1], device.description)
