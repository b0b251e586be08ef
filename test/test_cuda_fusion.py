"""Fused nodes on a GPU, in emulation and, with `pytest -m cuda`, on a real one: which they are, and that they mean the
same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_cuda import EmulatedDriver, emulated_devices
from harness import (
    BFLOAT16_LIMIT,
    CACHE_DTYPES,
    FLOAT32_LIMIT,
    WEIGHT_DTYPES,
    Bench,
    assert_close,
    assert_same_bits,
    gpu_devices,
    normal,
    poison_cache,
)
from test_golden import LOGIT_TOLERANCE, golden
from test_quantised import random_quants

from engine import LLM, SamplingParams, runner
from engine.abi import DTYPE_CODES, INT4, INT8, UINT4, UINT8
from engine.cuda.launches import DTYPES, n
from engine.device import cuda
from engine.device.cuda import CUDADevice
from engine.kvcache import PAGE, cache_tensors
from engine.layer import Weight, matrix, plan_input, vector
from engine.ops.add_rmsnorm import add_rmsnorm
from engine.ops.kv_store import EVERY_PAGE, Ring, kv_store
from engine.ops.matmul import matmul
from engine.ops.rmsnorm import rmsnorm
from engine.ops.rope import rope
from engine.ops.swiglu import swiglu
from engine.plan import Tensor
from engine.quantised import QuantisedMatrix
from engine.verify import LOGIT_BOUND
from tools.golden_cases import CASES, SLIDING_CASES, GoldenCase

QUANTISED = (INT8, INT4, UINT8, UINT4)
QUANTISED_LIMIT = 3 * BFLOAT16_LIMIT  # a gate and an up of rounded inputs
EPS = 1e-5
TINY = str(Path(__file__).parent.parent / "models" / "tiny-qwen3")
ORDERS = ("forwards", "backwards", pytest.param("gpu", marks=pytest.mark.cuda))


@pytest.fixture(params=ORDERS)
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "gpu":
        return next(iter(gpu_devices()), None) or pytest.skip("no GPU")
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    return emulated_devices()[request.param == "backwards"]


@pytest.fixture(params=[True, False], ids=["fused", "alone"])
def fuses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RILL_CUDA_FUSION", str(int(request.param)))
    return request.param


def launched(device: CUDADevice, names: list[str]) -> None:
    """Asserts which kernels ran since the last call, as far as the emulation knows."""
    if isinstance(device.driver, EmulatedDriver):
        assert [launch.kernel for launch in device.driver.launched] == names
        device.driver.launched.clear()


def forget(device: CUDADevice) -> None:
    if isinstance(device.driver, EmulatedDriver):
        device.driver.launched.clear()


# Products.


@dataclass(frozen=True)
class Products:
    """x [rows, hidden] is normed and multiplied by [outputs, hidden], or by two of them, gate and up. inputs: of the
    product that is added to x before; 0: none is."""

    hidden: int
    outputs: int
    inputs: int
    gated: bool
    biased: bool = False
    group: int = 32

    @property
    def kernels(self) -> list[str]:
        fused = "rmsnorm_matmul_swiglu" if self.gated else "rmsnorm_matmul"
        return ["matmul_add", fused] if self.inputs else [fused]


PRODUCTS = (
    Products(33, 16, 0, gated=False),
    Products(72, 17, 5, gated=False, biased=True),
    Products(128, 33, 40, gated=False, group=16),
    Products(64, 48, 0, gated=True, biased=True),
    Products(40, 32, 72, gated=True, biased=True, group=128),
    Products(1100, 16, 31, gated=True),
    Products(2600, 16, 16, gated=False),  # a block's warps come round twice
)


def small_quants(rng: np.random.Generator, dtype: np.dtype, outputs: int, inputs: int, group: int) -> QuantisedMatrix:
    """Any quants, of which products are about as large as what is multiplied."""
    any_quants = random_quants(rng, dtype, outputs, inputs, group)
    most = 16 if dtype in (INT4, UINT4) else 256
    scales = (1 + np.abs(any_quants.scales)) / (most * inputs**0.5)
    minimums = None if any_quants.minimums is None else (any_quants.minimums / 8 - scales * most / 2).astype(np.float16)
    return QuantisedMatrix(any_quants.format, any_quants.quants, scales.astype(np.float16), minimums)


def weights_of(case: Products, dtype: np.dtype, rng: np.random.Generator) -> tuple[Any, Any]:
    """The weights of the product that is added and of the fused one, and what exactly they are."""

    def make(outputs: int, inputs: int) -> tuple[Weight, np.ndarray]:
        if dtype in QUANTISED:
            values: Any = small_quants(rng, dtype, outputs, inputs, case.group)
        else:
            values = (normal(rng, outputs, inputs) * inputs**-0.5).astype(dtype)
        return matrix("w", [values]), values[:].astype(np.float64)

    return make(case.hidden, max(case.inputs, 1)), make(case.outputs * (1 + case.gated), case.hidden)


@dataclass
class Run:
    """One case on a device: what came out, x, and what they should be."""

    out: np.ndarray
    x: np.ndarray
    exact_out: np.ndarray
    exact_x: np.ndarray


def run_products(device: CUDADevice, case: Products, dtype: np.dtype, rows: int) -> Run:
    rng = np.random.default_rng(case.hidden)
    x, a, norm = normal(rng, 14, case.hidden), normal(rng, 14, max(case.inputs, 1)), 1 + normal(rng, case.hidden) / 3
    (before, exact_before), (weight, exact_weight) = weights_of(case, dtype, rng)
    biases = [normal(rng, w.shape[0]) for w in (before, weight)]
    x, a = x[:rows], a[:rows]
    bench = Bench(device, rows)
    kept = bench.written(x) if case.inputs else bench.view(x)
    normed = bench.plan.new(case.hidden, kept, "normed")
    bias = [vector("bias", b) if case.biased else None for b in biases]
    if case.inputs:
        delta = bench.plan.new(case.hidden, kept, "delta")
        bench.record(matmul, x=bench.view(a), weight=before, bias=bias[0], out=delta)
        bench.record(add_rmsnorm, x=kept, delta=delta, weight=vector("norm", norm), out=normed, eps=EPS)
    else:
        bench.record(rmsnorm, x=kept, weight=vector("norm", norm), out=normed, groups=1, eps=EPS)
    out = bench.output(case.outputs)
    both = bench.plan.new(2 * case.outputs, kept, "gate|up") if case.gated else out
    bench.record(matmul, x=normed, weight=weight, bias=bias[1], out=both)
    if case.gated:
        bench.record(swiglu, x=both, out=out)
    forget(device)
    bench.run()
    exact_x = x.astype(np.float64)
    if case.inputs:
        exact_x = exact_x + a @ exact_before.T + (biases[0] if case.biased else 0)
    exact = exact_x / np.sqrt(np.mean(exact_x**2, axis=1, keepdims=True) + EPS) * norm @ exact_weight.T
    exact = exact + (biases[1] if case.biased else 0)
    if case.gated:
        gate, up = np.split(exact, 2, axis=1)
        exact = gate / (1 + np.exp(-gate)) * up
    return Run(bench.result(out), bench.result(kept), exact, exact_x)


@pytest.mark.parametrize("dtype", [*WEIGHT_DTYPES, *QUANTISED], ids=str)
def test_products(dtype: np.dtype, device: CUDADevice) -> None:
    limit = QUANTISED_LIMIT if dtype in QUANTISED else FLOAT32_LIMIT
    for case in PRODUCTS:
        for rows in (1, 3, n.FEW):
            run = run_products(device, case, dtype, rows)
            count = "few" if rows > 1 or dtype in QUANTISED else "one"
            launched(device, [f"{name}_{count}_{DTYPES[DTYPE_CODES[dtype]]}" for name in case.kernels])
            assert_close(run.out, run.exact_out, limit, (case, rows))
            assert_close(run.x, run.exact_x, limit, (case, rows))


@pytest.mark.parametrize("dtype", [*WEIGHT_DTYPES, *QUANTISED], ids=str)
def test_the_bits_of_a_row_do_not_depend_on_the_others(dtype: np.dtype, device: CUDADevice) -> None:
    for case in PRODUCTS[2:6:3]:
        alone = run_products(device, case, dtype, 1)
        for rows in range(2, n.FEW + 1):
            run = run_products(device, case, dtype, rows)
            assert_same_bits(run.out[:1], alone.out, (case, rows))
            assert_same_bits(run.x[:1], alone.x, (case, rows))


def test_many_rows_run_node_by_node(device: CUDADevice) -> None:
    case = PRODUCTS[4]
    run = run_products(device, case, INT8, n.FEW + 1)
    launched(device, ["matmul_many_i8", "add_rmsnorm", "matmul_many_i8", "swiglu"])
    assert_close(run.out, run.exact_out, QUANTISED_LIMIT, case)


def test_gate_and_up_that_share_a_panel_are_not_fused(device: CUDADevice) -> None:
    case = Products(64, 24, 0, gated=True)
    run = run_products(device, case, INT4, 2)
    launched(device, ["rmsnorm_matmul_few_i4", "swiglu"])
    assert_close(run.out, run.exact_out, QUANTISED_LIMIT, case)


class TestWhatIsNotFused:
    """A plan of an rmsnorm and a matmul with something in the way."""

    def bench(self, device: CUDADevice, width: int = 16) -> tuple[Bench, Tensor, Tensor, dict[str, Any], np.ndarray]:
        """A plan up to the norm: x, what comes of it, the product that is to follow, and what exactly that is."""
        rng = np.random.default_rng(3)
        x, norm, values = normal(rng, 2, 16), normal(rng, width), normal(rng, 16, 16)
        bench = Bench(device, rows=2)
        given = bench.view(x)
        normed = bench.plan.new(16, given, "normed")
        bench.record(rmsnorm, x=given, weight=vector("norm", norm), out=normed, groups=16 // width, eps=EPS)
        parts = x.astype(np.float64).reshape(2, -1, width)
        exact = (parts / np.sqrt(np.mean(parts**2, axis=2, keepdims=True) + EPS) * norm).reshape(2, 16) @ values.T
        return bench, given, normed, {"weight": matrix("w", [values]), "bias": None}, exact

    def assert_alone(self, bench: Bench, out: Tensor, exact: np.ndarray, *more: str) -> None:
        device: Any = bench.device
        forget(device)
        bench.run()
        launched(device, ["rmsnorm", "matmul_few_f32", *more])
        assert_close(bench.result(out), exact, FLOAT32_LIMIT, "product")

    def test_what_someone_else_reads(self, device: CUDADevice) -> None:
        bench, _, normed, product_, exact = self.bench(device)
        out, again = bench.output(16), bench.output(16)
        bench.record(matmul, x=normed, out=out, **product_)
        bench.record(matmul, x=normed, out=again, **product_)
        self.assert_alone(bench, again, exact, "matmul_few_f32")

    def test_what_is_kept(self, device: CUDADevice) -> None:
        bench, _, normed, product_, exact = self.bench(device)
        out = bench.output(16)
        bench.record(matmul, x=normed, out=out, **product_)
        bench.plan.keep(normed)
        self.assert_alone(bench, out, exact)
        assert np.isfinite(bench.result(normed)).all() and bench.result(normed).any()

    def test_a_norm_of_parts(self, device: CUDADevice) -> None:
        bench, _, normed, product_, exact = self.bench(device, width=8)
        out = bench.output(16)
        bench.record(matmul, x=normed, out=out, **product_)
        self.assert_alone(bench, out, exact)

    def test_a_product_of_some_columns(self, device: CUDADevice) -> None:
        bench, _, normed, _, _ = self.bench(device)
        out, values = bench.output(16), normal(np.random.default_rng(4), 16, 8)
        bench.record(matmul, x=normed.columns(8, 16), weight=matrix("w", [values]), bias=None, out=out)
        forget(device)
        bench.run()
        launched(device, ["rmsnorm", "matmul_few_f32"])

    def test_an_output_where_x_lay(self, device: CUDADevice) -> None:
        """x is not needed any more once it is normed: the product has its memory."""
        bench, given, normed, product_, exact = self.bench(device)
        out = bench.plan.keep(bench.plan.new(16, given, "out"))
        bench.record(matmul, x=normed, out=out, **product_)
        assert given.base is not None
        out.storage = given.base.storage.part(0, out.shape, out.dtype)
        self.assert_alone(bench, out, exact)

    def test_a_product_of_x_that_is_added_to_x(self, device: CUDADevice) -> None:
        rng = np.random.default_rng(5)
        x, values, norm = normal(rng, 2, 16), normal(rng, 16, 16), vector("norm", np.ones(16, np.float32))
        bench = Bench(device, rows=2)
        kept, out = bench.written(x), bench.output(16)
        delta, normed = (bench.plan.new(16, kept, name) for name in ("delta", "normed"))
        bench.record(matmul, x=kept, weight=matrix("w", [values]), bias=None, out=delta)
        bench.record(add_rmsnorm, x=kept, delta=delta, weight=norm, out=normed, eps=EPS)
        bench.record(matmul, x=normed, weight=matrix("w", [values]), bias=None, out=out)
        forget(device)
        bench.run()
        launched(device, ["matmul_few_f32", "add_rmsnorm", "matmul_few_f32"])
        assert_close(bench.result(kept), x + x.astype(np.float64) @ values.T, FLOAT32_LIMIT, "x")

    def test_part_of_a_group(self, device: CUDADevice) -> None:
        bench, _, normed, product_, exact = self.bench(device)
        out = bench.output(16)
        bench.record(matmul, x=normed, out=out, **product_)
        bench.plan.lower()
        forget(device)
        bench.plan.run(0, 1)
        bench.plan.run(1, 2)
        launched(device, ["rmsnorm", "matmul_few_f32"])
        assert_close(bench.result(out), exact, FLOAT32_LIMIT, "product")


# Heads.


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    head_dim: int
    normed: bool
    sinks: bool
    ring: Ring = EVERY_PAGE


SHAPES = ((3, 1, 8, EVERY_PAGE), (4, 2, 24, Ring(1, 2)), (2, 2, 80, EVERY_PAGE))
HEADS = (
    *(Heads(heads, kv_heads, head_dim, normed, sinks, ring)
      for (heads, kv_heads, head_dim, ring), normed, sinks in product(SHAPES, [True, False], [True, False])),
    Heads(5, 1, 128, normed=True, sinks=True),
)  # fmt: skip
TABLE = np.array([[3, 0, 5], [1, 4, 2]], np.int32)
POSITIONS = [PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 0, 1, 63, 130]  # pages begin, two rows in one, two sequences
SLOTS = [0, 0, 0, 0, 1, 1, 1, 1]


def run_heads(device: CUDADevice, case: Heads, dtype: np.dtype, rows: int, fused: bool) -> list[np.ndarray]:
    """q | k | v as they are afterwards, q as sinks see it, and the whole cache, byte by byte."""
    rng = np.random.default_rng(case.head_dim)
    q, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
    values = normal(rng, len(POSITIONS), q + 2 * kv)
    weights = [vector("norm", 1 + normal(rng, case.head_dim) / 3) for _ in "qk"]
    angles = [normal(rng, len(POSITIONS), case.head_dim)[:rows] for _ in range(2)]
    bench = Bench(device, rows)
    x = bench.written(values[:rows])
    edges = [x.column, x.column + q, x.column + q + kv, x.column + q + 2 * kv]
    queries, keys, v = (x.owner.columns(*edges[i : i + 2]) for i in range(3))
    cache = cache_tensors(1, 6, case.kv_heads, case.head_dim, dtype)[0]
    device.allocate([cache])
    poison_cache(cache)
    if case.normed:
        for part, weight in ((queries, weights[0]), (keys, weights[1])):
            bench.record(rmsnorm, x=part, weight=weight, out=part, groups=part.width // case.head_dim, eps=EPS)
    sink = bench.output(q)
    if case.sinks:
        bench.record(rope, x=queries, angles=bench.row_input(angles[0]), out=sink)
    both = x.owner.columns(edges[0], edges[2])
    bench.record(rope, x=both, angles=bench.row_input(angles[1]), out=both)
    pos, seq = (bench.row_input(np.array(each[:rows], np.int32)) for each in (POSITIONS, SLOTS))
    table = plan_input(bench.plan, TABLE, None, "page_table")
    bench.record(kv_store, k=keys, v=v, kv=cache, pos=pos, seq=seq, page_table=table,
                 head_dim=case.head_dim, kv_pages=6, **case.ring._asdict())  # fmt: skip
    forget(device)
    device.fuses = fused
    try:
        bench.run()
    finally:
        device.fuses = True
    alone = ["rmsnorm"] * 2 * case.normed + ["rope"] * case.sinks + ["rope", "kv_store"]
    launched(device, ["rmsnorm_rope_kv_store"] if fused else alone)
    return [bench.result(x), bench.result(sink), cache.storage.copy()]


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads(case: Heads, dtype: np.dtype, device: CUDADevice) -> None:
    """The same bits as node by node, in the whole cache, too."""
    for rows in (1, 2, 5, n.FEW) if case.head_dim < 128 else range(1, n.FEW + 1):
        alone, fused = (run_heads(device, case, dtype, rows, fused) for fused in (False, True))
        for name, one, other in zip(("q|k|v", "q_sink", "cache"), alone, fused, strict=True):
            assert_same_bits(other, one, (name, rows))


def test_wide_heads(device: CUDADevice) -> None:
    """Of more than 128 numbers a norm's sum is another's order: several warps have it where it is by itself."""
    for case in (Heads(2, 1, 256, True, True), Heads(1, 1, 130, True, False)):
        alone, fused = (run_heads(device, case, INT8, 3, fused)[0] for fused in (False, True))
        assert_close(fused, alone, FLOAT32_LIMIT, case)


@pytest.mark.parametrize("change", ["k elsewhere", "v within", "rope not in place"])
def test_heads_that_are_not_fused(change: str, device: CUDADevice) -> None:
    rng = np.random.default_rng(6)
    bench = Bench(device, rows=2)
    x, other = bench.written(normal(rng, 2, 32)), bench.written(normal(rng, 2, 24))
    at = x.column
    q_k, k, v = (x.owner.columns(at + a, at + b) for a, b in ((0, 24), (16, 24), (24, 32)))
    k = x.owner.columns(at + 8, at + 16) if change == "k elsewhere" else k
    v = x.owner.columns(at, at + 8) if change == "v within" else v
    cache = cache_tensors(1, 6, 1, 8, CACHE_DTYPES[0])[0]
    device.allocate([cache])
    out = other if change == "rope not in place" else q_k
    bench.record(rope, x=q_k, angles=bench.row_input(normal(rng, 2, 8)), out=out)
    pos, seq = (bench.row_input(np.array(each, np.int32)) for each in ([0, 1], [0, 0]))
    table = plan_input(bench.plan, TABLE, None, "page_table")
    bench.record(kv_store, k=k, v=v, kv=cache, pos=pos, seq=seq, page_table=table,
                 head_dim=8, kv_pages=6, **EVERY_PAGE._asdict())  # fmt: skip
    forget(device)
    bench.run()
    launched(device, ["rope", "kv_store"])


# Whole models.


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedDriver:
    """device="cuda" opens the emulation, which takes prompts in steps of few rows."""
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    driver: Any = emulated_devices()[0].driver
    monkeypatch.setattr(cuda, "open_driver", lambda place: driver)
    monkeypatch.setattr(runner, "MAX_ROWS", n.FEW)
    return driver


def test_launches_of_a_step(emulated: EmulatedDriver, fuses: bool) -> None:
    """Six a layer of Qwen3 instead of twelve; embedding and angles before, the last norm, logits and a draw after."""
    with LLM(TINY, device="cuda", max_seq_len=64) as llm:
        llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=1))
        emulated.launched.clear()
        llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=1))
        layers = llm.runner.config.num_hidden_layers
    assert len(emulated.launched) == 2 + (6 if fuses else 12) * layers + 3


CASE_OF = {case.name: case for case in (*CASES, *SLIDING_CASES)}


@pytest.mark.parametrize("name", ["qwen3-mqa", "qwen2-tied", "llama-bias", "qwen3-sliding"])
def test_logits_and_tokens_are_those_of_transformers(
    name: str, emulated: EmulatedDriver, fuses: bool, tmp_path: Path
) -> None:
    """Norms of heads and none; biases of q, k and v, of everything; windows and their rings."""
    case: GoldenCase = CASE_OF[name]
    case.write(tmp_path)
    stored = golden(case)
    with LLM(str(tmp_path), device="cuda", dtype="float32", max_seq_len=512) as llm:
        logits = llm.logits(stored["prompt"].tolist())
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        tokens = list(llm.generate(stored["prompt"].tolist(), greedy).token_ids)
    sampled = np.take_along_axis(logits, stored["sampled_ids"], axis=1)
    assert np.abs(logits[stored["rows"]] - stored["logits"]).max() <= LOGIT_TOLERANCE
    assert np.abs(sampled - stored["sampled_logits"]).max() <= LOGIT_TOLERANCE
    assert tokens == stored["tokens"].tolist()[:4]
    assert any(launch.kernel.startswith("rmsnorm_matmul_swiglu") for launch in emulated.launched) == fuses
    emulated.launched.clear()


@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"dtype": "int4"}, {"kv_dtype": "int8"},
                                     {"attention": "streaming", "window": 8, "sink": 2}], ids=str)  # fmt: skip
def test_fused_logits_are_those_of_one_node_after_the_other(options: dict[str, Any], emulated: EmulatedDriver) -> None:
    prompt = list(range(20, 32))
    found = []
    for fused in (True, False):
        device = CUDADevice(emulated)
        device.fuses = fused
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "CUDADevice", lambda _, device=device: device)
            with LLM(TINY, device="cuda", max_seq_len=64, **options) as llm:
                greedy = SamplingParams(temperature=0, max_tokens=3)
                found.append((llm.logits(prompt), llm.generate(prompt, greedy).token_ids))
    (logits, tokens), (alone, expected) = found
    bound = LOGIT_BOUND["quantised" if options.get("dtype") else "bfloat16"]
    assert np.abs(logits - alone).max() / alone.std() <= bound and tokens == expected
    assert not np.array_equal(logits, alone), "nothing was fused"


def test_times_of_fused_nodes(emulated: EmulatedDriver) -> None:
    """A group's time is that of its products and of kv_store; what has gone into them takes none."""
    with LLM(TINY, device="cuda", max_seq_len=64) as llm, llm.profile() as profile:
        llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=3))
    spent = {op.op for op in profile.phases["decode"].by_op(None)}
    assert not spent & {"swiglu", "rope", "rmsnorm"}
    assert spent >= {"matmul", "kv_store", "add_rmsnorm"}, "the last norm is launched by itself"
