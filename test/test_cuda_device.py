"""The cuda device: sampling in emulation, recorded replays, loading in pieces, and what it says when something is
missing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated_cuda import EmulatedDriver, emulated_devices, library
from harness import normal
from test_sample import every_request, requests, run

from engine import LLM, SamplingParams, abi
from engine.cuda import driver as cuda_driver
from engine.cuda.launches import Launch
from engine.device import NotFiniteError, TokenError, cuda, open_device
from engine.device.cuda import CUDADevice
from engine.device.numpy import NumPyDevice
from engine.errors import RillError, UsageError
from engine.layer import matrix
from engine.ops.embedding import Embedding
from engine.ops.sample import Samples

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


class RecordingDriver(EmulatedDriver):
    """Records launches as a CUDA graph does: nothing runs while it records, and all of it when it is replayed."""

    records = True

    def __init__(self) -> None:
        super().__init__(library())
        self.recording: list[Callable[[], None]] | None = None
        self.replays = 0

    def bind(self, launch: Launch, arguments: bytes) -> Callable[[], None]:
        return self.later(super().bind(launch, arguments))

    def later(self, call: Callable[[], None]) -> Callable[[], None]:
        return lambda: call() if self.recording is None else self.recording.append(call)

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        calls: list[Callable[[], None]] = []
        self.recording = calls
        launches()
        self.recording = None

        def replay() -> None:
            self.replays += 1
            for call in calls:
                call()

        return replay


@needs_emulation
def test_a_recorded_step_serves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = RecordingDriver()
    monkeypatch.setattr(cuda, "open_driver", lambda: driver)
    tokens = []
    for device in ("cpu", "cuda"):
        with LLM(TINY, device=device, max_seq_len=64) as llm:
            prompt = "Once upon a time"
            tokens.append(list(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8)).token_ids))
    assert tokens[0] == tokens[1]
    assert driver.replays >= 5


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
    monkeypatch.setattr(cuda_driver, "prebuilt_kernels", lambda: [tmp_path / "cuda" / "rope.fatbin"])
    with pytest.raises(RillError, match="no kernels for this GPU .sm_75.* CUBINS=75 cuda"):
        open_device("cuda")


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
