"""Quantised matrices: what they round to, their products on every ISA, and models that are loaded in 8 and 4 bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROWS, WIDTHS, Bench, assert_close, assert_same_bits, cpu_devices, isa_pairs, normal
from harness import devices as every_device
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import LLM, RillError, SamplingParams, UsageError, abi
from engine.abi import BFLOAT16, INT4, INT8, UINT4, UINT8
from engine.device import Device
from engine.device.cpu import available_isas
from engine.ops.embedding import Embedding
from engine.ops.logits import Logits
from engine.ops.matmul import Linear, matmul
from engine.quantised import Format, QuantisedMatrix, format_of, quantise, round_inputs, stack
from engine.verify import verify

NAMES = ("int8", "int4", "int8-32", "int4-128")
every_name = pytest.mark.parametrize("name", NAMES)
PANEL = abi.constants.PANEL
LIMIT = 1e-10  # the rounding of inputs is part of the meaning
QWEN3 = Path(__file__).parent.parent / "models" / "tiny-qwen3"


def devices() -> list[Device]:
    """Those that have quantised weights."""
    return [device for device in every_device() if device.type in ("numpy", "cpu")]


def product(x: np.ndarray, weight: QuantisedMatrix) -> np.ndarray:
    return round_inputs(x, weight.group).astype(np.float64) @ weight[:].astype(np.float64).T


def named(name: str) -> Format:
    format = format_of(name)
    assert format is not None
    return format


# What a matrix becomes.


def test_names() -> None:
    assert named("int8") == Format(INT8, 64) and named("int4") == Format(INT4, 32)
    assert named("int4-128") == Format(INT4, 128) and format_of("int4-48") is format_of("float32") is None


@every_name
def test_what_is_quantised_is_within_half_a_step(name: str) -> None:
    weight = normal(np.random.default_rng(0), 40, 200)
    rounded = quantise(weight, named(name))
    step = np.repeat(np.abs(rounded.scales.astype(np.float32)), rounded.group, axis=1)[:, :200]
    assert rounded.shape == weight.shape and rounded.quants.max() <= (255 if rounded.dtype == INT8 else 15)
    inside = np.abs(rounded[:] - weight) <= 0.501 * step
    assert inside.mean() > (0.999 if rounded.dtype == INT8 else 0.97)  # least squares may cut off what is largest


def test_four_bits_are_better_than_plain_rounding() -> None:
    weight = normal(np.random.default_rng(1), 64, 256)
    groups = weight.reshape(64, 8, 32)
    scales = (np.abs(groups).max(axis=-1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint(groups / scales), -8, 7) * scales
    ours = quantise(weight, named("int4"))[:].reshape(groups.shape)
    assert np.square(ours - groups).sum() < 0.85 * np.square(plain - groups).sum()


def test_whole_numbers_stay_as_they_are() -> None:
    rng = np.random.default_rng(2)
    for name, most in (("int8", 127), ("int4", 7)):
        weight = rng.integers(-most, most + 1, (20, 192)).astype(np.float32)
        weight[:, ::32] = most if name == "int8" else -8
        assert np.array_equal(quantise(weight, named(name))[:], weight)


def test_the_smallest_scales_of_float16_do_not_cut_numbers_off() -> None:
    for size in (1e-5, 4e-6, 9e-5):
        weight = (np.linspace(-1, 1, 64) * size).astype(np.float32)[None]
        assert np.abs(quantise(weight, named("int8"))[:] - weight).max() <= 6e-8 * 127 / 2


def test_zeros_small_numbers_and_large_ones() -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1], weight[2], weight[3] = 1e-30, 6e4, np.linspace(-1, 1, 64)
    for name in NAMES:
        rounded = quantise(weight, named(name))[:]
        assert not rounded[0].any() and not rounded[1].any(), "float16 has no scale so small"
        assert np.abs(rounded[2:] - weight[2:]).max() <= 6e4 * (0.08 if "int4" in name else 0.005)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e9])
def test_what_has_no_place_is_refused(value: float) -> None:
    weight = np.ones((3, 40), np.float32)
    weight[2, 39] = value
    with pytest.raises(RillError, match="^blk.down: holds numbers that are not finite or too large"):
        quantise(weight, named("int8"), "blk.down")


@pytest.mark.parametrize("name", [f"int{bits}-{group}" for bits in (4, 8) for group in (32, 64, 128)])
def test_native_code_rounds_to_the_same_numbers(name: str) -> None:
    rng = np.random.default_rng(3)
    sizes = 10.0 ** rng.uniform(-9, 4, (300, 1))  # down to scales that are subnormal, or nothing, in float16
    heavy = rng.standard_t(2, (300, 333)).clip(-50, 50)
    for values in (normal(rng, 300, 333), (heavy * sizes).astype(np.float32), np.zeros((2, 5), np.float32),
                   np.full((1, 130), -3.0, np.float32), normal(rng, 3, 0), normal(rng, 40, 200)[:, 1::2]):
        expected = quantise(values, named(name))
        device: Any
        for device in cpu_devices():
            found = device.quantise(values, named(name), "w")
            assert np.array_equal(found.scales, expected.scales), device.description
            assert np.array_equal(found.quants, expected.quants), device.description


def test_native_code_refuses_the_same() -> None:
    device: Any = cpu_devices()[0]
    for value in (np.nan, np.inf, -np.inf, 1e9, -1e9):
        weight = np.ones((3, 40), np.float32)
        weight[1, 2] = value
        with pytest.raises(RillError, match="^blk.down: holds numbers that are not finite or too large"):
            device.quantise(weight, named("int4"), "blk.down")


# Products.


@every_name
def test_every_shape_as_misaligned_views(name: str) -> None:
    rng = np.random.default_rng(3)
    for outputs, inputs in (*((width, 33) for width in WIDTHS), *((17, width) for width in WIDTHS), (1, 1), (100, 400)):
        x, weight = normal(rng, 7, inputs), normal(rng, outputs, inputs)
        exact = product(x, quantise(weight, named(name)))
        for device in devices():
            layer, bench = Linear([weight], dtype=name, device=device), Bench(device, rows=7)
            out = bench.output(outputs)
            bench.record(matmul, x=bench.view(x), weight=layer.matrices[0], bias=None, out=out)
            bench.run()
            assert_close(bench.result(out), exact, LIMIT, (device.description, outputs, inputs))


@every_name
def test_any_number_of_rows_and_threads_has_the_bits_of_one(name: str) -> None:
    rng = np.random.default_rng(4)
    x, weight, bias = normal(rng, max(ROWS), 200), normal(rng, 72, 200), normal(rng, 72)
    for one, two in isa_pairs():
        layer, other = (Linear([weight], [bias], dtype=name, device=device) for device in (one, two))
        alone = np.concatenate([layer.forward(x[r : r + 1]) for r in range(20)])
        for rows in ROWS:
            many = layer.forward(x[:rows])
            assert_same_bits(many[:20], alone[:rows], (one.description, rows))
            assert_same_bits(other.forward(x[:rows]), many, (two.description, rows))


def random_quants(rng: np.random.Generator, dtype: np.dtype, rows: int, inputs: int, group: int) -> QuantisedMatrix:
    """As a file may hold them: any quant, any sign of a scale, minimums where the dtype has them."""
    shape = rows, -(-inputs // group)
    most = 16 if dtype in (INT4, UINT4) else 256
    minimums = normal(rng, *shape, dtype=np.dtype(np.float16)) if dtype in (UINT8, UINT4) else None
    return QuantisedMatrix(Format(dtype, group), rng.integers(0, most, (rows, inputs)).astype(np.uint8),
                           normal(rng, *shape, dtype=np.dtype(np.float16)), minimums)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 60), st.integers(1, 150), st.sampled_from([INT8, INT4, UINT8, UINT4]),
    st.sampled_from([16, 32, 64, 128, 256]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_quants(rows: int, outputs: int, inputs: int, dtype: np.dtype, group: int, seed: int) -> None:
    """Also the extremes of the dot instructions: quants of 255 with inputs of 127."""
    rng = np.random.default_rng(seed)
    x, matrix = normal(rng, rows, inputs), random_quants(rng, dtype, outputs, inputs, group)
    x[: rows // 2] = np.sign(x[: rows // 2])
    exact, scale = product(x, matrix), np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(matrix[:], axis=1)
    for device in devices():
        layer = Linear([matrix], device=device)
        assert (layer.matrices[0].dtype, layer.matrices[0].group) == (dtype, group)
        out = layer.forward(x)
        assert np.abs(out - exact).max(initial=0.0) <= 1e-5 * scale.max(initial=0.0), device.description
        assert np.array_equal(device.download(layer.matrices[0])[:outputs], matrix[:]), device.description


@pytest.mark.parametrize("group", [16, 32, 256])
@pytest.mark.parametrize("dtype", [INT8, INT4, UINT8, UINT4])
def test_many_rows_of_any_quants_have_the_bits_of_one(dtype: np.dtype, group: int) -> None:
    rng = np.random.default_rng(12)
    x, matrix = normal(rng, 37, 2 * group + 5), random_quants(rng, dtype, 56, 2 * group + 5, group)
    for device in cpu_devices():
        layer = Linear([matrix], device=device)
        alone = np.concatenate([layer.forward(row[None]) for row in x])
        for rows in (15, 16, 17, 32, 37):  # around the tiles of every ISA
            assert_same_bits(layer.forward(x[:rows]), alone[:rows], (device.description, rows))


def test_stacked_parts_of_several_formats() -> None:
    """q and k in one, v in another, as GGUF files have them: two products that write into one output."""
    rng = np.random.default_rng(11)
    x, sizes = normal(rng, 7, 256), (40, 20, 33)
    formats = (UINT4, 32), (UINT4, 32), (INT8, 16)
    matrices = [random_quants(rng, dtype, n, 256, group) for n, (dtype, group) in zip(sizes, formats, strict=True)]
    biases = [normal(rng, n) for n in sizes]
    exact = np.concatenate([product(x, matrix) for matrix in matrices], axis=1) + np.concatenate(biases)
    for device in devices():
        layer = Linear(matrices, biases, device=device)
        assert [weight.shape for weight in layer.matrices] == [(60, 256), (33, 256)]
        assert_close(layer.forward(x), exact, LIMIT, device.description)
        (one,) = Linear(matrices, dtype="int8", device=device).matrices
        assert (one.dtype, one.group) == (INT8, 64)


@pytest.mark.parametrize("dtype", [INT8, INT4, UINT8, UINT4])
@pytest.mark.parametrize("group", [16, 32, 256])
def test_the_largest_dots(dtype: np.dtype, group: int) -> None:
    """Every quant and every input at its largest: what is summed up in 16 bits meanwhile must hold it."""
    largest = 15 if dtype in (INT4, UINT4) else 255
    matrix = random_quants(np.random.default_rng(0), dtype, 20, 2 * group, group)
    matrix.quants[...] = largest
    for x in np.ones((2, 2 * group), np.float32), np.full((2, 2 * group), -1, np.float32):
        exact = product(x, matrix)
        for device in devices():
            assert_close(Linear([matrix], device=device).forward(x), exact, LIMIT, device.description)


def packed_panels(matrix: QuantisedMatrix) -> np.ndarray:
    """A packed matrix as native/quantised.h describes it: blocks of a head of float16 and lines of quads."""
    (rows, inputs), group, four_bits = matrix.shape, matrix.group, matrix.dtype in (INT4, UINT4)
    together = 1 if matrix.minimums is not None else 2  # groups to a block
    panels, blocks = -(-rows // PANEL), -(-inputs // (group * together))
    heads = np.zeros((panels * PANEL, blocks, 2), np.float16)
    scales_first = heads[:rows].reshape(rows, -1)  # of group after group, or each with its minimum
    for i, values in enumerate(a for a in (matrix.scales, matrix.minimums) if a is not None):
        scales_first[:, i :: 3 - together][:, : values.shape[1]] = values
    quants = np.zeros((panels * PANEL, blocks * together * group), np.uint8)
    quants[:rows, :inputs] = matrix.quants
    quads = quants.reshape(panels, PANEL, blocks, -1, 2 if four_bits else 1, 4)
    lines = quads[..., 0, :] | (quads[..., 1, :] << 4 if four_bits else 0)
    head = heads.reshape(panels, PANEL, blocks, 2).transpose(0, 2, 3, 1)
    parts = [np.ascontiguousarray(a).view(np.uint8).reshape(panels, blocks, -1)
             for a in (head, lines.transpose(0, 2, 3, 1, 4))]  # fmt: skip
    return np.concatenate(parts, axis=-1).reshape(-1)


@pytest.mark.parametrize("dtype", [INT8, INT4, UINT8, UINT4])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_every_byte_of_a_packed_matrix(dtype: np.dtype, group: int) -> None:
    """Also of inputs beyond k, groups without inputs and rows beyond n: zeros, whatever the memory held before."""
    rng = np.random.default_rng(9)
    for rows, inputs in ((16, 2 * group), (21, 2 * group), (1, 1), (33, group + 1), (17, 3 * group - 5), (5, 130)):
        matrix = random_quants(rng, dtype, rows, inputs, group)
        expected = packed_panels(matrix)
        arrays = [a for a in (matrix.quants, matrix.scales, matrix.minimums) if a is not None]
        pointers = [abi.ffi.cast("void *", abi.address(array)) for array in arrays] + [abi.ffi.NULL]
        for isa in available_isas():
            memory = np.full(expected.size, 0xFF, np.uint8)
            packed = abi.ffi.cast("void *", abi.address(memory))
            code, library = abi.DTYPE_CODES[dtype], abi.open_library(isa)
            library.pack_quantised(*pointers[:3], rows, inputs, code, group, packed)
            assert np.array_equal(memory, expected), (isa, rows, inputs)


def test_a_row_that_is_not_finite_spoils_only_itself() -> None:
    rng = np.random.default_rng(5)
    x, weight = normal(rng, 9, 130), normal(rng, 40, 130)
    ill = x.copy()
    ill[3, 129], ill[5, 0], ill[7, 64] = np.nan, np.inf, -np.inf
    for device in devices():
        layer = Linear([weight], dtype="int8", device=device)
        well, sick = layer.forward(x), layer.forward(ill)
        fine = [0, 1, 2, 4, 6, 8]
        if device.type == "cpu":
            assert_same_bits(sick[fine], well[fine], device.description)
        assert np.isnan(sick[[3, 5, 7]]).all(), device.description


def test_rows_of_any_magnitude() -> None:
    rng = np.random.default_rng(6)
    weight = quantise(normal(rng, 32, 128), named("int8"))
    for magnitude in (0.0, 1e-44, 1e-38, 1e-20, 1e20, 1e36):
        x = (normal(rng, 5, 128) * magnitude).astype(np.float32)
        for device in devices():
            layer = Linear([weight[:]], dtype="int8", device=device)
            exact = product(x, weight)
            assert np.abs(layer.forward(x) - exact).max() <= 1e-5 * np.abs(exact).max(), (device.description, magnitude)


def test_a_table_serves_embedding_and_logits_in_eight_bits() -> None:
    rng = np.random.default_rng(7)
    table, ids = normal(rng, 50, 72), np.array([49, 0, 16, 15, 31], np.int32)
    for name, group in (("int8", 64), ("int4", 64), ("int4-128", 128)):
        x, rounded = normal(rng, 3, 72), quantise(table, Format(INT8, group))
        for device in cpu_devices():
            layer = Embedding(table, dtype=name, device=device)
            assert_same_bits(layer.forward(ids), rounded[ids], device.description)
            out = Logits(layer.table, device=device).forward(x, np.array([2, 0], np.int32))
            assert_close(out, product(x, rounded)[[2, 0]], LIMIT, device.description)


def test_parts_are_stacked() -> None:
    rng = np.random.default_rng(8)
    parts = [normal(rng, n, 96, dtype=BFLOAT16) for n in (5, 30, 17)]
    whole = stack([quantise(part, named("int4")) for part in parts])
    x = normal(rng, 4, 96)
    for device in devices():
        out = Linear(parts, dtype="int4", device=device).forward(x)
        assert_close(out, product(x, whole), LIMIT, device.description)


# Models.


def divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of rows of logits, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (expected, actual))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize(("name", "bound"), [("int8", 5e-3), ("int4", 5e-2)])
def test_the_bundled_model_says_nearly_the_same(name: str, bound: float) -> None:
    text = "Once upon a time, there was a curious girl named Nora. She lived in a valley. Nora had a coat."
    with LLM(QWEN3, max_seq_len=128) as plain, LLM(QWEN3, dtype=name, max_seq_len=128) as small:
        assert plain.tokenizer is not None
        ids, real = plain.tokenizer.encode(text), plain.tokenizer.vocab_size
        logits = [llm.logits(ids)[:, :real].astype(np.float64) for llm in (plain, small)]
        assert 0 < divergence(*logits) < bound
        assert small.runner.weight_bytes < plain.runner.weight_bytes * (0.56 if name == "int8" else 0.45)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_models_hold_to_the_oracle_and_batches_to_single_prompts(name: str, tiny: Path) -> None:
    report = verify(str(tiny), [1, 5, 9, 3], gen_len=3, dtype=name)
    assert report.passed, report.lines
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts: list = [[3, 4, 5], [9], list(range(2, 40))]
    with LLM(tiny, dtype=name, max_seq_len=64, max_batch=3, threads=2) as llm:
        together = [done.token_ids for done in llm.generate(prompts, params)]
        assert together == [llm.generate(prompt, params).token_ids for prompt in prompts]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix")
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_forked_child_of_a_quantised_model_is_told_so(name: str, tiny: Path) -> None:
    """Whether it goes on with its parent's model or loads its own; and the parent generates as before."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options: dict = {"dtype": name, "max_seq_len": 32, "device": "cpu", "threads": 2}
    with LLM(tiny, **options) as llm:
        before = llm.generate([3, 4], params).token_ids
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(60)  # rather than to wait for ever
            for use in (lambda: llm.generate([3, 4], params), lambda: LLM(tiny, **options)):
                try:
                    use()
                except RillError as error:
                    os.write(writer, f"{error}\n".encode())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        os.close(writer)
        with os.fdopen(reader) as lines:
            said = lines.read().splitlines()
        assert len(said) == 2 and all(line.startswith("this process was forked") for line in said)
        assert llm.generate([3, 4], params).token_ids == before


def test_another_name_is_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"dtype 'int4-48': expected one of auto, float32, int8, int4"):
        LLM(tiny, dtype="int4-48")
