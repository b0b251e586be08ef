"""Persistent kernels, in emulation and, with `pytest -m cuda`, on a real GPU: the bits of separate launches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated_cuda import EmulatedDriver, RecordingDriver, emulated_devices, library
from harness import AttentionCase, AttentionRig, Bench, Part, assert_same_bits, gpu_devices, normal, sequences

from engine import LLM, SamplingParams, abi, runner
from engine.abi import BFLOAT16, FLOAT16, FLOAT32
from engine.cuda import cooperative
from engine.cuda.launches import Launch, n
from engine.cuda.persistent import first_reads, stage_of
from engine.device import Cancelled, TokenError, cuda
from engine.device.cuda import CUDADevice
from engine.errors import RillError
from engine.layer import matrix, vector
from engine.ops.embedding import embedding
from engine.ops.matmul import matmul
from engine.ops.rmsnorm import rmsnorm
from tools.golden_cases import CASES

MODELS = Path(__file__).parent.parent / "models"
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(temperature=1, seed=7, max_tokens=2, ignore_eos=True, logprobs=2)
PROMPTS = [[5, 6], [8], [10, 11], [14]]
ORDERS = ("forwards", "backwards", pytest.param("gpu", marks=pytest.mark.cuda))

needs_emulation = pytest.mark.skipif(not emulated_devices(), reason="no C++ compiler for the emulation")


@pytest.fixture(params=ORDERS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What device="cuda" opens, too; prompts are taken in steps of few rows."""
    monkeypatch.setattr(runner, "MAX_ROWS", n.FEW)
    if request.param == "gpu":
        return next(iter(gpu_devices()), None) or pytest.skip("no GPU")
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    found = emulated_devices()[request.param == "backwards"]
    monkeypatch.setattr(cuda, "open_driver", lambda place: found.driver)
    return found


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedDriver:
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    driver: Any = emulated_devices()[0].driver
    monkeypatch.setattr(cuda, "open_driver", lambda place: driver)
    monkeypatch.setattr(runner, "MAX_ROWS", n.FEW)
    driver.launched.clear()
    return driver


def launched(driver: Any) -> list[str]:
    """The kernels since the last call, as far as the emulation knows."""
    names = [launch.kernel for launch in getattr(driver, "launched", [])]
    if names:
        driver.launched.clear()
    return names


def persistent(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setenv("RILL_CUDA_PERSISTENT", str(int(yes)))


def results(model: Path, options: dict[str, Any]) -> list[Any]:
    """Tokens of a request, and of four at once, and their log probabilities."""
    with LLM(str(model), device="cuda", **{"max_seq_len": 64, "max_batch": 4, **options}) as llm:
        completions = [llm.generate([20], GREEDY), *llm.generate(PROMPTS, DRAWN)]
    return [(list(c.token_ids), c.logprobs) for c in completions]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("tiny-qwen3", {}), ("tiny-qwen3", {"dtype": "float32"}), ("tiny-qwen3", {"dtype": "int8"}),
    ("tiny-qwen3", {"kv_dtype": "int8"}), ("tiny-qwen3", {"attention": "streaming", "window": 8, "sink": 2}),
    ("tiny-llama", {}), ("tiny-llama", {"dtype": "int4"}), ("tiny-llama", {"max_seq_len": 2 * n.RANGE}),
]  # fmt: skip
BACKWARDS = OPTIONS[2:7:4]


def assert_same(model: Path, options: dict[str, Any], device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with and without persistent kernels, by fewer launches."""
    persistent(monkeypatch, False)
    launched(device)
    expected = results(model, options)
    apart = launched(device)
    persistent(monkeypatch, True)
    found = results(model, options)
    merged = launched(device)
    assert found == expected
    assert any(name.startswith("persistent") for name in merged) and len(merged) < len(apart) or not apart


@pytest.mark.parametrize("name, options, device", [
    *(pytest.param(*case, "forwards", id=f"{case}") for case in OPTIONS),
    *(pytest.param(*case, "backwards", id=f"{case} backwards") for case in BACKWARDS),
    *(pytest.param(*case, "gpu", id=f"{case} gpu", marks=pytest.mark.cuda) for case in OPTIONS),
], indirect=["device"])  # fmt: skip
def test_models_give_the_bits_of_separate_launches(
    name: str, options: dict[str, Any], device: CUDADevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(MODELS / name, options, device.driver, monkeypatch)


@pytest.mark.parametrize("name", ["qwen3-bias", "qwen2-yarn", "qwen3-mixed-shards"])
@pytest.mark.parametrize("device", ["forwards", pytest.param("gpu", marks=pytest.mark.cuda)], indirect=True)
def test_other_models(name: str, device: CUDADevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """f16, heads by themselves and by four, biases; weights of several dtypes, of which runs of stages end."""
    next(case for case in CASES if case.name == name).write(tmp_path)
    assert_same(tmp_path, {}, device.driver, monkeypatch)


@needs_emulation
@pytest.mark.parametrize("processors", [1, 4])
def test_any_number_of_blocks(processors: int, emulated: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedDriver, "processors", processors)
    assert_same(MODELS / "tiny-qwen3", {"dtype": "int8"}, emulated, monkeypatch)


STEPS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["persistent_bf16", "sample"]),
    ({"dtype": "int8"}, ["persistent_i8", "sample"]),
    ({"dtype": "int4"}, ["persistent_i4", "logits_few_i8", "sample"]),
    ({"attention": "standard"}, ["persistent_bf16", *["attention_bf16", "persistent_bf16"] * 4, "sample"]),
]


@needs_emulation
@pytest.mark.parametrize("options, names", STEPS, ids=lambda value: str(value))
def test_launches_of_a_step(
    options: dict[str, Any], names: list[str], emulated: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything up to the logits is one launch; what no stage can be stands between two."""
    persistent(monkeypatch, True)
    with LLM(str(MODELS / "tiny-qwen3"), device="cuda", max_seq_len=64, **options) as llm:
        assert llm.runner.config.num_hidden_layers == 4
        llm.generate([5], SamplingParams(temperature=0, max_tokens=1))
    assert launched(emulated) == names


@needs_emulation
def test_many_rows_are_launched_apart(emulated: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    persistent(monkeypatch, True)
    monkeypatch.setattr(runner, "MAX_ROWS", n.FEW + 1)
    with LLM(str(MODELS / "tiny-qwen3"), device="cuda", max_seq_len=64) as llm:
        llm.generate(list(range(5, 6 + n.FEW)), SamplingParams(temperature=0, max_tokens=1))
    assert not any(name.startswith("persistent") for name in launched(emulated))


LONG = (
    AttentionCase(3, 1, 40, (1100,), kind="streaming"),
    AttentionCase(5, 1, 8, (1200,), window=1050, sink=70, kind="streaming"),
    AttentionCase(2, 2, 64, (1030,), kind="streaming"),
)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_ranges_of_a_long_cache(dtype: np.dtype, device: CUDADevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges, then their merge; heads of a group by two where separate launches have them by four."""
    for case in LONG:
        data, outputs = sequences(case), []
        for persists in (False, True):
            monkeypatch.setattr(device, "persists", persists)
            rig = AttentionRig(device, case, dtype)
            rig.store(data, [Part(0, 0, case.lengths[0])])
            launched(device.driver)
            parts = [Part(0, first, first + 1) for first in (case.lengths[0] - 1, 1024, 3)]
            outputs.append([rig.run(data, [part])[0] for part in parts])
        for alone, merged, part in zip(*outputs, parts, strict=True):
            assert_same_bits(merged, alone, (case, part))
        assert {name[:10] for name in launched(device.driver)} <= {"persistent", "kv_store"}


# Stages of a plan by hand.


class Chain:
    """Embedding, a product of normed rows, and a norm, on a device of its own."""

    def __init__(self, driver: EmulatedDriver, persists: bool = True, width: int = 96, vocabulary: int = 7) -> None:
        self.device = CUDADevice(driver)
        self.device.persists = persists
        rng = np.random.default_rng(0)
        self.bench = bench = Bench(self.device, rows=2)
        table, norm = matrix("table", [normal(rng, vocabulary, width)]), vector("norm", normal(rng, width))
        self.token = bench.row_input(np.array([1, 2], np.int32))
        x, y, z = (bench.plan.new(width, self.token, name) for name in "xyz")
        out, weight = bench.output(width), matrix("w", [normal(rng, width, width)])
        bench.record(embedding, token=self.token, table=table, out=x, vocab_size=vocabulary, first_id=0, ids=vocabulary)
        bench.record(rmsnorm, x=x, weight=norm, out=y, groups=1, eps=1e-5)
        bench.record(matmul, x=y, weight=weight, bias=None, out=z)
        bench.record(rmsnorm, x=z, weight=norm, out=out, groups=1, eps=1e-5)
        self.out = out
        bench.plan.lower()

    def run(self, *tokens: int) -> np.ndarray:
        self.token.storage[: len(tokens)] = tokens
        self.bench.rows.storage[0] = len(tokens)
        self.bench.plan.run()
        return self.bench.result(self.out)


@needs_emulation
def test_a_token_outside_the_vocabulary() -> None:
    chain = Chain(EmulatedDriver(library()))
    expected = chain.run(1, 2)
    with pytest.raises(TokenError, match="row 1 "):
        chain.run(3, 7)
    assert_same_bits(chain.run(1, 2), expected, "the next replay starts afresh")
    assert set(launched(chain.device.driver)) == {"persistent_f32"}


@needs_emulation
def test_a_cancelled_step_is_run_again() -> None:
    driver = RecordingDriver()
    chain = Chain(driver)
    chain.device.cancel(True)
    with pytest.raises(Cancelled):
        chain.run(1, 2)
    assert launched(driver) == []
    chain.device.cancel(False)
    first = chain.run(1, 2)
    for _ in range(3):
        assert_same_bits(chain.run(1, 2), first, "recorded")
    assert launched(driver) == ["persistent_f32"] * 4 and driver.replays == 3


@needs_emulation
def test_steps_of_other_shapes_have_lists_of_their_own() -> None:
    """Launched, recorded and replayed, by turns."""
    apart, merged = Chain(EmulatedDriver(library()), persists=False), Chain(RecordingDriver())
    for tokens in [(1,), (2, 3), (4,), (5, 6), (1,), (2, 2)]:
        assert_same_bits(merged.run(*tokens), apart.run(*tokens), tokens)
    assert set(launched(merged.device.driver)) == {"persistent_f32"}


@needs_emulation
def test_profiles_are_taken_node_by_node(emulated: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    persistent(monkeypatch, True)
    with LLM(str(MODELS / "tiny-qwen3"), device="cuda", max_seq_len=64) as llm, llm.profile() as profile:
        llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=3))
    assert {op.op for op in profile.phases["decode"].by_op(None)} >= {"embedding", "matmul", "kv_store", "add_rmsnorm"}
    assert not any(name.startswith("persistent") for name in launched(emulated))


@needs_emulation
def test_blocks_that_do_not_run_together_are_reported() -> None:
    """The first waits for others, and they are not there."""
    chain = Chain(EmulatedDriver(library()))
    bind = chain.device.driver.bind
    chain.device.driver.bind = lambda launch, arguments: bind(launch._replace(together=False), arguments)  # type: ignore
    with pytest.raises(AssertionError, match="blocks wait for each other for ever"):
        chain.run(1, 2)


def test_launches_that_no_stage_can_be() -> None:
    op = SimpleNamespace(heads=8, kv_heads=2)
    for kernel in ("sample", "swiglu", "attention_bf16", "streaming_attention_wide_bf16", "matmul_many_bf16", "rope"):
        assert stage_of(Launch(kernel, (1, 1, 1), 32), (op,)) is None, kernel
    for kernel, kernels in (("logits_few_u4", set()), ("streaming_attention_one_i8", set()), ("logits_few_i4", {"i4"}),
                            ("streaming_attention_four_bf16", {"bf16", "i8", "i4"})):  # fmt: skip
        stage = stage_of(Launch(kernel, (1, 1, 1), 32), (op,))
        assert stage is not None and stage.kernels == kernels


def test_what_is_fetched_ahead() -> None:
    """Whole blocks only: nothing behind the end of a matrix."""
    dense = SimpleNamespace(weight_dtype=n.DTYPE_BF16, weight_group=0, out_width=38, x_width=33)
    assert first_reads(dense, False) == (4, 8 * 80, 0)
    assert first_reads(dense, True) == (2, 8 * 80, 19 * 80)
    quants = SimpleNamespace(weight_dtype=n.DTYPE_I4, weight_group=32, out_width=64, x_width=64)
    assert first_reads(quants, True) == (2, 512 + 2 * 32, 2 * (512 + 2 * 32))


# The driver's own calls.


def test_a_cooperative_launch() -> None:
    """What the driver is handed: the grid, and the kernel's two arguments by their addresses."""
    seen: list[Any] = []

    def load(module: Any, path: bytes) -> int:
        seen.append(path)
        return 0

    def get(function: Any, module: Any, name: bytes) -> int:
        seen.append(name)
        return 0

    def occupancy(blocks: Any, function: Any, threads: int, shared: int) -> int:
        seen.append(threads)
        blocks[0] = 2
        return 0

    def launch(function: Any, *rest: Any) -> int:
        *numbers, _, arguments = rest
        seen.append((numbers, *(abi.ffi.buffer(arguments[i], 24)[:] for i in range(2))))
        return 700 if seen.count(seen[-1]) > 1 else 0

    fake = SimpleNamespace(cuModuleLoad=load, cuModuleGetFunction=get, cuLaunchCooperativeKernel=launch,
                           cuOccupancyMaxActiveBlocksPerMultiprocessor=occupancy)  # fmt: skip
    kernels = cooperative.Cooperative(fake, [Path("x/persistent_i4.fatbin"), Path("x/rope.fatbin")], 132, 0)
    assert kernels.blocks("persistent_i4") == 264
    op, team = bytes(range(24)), bytes(range(24, 48))
    call = kernels.bind(Launch("persistent_i4", (264, 1, 1), n.THREADS, together=True), op + team)
    call()
    numbers = [264, 1, 1, n.THREADS, 1, 1, 0]
    assert seen == [b"x/persistent_i4.fatbin", b"persistent_i4", n.THREADS, (numbers, op, team)]
    with pytest.raises(RillError, match="the driver reports error 700"):
        call()
