"""The cuda device: sampling in emulation, recorded replays, loading in pieces, and what it says when something is
missing."""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated_cuda import EmulatedDriver, RecordingDriver, emulated_devices, library
from harness import normal
from test_sample import every_request, requests, run

from engine import LLM, SamplingParams, abi
from engine.cuda import driver as cuda_driver
from engine.cuda.launches import Launch
from engine.cuda.program import CUDAProgram
from engine.device import Cancelled, NotFiniteError, Place, TokenError, cuda, open_device
from engine.device.cuda import CUDADevice
from engine.device.numpy import NumPyDevice
from engine.errors import RillError, UsageError
from engine.layer import matrix, plan_input
from engine.ops.embedding import Embedding
from engine.ops.sample import Samples
from engine.ops.swiglu import SwiGLU
from engine.plan import Plan

needs_emulation = pytest.mark.skipif(not emulated_devices(), reason="no C++ compiler for the emulation")
TINY = str(Path(__file__).parent.parent / "models" / "tiny-qwen3")


@needs_emulation
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 128, 129, 300, 5000, 151936])
def test_sampling_draws_as_numpy_means(vocab_size: int) -> None:
    expected = every_request(NumPyDevice, vocab_size)
    for device in emulated_devices()[: 2 if vocab_size < 1000 else 1]:
        found = every_request(partial(lambda d: d, device), vocab_size)
        for name, mine, theirs in zip(Samples._fields, found, expected, strict=True):
            if mine.dtype == np.int32:
                np.testing.assert_array_equal(mine, theirs, name)
            else:
                np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=2e-6, err_msg=name)


@needs_emulation
def test_failures_name_their_row() -> None:
    device = emulated_devices()[0]
    layer = Embedding(np.ones((4, 8), np.float32), device=device)
    with pytest.raises(TokenError, match="row 2 "):
        layer.forward(np.array([0, 3, 4], np.int32))
    assert (layer.forward(np.array([1], np.int32)) == 1).all(), "the next replay starts afresh"
    with pytest.raises(NotFiniteError) as raised:
        run(device, np.array([[0.0, 1.0], [0.0, np.nan]]), requests({}, {}))
    assert raised.value.row == 1


@needs_emulation
def test_weights_are_loaded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "STAGED", 100)
    device, values = emulated_devices()[0], normal(np.random.default_rng(0), 37, 9)
    for dtype in (abi.FLOAT32, abi.BFLOAT16, abi.FLOAT16):
        weight = matrix("w", [values.astype(dtype)])
        device.load([weight])
        assert (device.download(weight)[:] == values.astype(dtype).astype(np.float32)).all()
        assert (device.download(weight)[np.array([3, 36])] == values[[3, 36]].astype(dtype).astype(np.float32)).all()


@needs_emulation
def test_a_recorded_step_serves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = RecordingDriver()
    monkeypatch.setattr(cuda, "open_driver", lambda place: driver)
    tokens = []
    for device in ("cpu", "cuda"):
        with LLM(TINY, device=device, max_seq_len=64) as llm:
            prompt = "Once upon a time"
            tokens.append(list(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8)).token_ids))
    assert tokens[0] == tokens[1]
    assert driver.replays >= 5


class Twice:
    """A plan of two nodes on a device of its own, for as many of ten rows as it is run for."""

    def __init__(self) -> None:
        self.driver = RecordingDriver()
        self.device = CUDADevice(self.driver)
        self.plan, self.x = Plan(self.device), normal(np.random.default_rng(0), 10, 32)
        self.rows = plan_input(self.plan, np.array([10], np.int32), None, "rows")
        layers = [SwiGLU(device=self.device) for _ in range(2)]
        inner = layers[0].record(plan_input(self.plan, self.x, self.rows, "x"))
        self.out = self.plan.keep(layers[1].record(inner))
        self.plan.lower()

    def run(self, rows: int = 10) -> np.ndarray:
        self.rows.storage[0] = rows
        self.out.storage[:] = np.nan
        self.plan.run()
        return self.device.download(self.out)


@needs_emulation
def test_a_step_that_is_cancelled_while_it_is_recorded_is_recorded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = Twice()
    expected, record = twice.run(), twice.driver.record

    def cancelled(launches: Any) -> Any:
        twice.device.cancel(True)
        return record(launches)

    monkeypatch.setattr(twice.driver, "record", cancelled)
    with pytest.raises(Cancelled):
        twice.run()
    twice.device.cancel(False)
    assert (twice.run() == expected).all() and twice.driver.replays == 2


@needs_emulation
def test_a_step_that_is_cancelled_at_once_has_not_been_met() -> None:
    """Its launches may load something, which a recording must not."""
    twice = Twice()
    twice.device.cancel(True)
    with pytest.raises(Cancelled):
        twice.run()
    twice.device.cancel(False)
    for replays in (0, 1, 2):
        assert np.isfinite(twice.run()).all() and twice.driver.replays == replays


@needs_emulation
def test_steps_that_are_met_only_once_keep_none_from_being_recorded() -> None:
    twice = Twice()
    program = twice.plan.program
    assert isinstance(program, CUDAProgram)
    program.max_recorded = 2
    for rows in range(1, 8):
        twice.run(rows)
    expected = [twice.run(9) for _ in range(3)]
    assert twice.driver.replays == 2 and (expected[0] == expected[2]).all() and len(program.met) <= 2


@needs_emulation
def test_a_cancelled_step_leaves_no_failure_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CUDADevice(EmulatedDriver(library()))
    layer, fetch = Embedding(np.ones((4, 8), np.float32), device=device), device.driver.fetch

    def late(address: int, into: np.ndarray) -> None:
        """All is launched, and is waited for."""
        device.cancel(True)
        fetch(address, into)

    with monkeypatch.context() as patch, pytest.raises(Cancelled):
        patch.setattr(device.driver, "fetch", late)
        layer.forward(np.array([0, 9], np.int32))
    device.cancel(False)
    assert (layer.forward(np.array([0, 3], np.int32)) == 1).all()


# What is missing.


class FakeError(Exception):
    pass


def fake_cuda(**changed: Any) -> Any:
    """PyCUDA as far as opening a device goes."""

    def refuse(*_: Any) -> None:
        raise FakeError("cuModuleLoad failed: no kernel image is available")

    gpu = SimpleNamespace(
        retain_primary_context=lambda: SimpleNamespace(push=lambda: None, pop=lambda: None),
        compute_capability=lambda: (7, 5),
        name=lambda: "Old GPU",
    )
    device = type("Device", (), {"count": staticmethod(lambda: 1), "__new__": lambda cls, index: gpu})
    parts = {"init": lambda: None, "Error": FakeError, "MemoryError": FakeError, "Device": device,
             "module_from_file": refuse}  # fmt: skip
    return SimpleNamespace(**(parts | changed))


def use(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver) if driver else None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)


def test_without_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    with pytest.raises(RillError, match=r"device cuda needs PyCUDA: pip install 'rill-engine\[cuda\]'"):
        open_device("cuda")


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FakeError("cuInit failed: no CUDA-capable device is detected")

    use(monkeypatch, fake_cuda(init=fail))
    with pytest.raises(RillError, match="no cuda device: cuInit failed: no CUDA-capable device is detected"):
        open_device("cuda")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fake_cuda(Device=SimpleNamespace(count=lambda: 0)))
    with pytest.raises(RillError, match="no cuda device: this machine has no GPU"):
        open_device("cuda")


def test_without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And without a compiler; test_cuda_kernels.py has what comes of one."""
    use(monkeypatch, fake_cuda())
    monkeypatch.setenv("NVCC", "")
    monkeypatch.setattr(abi, "LIBRARIES", tmp_path)
    with pytest.raises(RillError, match="kernels have not been built"):
        open_device("cuda")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "rope.fatbin").write_bytes(b"")
    with pytest.raises(RillError, match="kernels were built from other sources: run `make cuda`"):
        open_device("cuda")
    monkeypatch.setattr(cuda_driver, "prebuilt_kernels", lambda arch: [tmp_path / "cuda" / "rope.fatbin"])
    with pytest.raises(RillError, match="no kernels for this GPU .sm_75.* CUBINS=75 cuda"):
        open_device("cuda")


def test_ranks_take_gpus_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that CUDA lets them see."""
    use(monkeypatch, fake_cuda(Device=SimpleNamespace(count=lambda: 2)))
    monkeypatch.setattr(cuda_driver, "PyCUDADriver", lambda cuda, index: SimpleNamespace(description=f"Card {index}"))
    described = [cuda_driver.open_driver(Place(rank, 3)).description for rank in range(3)]
    assert described == [f"Card {i}, GPU {i} of 2 by local rank" for i in (0, 1, 0)]
    assert cuda_driver.open_driver().description == "Card 0"


def test_a_context_is_current_once_in_each_thread_until_it_ends() -> None:
    calls: list[tuple[str, int]] = []
    context = SimpleNamespace(push=lambda: calls.append(("push", threading.get_ident())),
                              pop=lambda: calls.append(("pop", threading.get_ident())))  # fmt: skip
    local = threading.local()

    def enter() -> None:
        local.current = cuda_driver.Current(context)

    thread = threading.Thread(target=enter)
    thread.start()
    ident = thread.ident
    thread.join()
    assert calls == [("push", ident), ("pop", ident)]


def test_an_isa_is_refused() -> None:
    with pytest.raises(UsageError, match="isa 'avx2': the cuda device has none"):
        open_device("cuda", isa="avx2")


@needs_emulation
def test_too_large_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CUDADevice(EmulatedDriver(library()))
    monkeypatch.setattr(device.driver, "free_memory", lambda: 1 << 20)
    weight = matrix("w", [np.zeros((1 << 10, 1 << 10), np.float32)])
    with pytest.raises(RillError, match="GPU memory: 4,194,304 bytes are needed, 1,048,576 are free"):
        device.load([weight])


@needs_emulation
def test_limits_are_measured() -> None:
    device = emulated_devices()[0]
    assert device.read_limit(1 << 16) > 0 and device.multiply_limit(abi.FLOAT32, 1) > 0


# The emulation finds mistakes.


@needs_emulation
def test_emulation_refuses_what_no_gpu_takes() -> None:
    driver = EmulatedDriver(library())
    with pytest.raises(AssertionError, match="a launch that no GPU takes"):
        driver.bind(Launch("rope", (1, 1, 1), 2048), bytes(200))()
