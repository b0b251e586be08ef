"""What AVX-512 and AMX instructions do, bit by bit, as simd.h and amx.c use them: of hardware that has them, and of
their emulation (`make emulated`), which must be right for what is tested with it to mean anything."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import shlex
import subprocess
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import abi
from engine.abi import BFLOAT16
from engine.device.cpu import available_isas

ROOT = Path(__file__).parent.parent
ISAS = [isa for isa in available_isas() if isa.startswith("avx512")]
BF16_ISAS = [isa for isa in ISAS if isa in ("avx512_bf16", "avx512_amx")]
AMX_ISAS = [isa for isa in ISAS if isa == "avx512_amx"]
LANES, INF, NAN, TINY = 16, np.inf, np.nan, float(np.finfo(np.float32).tiny)
EDGES = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.5, -2.5, 126.5, -126.5, 1e-45, -1e-45, TINY, -TINY / 2, 3e38, -3e38,
         INF, -INF, NAN)  # fmt: skip


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions of avx512.c for an ISA, compiled as its library was."""
    lines = (abi.LIBRARIES / "build.txt").read_text("utf-8").splitlines()
    built = dict(line.split(":", 1) for line in lines)
    compiler, folder = shlex.split(built["compiler"].split(",")[0]), tmp_path_factory.mktemp("avx512")

    @cache
    def compiled(isa: str) -> ctypes.CDLL:
        flags = [flag for flag in shlex.split(f"{built['flags']} {built[isa]}") if not flag.startswith("-fsanitize")]
        library = folder / f"{isa}.so"
        subprocess.run([*compiler, *flags, "-shared", "test/avx512.c", "-o", library, "-lm"], check=True, cwd=ROOT)
        return ctypes.CDLL(str(library))

    return compiled


def call(function: Any, *arguments: Any) -> None:
    """Arrays go by address, as they are."""
    function.restype = None
    function(*(ctypes.c_void_p(abi.address(x)) if isinstance(x, np.ndarray) else x for x in arguments))


def in_vectors(values: Any) -> np.ndarray:
    """[n, LANES], the last vector filled up."""
    values = np.asarray(values, np.float32)
    return np.resize(values, (-(-len(values) // LANES), LANES))


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Every edge case beside every other."""
    x, y = np.meshgrid(EDGES, EDGES)
    return in_vectors(x.ravel()), in_vectors(y.ravel())


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same bits; of NaN, that it is one."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = f"u{actual.dtype.itemsize}"
    equal = (actual.view(bits) == expected.view(bits)) | (np.isnan(actual) & np.isnan(expected))
    assert equal.all(), (actual[~equal][:5], expected[~equal][:5])


def nearest(exact: Fraction) -> np.float32:
    """The float32 nearest to a number, ties to even, subnormals zero."""
    guess = np.float32(float(exact))
    around = [guess, np.nextafter(guess, np.float32(-INF)), np.nextafter(guess, np.float32(INF))]
    finite = [x for x in around if np.isfinite(x)]
    best = min(finite, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))
    return best if abs(best) >= TINY else np.float32(np.copysign(0, best))


def multiply_add(acc: np.float32, a: np.float32, b: np.float32) -> np.float32:
    """Rounded once."""
    if not np.isfinite([acc, a, b]).all():
        with np.errstate(invalid="ignore"):
            return np.float32(acc + a * b)
    exact = Fraction(float(acc)) + Fraction(float(a)) * Fraction(float(b))
    return nearest(exact) if exact else np.float32(acc + a * b)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x).astype(np.float32)


# One vector, or two.


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_is_to_even(functions: Any, isa: str) -> None:
    for x in in_vectors([*EDGES, 3.5, -3.5, 8388609.0, 4194304.5]):
        out = np.empty_like(x)
        call(functions(isa).of_one, b"round", x, out)
        same(out, np.rint(x))


@pytest.mark.parametrize("isa", ISAS)
def test_a_fraction_is_rounded_down_as_its_floor_is(functions: Any, isa: str) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal(400, np.float32) * np.exp2(rng.integers(-40, 20, 400)).astype(np.float32)

    def fraction(x: np.float32) -> np.float32:
        if not np.isfinite(x):
            return np.float32(NAN if np.isnan(x) else 0)
        exact = Fraction(float(x)) - int(np.floor(x))
        if not exact:
            return np.float32(-0.0)
        guess = np.float32(float(exact))
        return guess if Fraction(float(guess)) <= exact else np.nextafter(guess, np.float32(0))

    rounded_up = 0
    for x in in_vectors([*EDGES, *values]):
        out = np.empty_like(x)
        call(functions(isa).of_one, b"fraction", x, out)
        same(out, np.array([fraction(value) for value in x]))
        with np.errstate(invalid="ignore"):
            rounded_up += int((x - np.floor(x) > out).sum())
    assert rounded_up > 20, "no value tells one rounding from the other"


@pytest.mark.parametrize("isa", ISAS)
def test_scaling_by_powers_of_two(functions: Any, isa: str) -> None:
    def scaled(x: np.float32, y: np.float32) -> np.float32:
        if np.isinf(y):  # an infinite power, or zero: even of NaN
            return np.maximum(y, np.float32(0)) if np.isnan(x) else x * np.maximum(y, np.float32(0))
        return y if np.isnan(y) else np.float32(np.ldexp(np.float64(x), int(np.clip(np.floor(y), -1000, 1000))))

    rng = np.random.default_rng(2)
    random = (rng.standard_normal((20, LANES), np.float32), rng.uniform(-160, 130, (20, LANES)).astype(np.float32))
    for x, y in zip(*(np.concatenate(both) for both in zip(pairs(), random, strict=True)), strict=True):
        out = np.empty_like(x)
        call(functions(isa).of_two, b"scale2", x, y, out)
        with np.errstate(all="ignore"):
            same(out, np.array([scaled(*both) for both in zip(x, y, strict=True)], np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_of_two_the_second_is_the_maximum_unless_the_first_is_above(functions: Any, isa: str) -> None:
    for x, y in zip(*pairs(), strict=True):
        out = np.empty_like(x)
        call(functions(isa).of_two, b"max", x, y, out)
        same(out, np.where(x > y, x, y))
        call(functions(isa).of_two, b"unless below 1", x, y, out)
        same(out, np.where(x < 1, np.float32(0), y))


@pytest.mark.parametrize("isa", ISAS)
def test_powers_of_two_and_what_is_no_int32(functions: Any, isa: str) -> None:
    x = np.array([-127, -126, -1, 0, 1, 2, 126, 127, *[64] * 8], np.float32)
    out = np.empty_like(x)
    call(functions(isa).of_one, b"exp2i", x, out)
    same(out, np.where(x == -127, 0, np.exp2(x)).astype(np.float32))
    edges = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.4, -127.5, 126.5, 3e9, -3e9, INF, -INF, NAN, 2**31, 256]
    x = np.array(edges, np.float32)
    bytes_out = np.empty(LANES, np.int8)
    call(functions(isa).round_bytes, x, bytes_out)
    assert bytes_out.tolist() == [0, 2, 2, 0, -2, -2, 127, -128, 126, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("isa", ISAS)
def test_sums_across_a_vector_are_a_tree(functions: Any, isa: str) -> None:
    rng = np.random.default_rng(3)
    for x in rng.standard_normal((50, LANES), np.float32):
        total, highest, tree = np.empty(1, np.float32), np.empty(1, np.float32), x.copy()
        call(functions(isa).reductions, x, total, highest)
        while len(tree) > 1:
            tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
        same(total, tree)
        same(highest, x.max(keepdims=True))


@pytest.mark.parametrize("isa", ISAS)
def test_units_are_turned(functions: Any, isa: str) -> None:
    data = np.random.default_rng(4).integers(0, 2**32, (LANES, 40), np.uint32)
    for at in (0, 4, 3):  # bytes
        rows = (ctypes.c_void_p * LANES)(*(abi.address(row) for row in data))
        out = np.empty((LANES, LANES), np.uint32)
        call(functions(isa).transpose, rows, ctypes.c_int64(at), out)
        whole = data.view(np.uint8)[:, at : at + 4 * LANES].copy().view(np.uint32)
        np.testing.assert_array_equal(out, whole.T)


# Dots.


def quads(seed: int, lines: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned bytes [lines, LANES, 4], signed ones [lines, 4], the extremes among them."""
    rng = np.random.default_rng(seed)
    w = rng.integers(0, 256, (lines, LANES, 4), np.uint8)
    x = rng.integers(-128, 128, (lines, 4), np.int8)
    if seed % 3 == 0:
        w[:], x[:] = 255, (-128, 127)[seed % 2]
    return w, x


@pytest.mark.parametrize("isa", ISAS)
def test_dots_of_bytes_are_exact_and_wrap(functions: Any, isa: str) -> None:
    for seed in range(30):
        w, x = quads(seed)
        acc = np.random.default_rng(seed).integers(-(2**31), 2**31, LANES).astype(np.int32)
        acc[:4] = (2**31 - 1, -(2**31), 2**31 - 100, 0)
        expected = (acc + (w[0].astype(np.int64) * x[0]).sum(axis=1)).astype(np.int32)
        words = x.view(np.int32) if functions(isa).has_vnni() else x[0, [0, 2, 1, 3]].astype(np.int16).view(np.int32)
        call(functions(isa).dot_quads, acc, w, words)
        np.testing.assert_array_equal(acc, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_bytes_times_words_are_exact(functions: Any, isa: str) -> None:
    rng = np.random.default_rng(8)
    for x in (np.array([-32768, 32767, 1, -1]), *rng.integers(-32768, 32768, (20, 4))):
        line, acc = rng.integers(-128, 128, (LANES, 4), np.int8), rng.integers(-(2**29), 2**29, LANES, np.int32)
        expected = acc + line.astype(np.int64) @ x
        call(functions(isa).dot_words, acc, line, np.resize(x.astype(np.float32), LANES))
        assert (acc == expected).all()


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa == "avx512f"])
def test_dots_in_halves_saturate(functions: Any, isa: str) -> None:
    for seed in range(30):
        w, x = quads(seed)
        acc = np.arange(LANES, dtype=np.int32)
        products = (w[0].astype(np.int64) * x[0]).reshape(LANES, 2, 2).sum(axis=2)
        expected = acc + np.clip(products, -(2**15), 2**15 - 1).sum(axis=1)
        call(functions(isa).dot_halves, acc, w, x.view(np.int32))
        np.testing.assert_array_equal(acc, expected)


def bf16_values(rng: np.random.Generator, *shape: int, exponents: tuple[int, int] = (-8, 8)) -> np.ndarray:
    scale = np.exp2(rng.integers(*exponents, shape)).astype(np.float32)
    return (rng.standard_normal(shape, np.float32) * scale).astype(BFLOAT16)


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_dots_of_pairs_add_the_odd_product_first(functions: Any, isa: str) -> None:
    rng, other = np.random.default_rng(5), 0
    for exponents in ((-4, 4), (-8, 8), (-75, -50), (-130, -110)):  # at last, products and inputs are subnormal
        for _ in range(10):
            w, x = (bf16_values(rng, LANES, 2, exponents=exponents) for _ in range(2))
            acc = bf16_values(rng, LANES, exponents=(2 * exponents[0], 2 * exponents[1])).astype(np.float32)
            acc[0], w[1, 0], w[2, 1] = -1e-40, INF, NAN
            a, b = flushed(w.astype(np.float32)), flushed(x.astype(np.float32))

            def chain(order: tuple[int, int], acc: np.ndarray = acc, a: Any = a, b: Any = b) -> np.ndarray:
                sums = flushed(acc)
                for part in order:
                    sums = np.array([multiply_add(*three) for three in zip(sums, a[:, part], b[:, part], strict=True)])
                return sums

            expected = chain((1, 0))
            other += int((expected != chain((0, 1))).sum())
            call(functions(isa).dot_pairs, acc, w, x)
            same(acc, expected)
    assert other > 50, "no value tells one order from the other"


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_rounding_to_bf16(functions: Any, isa: str) -> None:
    rng = np.random.default_rng(6)
    ties = (rng.integers(0x0080, 0x7F00, 64, np.uint32) << 16 | 0x8000).view(np.float32)
    with np.errstate(over="ignore"):
        for x in in_vectors([*EDGES, *ties, *np.nextafter(ties, np.float32(0)), *rng.standard_normal(64)]):
            out = np.empty(LANES, np.uint16)
            call(functions(isa).store_bf16, x, out)
            same(out.view(BFLOAT16).astype(np.float32), flushed(x).astype(BFLOAT16).astype(np.float32))


# Tiles: odd shapes, and what lies around them.


def padded(rows: np.ndarray, fill: int) -> np.ndarray:
    """Rows of bytes in rows of 80, the rest and two rows more filled."""
    whole = np.full((len(rows) + 2, 80), fill, np.uint8)
    flat = rows.reshape(len(rows), -1).view(np.uint8)
    whole[: len(rows), : flat.shape[1]] = flat
    return whole


def multiply_tiles(library: Any, of_bytes: bool, a: np.ndarray, b: np.ndarray, c: np.ndarray, add: bool) -> np.ndarray:
    """a [rows, lines, ...], b [lines, LANES, ...] and c [rows, LANES], all of units of four bytes."""
    rows, lines = a.shape[:2]
    memory = padded(c, 0xEE)
    call(library.multiply_tiles, of_bytes, rows, lines, lines, padded(a, 0xFF), padded(b, 0xFF), memory,
         ctypes.c_int64(80), add)  # fmt: skip
    assert (memory[:rows, 64:] == 0xEE).all() and (memory[rows:] == 0xEE).all(), "written beside the tile"
    return memory[:rows, :64].copy().view(c.dtype)


@pytest.mark.parametrize("isa", AMX_ISAS)
@pytest.mark.parametrize(("rows", "lines"), [(1, 1), (5, 3), (16, 16), (16, 7), (2, 16)])
def test_tiles_of_bytes(functions: Any, isa: str, rows: int, lines: int) -> None:
    for seed in range(6):
        (w, _), x = quads(seed, lines), np.stack([quads(seed + 10 * r, lines)[1] for r in range(rows)])
        c = np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, LANES)).astype(np.int32)
        dots = np.einsum("kni,rki->rn", w.astype(np.int64), x.astype(np.int64))
        for add in (True, False):
            out = multiply_tiles(functions(isa), True, x, w, c, add)
            np.testing.assert_array_equal(out, (dots + c * add).astype(np.int32))


@pytest.mark.parametrize("isa", AMX_ISAS)
@pytest.mark.parametrize(("rows", "lines"), [(1, 1), (5, 3), (16, 16), (3, 16)])
def test_tiles_of_pairs_sum_even_and_odd_apart(functions: Any, isa: str, rows: int, lines: int) -> None:
    rng = np.random.default_rng(7)
    for exponents in ((-4, 4), (-75, -50)):
        a = bf16_values(rng, rows, lines, 2, exponents=exponents)
        b = bf16_values(rng, lines, LANES, 2, exponents=exponents)
        c = bf16_values(rng, rows, LANES, exponents=(2 * exponents[0], 2 * exponents[1])).astype(np.float32)
        c[0, 0] = 1e-40
        x, w, expected = flushed(a.astype(np.float32)), flushed(b.astype(np.float32)), np.empty_like(c)
        for r, n in np.ndindex(*c.shape):
            parts = [np.float32(0), np.float32(0)]
            for k, part in np.ndindex(lines, 2):
                parts[part] = multiply_add(parts[part], x[r, k, part], w[k, n, part])
            expected[r, n] = flushed(flushed(c[r, n]) + flushed(parts[0] + parts[1]))
        same(multiply_tiles(functions(isa), False, a, b, c, True), expected)


def refused(library: str) -> None:
    faulthandler.disable()
    memory = np.zeros((16, 80), np.uint8)
    call(ctypes.CDLL(library).multiply_tiles, 1, 4, 3, 4, memory, memory, memory, ctypes.c_int64(80), 0)


@pytest.mark.parametrize("isa", AMX_ISAS)
def test_shapes_that_do_not_fit_together_are_refused(functions: Any, isa: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=refused, args=(functions(isa)._name,))
    process.start()
    process.join()
    assert process.exitcode is not None and process.exitcode < 0, "not ended by a signal"
