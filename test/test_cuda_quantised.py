"""Quantised matrices on a GPU, in emulation and, with `pytest -m cuda`, on a real one: layout, products, embedding.

Only weights are quantised there. Tensor cores see x rounded to bf16, and of more than FEW rows the weights, too.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_cuda import emulated_devices
from harness import BFLOAT16_LIMIT, WIDTHS, Bench, assert_close, assert_same_bits, gpu_devices, normal
from test_quantised import random_quants

from engine import LLM, SamplingParams
from engine import layer as layers
from engine.abi import BFLOAT16, INT4, INT8, UINT4, UINT8
from engine.cuda.launches import n
from engine.cuda.panels import Panels
from engine.device import cuda
from engine.device.cuda import CUDADevice
from engine.ops.embedding import Embedding, embedding
from engine.ops.logits import Logits
from engine.ops.matmul import Linear, matmul
from engine.quantised import Format, QuantisedMatrix, format_of, quantise
from engine.verify import LOGIT_BOUND

BUNDLED = Path(__file__).parent.parent / "models"
DTYPES = (INT8, INT4, UINT8, UINT4)
GROUPS = (16, 32, 64, 128, 256)
ROWS = (*range(1, 10), 16, 33, 70)
SHAPES = (*((width, 33) for width in WIDTHS), *((17, width) for width in WIDTHS), (1, 1), (40, 400))
ROUNDING = 2.0**-8  # of a number to bf16, at most

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_group = pytest.mark.parametrize("group", GROUPS)


@pytest.fixture(params=["forwards", "backwards", pytest.param("gpu", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "gpu":
        return next(iter(gpu_devices()), None) or pytest.skip("no GPU")
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    return emulated_devices()[request.param == "backwards"]


def exact_product(x: np.ndarray, matrix: QuantisedMatrix) -> np.ndarray:
    return x.astype(np.float64) @ matrix[:].astype(np.float64).T


def assert_product(out: np.ndarray, x: np.ndarray, matrix: QuantisedMatrix, what: object, bias: Any = 0.0) -> None:
    """Within what roundings to bf16 may add up to, if all of them go the same way, and a little for sums in float32."""
    roundings = 1 if len(x) <= n.FEW else 2
    most = np.abs(x).astype(np.float64) @ np.abs(matrix[:].astype(np.float64)).T
    if matrix.minimums is not None:  # large terms may cancel in sums of float32
        terms = QuantisedMatrix(matrix.format, matrix.quants, abs(matrix.scales), abs(matrix.minimums))
        most += 1e-3 * (np.abs(x) @ terms[:].T)
    error = np.abs(out - (exact_product(x, matrix) + bias))
    assert out.shape == error.shape and (error <= (roundings * ROUNDING * 1.01 + 1e-5) * most + 1e-6).all(), what


@every_dtype
@every_group
def test_any_group_and_shape_as_misaligned_views(dtype: np.dtype, group: int, device: CUDADevice) -> None:
    rng = np.random.default_rng(0)
    for (outputs, inputs), rows in product(SHAPES, (5, 14)):
        x, matrix = normal(rng, rows, inputs), random_quants(rng, dtype, outputs, inputs, group)
        layer, bench = Linear([matrix], device=device), Bench(device, rows=rows)
        out = bench.output(outputs)
        bench.record(matmul, x=bench.view(x), weight=layer.matrices[0], bias=None, out=out)
        bench.run()
        assert_product(bench.result(out), x, matrix, (outputs, inputs, rows))


@every_dtype
@pytest.mark.parametrize("group", [16, 32, 128])
def test_any_number_of_rows(dtype: np.dtype, group: int, device: CUDADevice) -> None:
    """Up to FEW, a row's bits do not depend on the others."""
    rng = np.random.default_rng(1)
    x, matrix, bias = normal(rng, max(ROWS), 328), random_quants(rng, dtype, 71, 328, group), normal(rng, 71)
    layer = Linear([matrix], [bias], device=device)
    alone = layer.forward(x[:1])
    for rows in ROWS:
        out = layer.forward(x[:rows])
        assert_product(out, x[:rows], matrix, rows, bias)
        if rows <= n.FEW:
            assert_same_bits(out[:1], alone, rows)


@every_dtype
def test_more_lines_than_are_on_their_way_at_once(dtype: np.dtype, device: CUDADevice) -> None:
    """In decoding: a block's warps come round twice, and not all of them a second time."""
    rng = np.random.default_rng(11)
    for inputs in (2100, 2600):
        x, matrix = normal(rng, 3, inputs), random_quants(rng, dtype, 20, inputs, 32)
        assert_product(Linear([matrix], device=device).forward(x), x, matrix, inputs)


@pytest.mark.parametrize("name", ["int8", "int8-32", "int8-128", "int4", "int4-64", "int4-128"])
def test_what_weights_are_quantised_to(name: str, device: CUDADevice) -> None:
    """The squared error of a normal product is that of bf16."""
    rng = np.random.default_rng(2)
    parts, format = [normal(rng, rows, 512, dtype=BFLOAT16) for rows in (48, 30, 17)], format_of(name)
    assert format is not None
    matrix = quantise(np.concatenate(parts), format)
    layer = Linear(parts, dtype=name, device=device)
    for rows in (1, 8, 9):
        x = normal(rng, rows, 512)
        assert_close(layer.forward(x), exact_product(x, matrix), BFLOAT16_LIMIT, rows)
    assert (device.download(layer.matrices[0])[:] == matrix[:]).all()


@pytest.mark.parametrize("dtype", [INT8, INT4], ids=str)
@every_group
def test_a_single_input_gives_its_weights_exactly(dtype: np.dtype, group: int, device: CUDADevice) -> None:
    """Every quant of every output and input is where it belongs, for few rows; for many, up to the rounding to bf16."""
    matrix = random_quants(np.random.default_rng(3), dtype, 18, 150, group)
    layer, x = Linear([matrix], device=device), np.eye(150, dtype=np.float32) * 2
    few = np.concatenate([layer.forward(x[first : first + 8]) for first in range(0, 150, 8)])
    assert np.array_equal(few.T, matrix[:] * 2)
    assert np.array_equal(layer.forward(x).T, matrix[:].astype(BFLOAT16).astype(np.float32) * 2)


@every_dtype
def test_every_quant_is_widened_exactly(dtype: np.dtype, device: CUDADevice) -> None:
    count = 16 if dtype in (INT4, UINT4) else 256
    quants = np.arange(count, dtype=np.uint8)[:, None].repeat(16, axis=1)
    ones = np.ones((count, 1), np.float16)
    matrix = QuantisedMatrix(Format(dtype, 16), quants, ones, 3 * ones if dtype in (UINT8, UINT4) else None)
    layer = Linear([matrix], device=device)
    for rows in (1, 9):
        out = layer.forward(np.ones((rows, 16), np.float32))
        weights = matrix[:] if rows == 1 else matrix[:].astype(BFLOAT16).astype(np.float32)
        assert np.array_equal(out, np.tile(16 * weights[:, 0], (rows, 1)))


def test_rows_of_any_magnitude(device: CUDADevice) -> None:
    rng = np.random.default_rng(4)
    for dtype, magnitude in product((INT8, INT4), (0.0, 1e-35, 1e-20, 1e20, 1e36)):
        matrix = quantise(normal(rng, 32, 128), Format(dtype, 32))
        layer = Linear([matrix], device=device)
        for rows in (5, 9):
            x = (normal(rng, rows, 128) * magnitude).astype(np.float32)
            exact = exact_product(x, matrix)
            assert np.abs(layer.forward(x) - exact).max() <= 0.01 * np.abs(exact).max(), (dtype, magnitude, rows)


@every_dtype
def test_a_row_that_is_not_finite_spoils_only_itself(dtype: np.dtype, device: CUDADevice) -> None:
    rng = np.random.default_rng(5)
    layer = Linear([random_quants(rng, dtype, 40, 130, 32)], device=device)
    for rows in (8, 14):
        x = normal(rng, rows, 130)
        ill, sick = x.copy(), [3, 5, 7]
        ill[3, 129], ill[5, 0], ill[7, 64] = np.nan, np.inf, -np.inf
        out, fine = layer.forward(ill), np.delete(np.arange(rows), sick)
        assert_same_bits(out[fine], layer.forward(x)[fine], rows)
        assert not np.isfinite(out[sick]).any()


def test_no_inputs(device: CUDADevice) -> None:
    bias = normal(np.random.default_rng(6), 20)
    for name, rows in product(("int8", "int4", "auto"), (1, 5, 30)):
        layer = Linear([np.zeros((20, 0), BFLOAT16)], [bias], dtype=name, device=device)
        assert np.array_equal(layer.forward(np.zeros((rows, 0), np.float32)), np.tile(bias, (rows, 1)))
        assert device.download(layer.matrices[0])[:].shape == (20, 0)


@every_dtype
@pytest.mark.parametrize("group", [16, 32, 64])
def test_a_table_serves_embedding_and_logits(dtype: np.dtype, group: int, device: CUDADevice) -> None:
    rng = np.random.default_rng(7)
    for vocab_size, hidden in ((1, 1), (50, 72), (33, 130)):
        table, ids = random_quants(rng, dtype, vocab_size, hidden, group), rng.permutation(vocab_size).astype(np.int32)
        layer = Embedding(table, device=device)
        assert_same_bits(layer.forward(ids), table[ids], (vocab_size, hidden))
        assert_same_bits(device.download(layer.table)[ids], table[ids], (vocab_size, hidden))
        x, index = normal(rng, 13, hidden), np.array([12, 0, 7], np.int32)
        for wanted in (index, np.tile(index, 4)):
            assert_product(Logits(layer.table, device=device).forward(x, wanted), x[wanted], table, len(wanted))


def test_a_part_of_a_table_gives_zeros_for_other_ids(device: CUDADevice) -> None:
    table, ids = normal(np.random.default_rng(8), 40, 9), np.array([0, 12, 13, 39, 26], np.int32)
    layer, bench = Embedding(table[13:27], dtype="int8", device=device), Bench(device, rows=len(ids))
    out = bench.row_input(np.full((len(ids), 9), np.nan, np.float32))
    bench.record(embedding, token=bench.row_input(ids), table=layer.table, out=out, vocab_size=40, first_id=13, ids=14)
    bench.run()
    rounded, here = quantise(table, Format(INT8, 64))[ids], ((ids >= 13) & (ids < 27))[:, None]
    assert_same_bits(bench.result(out), np.where(here, rounded, np.float32(0)), "part")


def test_weights_are_loaded_in_pieces(device: CUDADevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few rows each, quantised where the CPU cuts them, with the next weight right behind them."""
    monkeypatch.setattr(layers, "DECODED", 1)
    rng = np.random.default_rng(9)
    values = [normal(rng, 70, 100), normal(rng, 37, 33)]
    weights = [layers.matrix("a", values[:1], "int4"), layers.matrix("b", values[1:], "int8")]
    seen: list[tuple[int, int]] = []
    device.load(weights, lambda done, total: seen.append((done, total)))
    for value, weight in zip(values, weights, strict=True):
        assert (device.download(weight)[:] == quantise(value, Format(weight.dtype, weight.group))[:]).all()
    assert seen[-1][0] == seen[-1][1] == sum(device.weight_bytes(weight) for weight in weights)


@pytest.mark.parametrize("name, dtype", [("tiny-qwen3", "int4"), ("tiny-llama", "int8")])
def test_a_model(name: str, dtype: str, device: CUDADevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are those of NumPy where that rounds no inputs to 8 bits, its tokens the CPU's up to near ties."""
    monkeypatch.setattr(cuda, "open_driver", lambda place: device.driver)
    model: dict[str, Any] = {"model": str(BUNDLED / name), "dtype": dtype, "max_seq_len": 128}
    with LLM(**model, device="cuda") as llm:
        assert llm.tokenizer is not None
        prompt = llm.tokenizer.encode("Once upon a time there was a girl.")
        ids = [*prompt, *llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)).token_ids]
        assert len(prompt) >= 9 and len(ids) == len(prompt) + 12, "rows of both kinds"
        logits = llm.logits(ids)
    with LLM(**model, device="cpu") as llm:
        of_cpu = llm.logits(ids)[len(prompt) - 1 : -1]
    monkeypatch.setattr("engine.ops.matmul.round_inputs", lambda x, group: x)
    with LLM(**model, device="numpy") as llm:
        exact = llm.logits(ids)
    assert np.abs(logits - exact).max() <= LOGIT_BOUND["bfloat16"] * exact.std()
    chosen = np.take_along_axis(of_cpu, np.array(ids[len(prompt) :])[:, None], axis=1)
    assert (of_cpu.max(axis=1, keepdims=True) - chosen).max() <= LOGIT_BOUND["quantised"] * exact.std()


# The host's side of the layout.


@every_dtype
@every_group
def test_panels_hold_a_matrix_and_zeros(dtype: np.dtype, group: int) -> None:
    rng = np.random.default_rng(10)
    for rows, inputs in ((1, 1), (16, 64), (17, 65), (40, 3 * group - 5), (5, 0), (0, 40)):
        matrix = random_quants(rng, dtype, rows, inputs, group)
        layout = Panels(matrix.format, inputs)
        panels = layout.pack(matrix)
        assert panels.shape == (-(-rows // n.PANEL), layout.bytes) and layout.bytes % 32 == 0
        found = layout.unpack(panels)
        assert np.array_equal(found.quants[:rows], matrix.quants) and not found.quants[rows:].any()
        assert np.array_equal(found[:rows], matrix[:])
        assert not found.scales[rows:].any()


def test_a_panel_is_little_more_than_its_quants() -> None:
    bits = {(INT8, 64): 8.25, (INT8, 128): 8.125, (INT4, 32): 4.5, (INT4, 128): 4.125, (UINT4, 32): 5}
    for format, of_a_weight in bits.items():
        assert Panels(Format(*format), 1024).bytes * 8 == n.PANEL * 1024 * of_a_weight
