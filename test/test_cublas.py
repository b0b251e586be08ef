"""Products by cuBLAS, for which native/cuda/emulated_cublas.cpp stands in: shapes, recorded steps, whole models, and
which library is taken."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated_cuda import CUBLAS, EmulatedDriver, RecordingDriver, emulated_cublas, library
from harness import MATMUL_CASES, Bench, normal, product_limit
from test_cuda_device import fake_cuda, use
from test_golden import LOGIT_TOLERANCE, golden
from test_matmul import assert_matmul, every_dtype, exact_matmul, scale_of

from engine import LLM
from engine.abi import BFLOAT16, FLOAT16, FLOAT32, ffi
from engine.cuda import cublas
from engine.cuda import driver as cuda_driver
from engine.cuda.cublas import CuBLAS
from engine.cuda.launches import Launch
from engine.device import cuda
from engine.device.cuda import CUDADevice
from engine.errors import RillError
from engine.ops.matmul import Linear, matmul
from engine.plan import Plan, Tensor
from engine.step import Step
from engine.verify import verify
from tools.golden_cases import CASES

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler for the emulation")
CASE = {case.name: case for case in CASES}


@pytest.fixture
def device() -> CUDADevice:
    found = emulated_cublas()
    assert found is not None
    return found


@pytest.fixture
def emulated() -> Any:
    """The emulation's own variables."""
    return ffi.dlopen(str(CUBLAS))


# Products.


@every_dtype
@pytest.mark.parametrize("biased", [False, True])
def test_every_shape_as_misaligned_views(device: CUDADevice, emulated: Any, dtype: np.dtype, biased: bool) -> None:
    rng = np.random.default_rng(0)
    for case in MATMUL_CASES:
        x, weight = normal(rng, 14, case.inputs), normal(rng, case.outputs, case.inputs, dtype=dtype)
        biases = [normal(rng, case.outputs)] if biased else []
        bench, before = Bench(device, rows=14), emulated.emulated_products
        layer, out = Linear([weight], biases, device=device), bench.output(case.outputs)
        bias = layer.biases[0] if biased else None
        bench.record(matmul, x=bench.view(x), weight=layer.matrices[0], bias=bias, out=out)
        bench.run()
        exact = exact_matmul(x, weight) + (biases[0] if biased else 0)
        assert_matmul(bench.result(out), exact, scale_of(x, weight), product_limit(device, dtype), case)
        assert emulated.emulated_products == before + 1


@every_dtype
def test_few_rows_and_no_inputs_are_the_kernels_own(device: CUDADevice, emulated: Any, dtype: np.dtype) -> None:
    before, x = emulated.emulated_products, normal(np.random.default_rng(1), 9, 40)
    layer = Linear([np.ones((20, 40), dtype)], device=device)
    for rows in (1, 2, 8):
        layer.forward(x[:rows])
    Linear([np.zeros((20, 0), dtype)], device=device).forward(np.zeros((9, 0), np.float32))
    Linear([np.ones((32, 40), np.float32)], dtype="int8", device=device).forward(x)
    assert emulated.emulated_products == before
    layer.forward(x)
    assert emulated.emulated_products == before + 1


def test_rows_that_f16_does_not_hold(device: CUDADevice) -> None:
    """Each judged by itself, the bias too; one that is not finite spoils no other."""
    rng = np.random.default_rng(2)
    magnitudes = np.array([1.0, 1e-30, 1e-7, 1e-3, 70_000, 1e10, 1e30, 0, 1, 2, 3])[:, None]
    x, weight, bias = normal(rng, 11, 72) * magnitudes, normal(rng, 50, 72, dtype=FLOAT16), normal(rng, 50)
    x = x.astype(np.float32)
    x[8, 3], x[9, 5] = np.nan, np.inf
    finite = np.isfinite(x).all(axis=1)
    bound = scale_of(x, weight) * 2.0**-11  # half of the last of f16's 11 bits, of each input
    for biases, added in (([], np.zeros(50)), ([bias], bias.astype(np.float64))):
        out = Linear([weight], biases, device=device).forward(x)
        error = np.abs(out - exact_matmul(x, weight) - added)
        assert (error <= bound + np.abs(added) * 2.0**-22)[finite].all(), np.max(error, axis=1)
        assert not np.isfinite(out[~finite]).any()


def test_what_cublas_reports_is_one_line(emulated: Any) -> None:
    device = CUDADevice(EmulatedDriver(library(), cublas=True))
    assert device.cublas is not None
    emulated.cublasSetStream_v2(device.cublas.handle, ffi.NULL)  # which takes the workspace away
    with pytest.raises(RillError, match=r"cuBLAS: .*: the resource allocation failed \(status 3\)$"):
        Linear([np.ones((8, 8), np.float32)], device=device).forward(np.ones((9, 8), np.float32))


# Steps.


class RecordingCuBLAS(CuBLAS):
    """Products are recorded like all launches."""

    def __init__(self, driver: RecordingDriver) -> None:
        super().__init__(str(CUBLAS), 0, driver.allocate)
        self.driver = driver

    def bind(self, *arguments: Any) -> Callable[[], None]:
        return self.driver.later(super().bind(*arguments))


@every_dtype
def test_a_recorded_step_is_for_its_own_number_of_rows(dtype: np.dtype) -> None:
    """Steps of 12 and of 15 rows in turn, each three times; nothing is allocated for any of them."""
    rng, driver = np.random.default_rng(3), RecordingDriver()
    driver.cublas = RecordingCuBLAS(driver)
    device = CUDADevice(driver)
    plan = Plan(device)
    step, weight, bias = Step(device, plan, 16, 1, 1), normal(rng, 40, 33, dtype=dtype), normal(rng, 40)
    layer = Linear([weight], [bias], device=device)
    x = Tensor((16, 33), FLOAT32, "x", plan, step.tensors["rows"])
    device.upload(x, normal(rng, 16, 33))
    out = plan.keep(layer.record(x))
    device.load([*layer.matrices, *layer.biases])
    plan.lower()
    memory = set(driver.memory)
    for rows in (12, 15) * 3:
        step.set_rows([0] * rows, [0] * rows, [0] * rows)
        values = normal(rng, 16, 33)
        driver.write(x.storage.address, values)
        out.storage[:] = np.nan
        plan.run()
        exact, scale = exact_matmul(values[:rows], weight) + bias, scale_of(values[:rows], weight)
        assert_matmul(device.download(out), exact, scale, product_limit(device, dtype), rows)
        assert np.isnan(out.storage.copy()[rows:]).all(), "rows beyond the step's are left alone"
    assert driver.replays == 4 and set(driver.memory) == memory


# Whole models.


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-bias", "qwen3-mqa"])  # bf16; f16 with biases; float32
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}], ids=["stored", "float32"])
def test_every_node_is_the_oracles(
    monkeypatch: pytest.MonkeyPatch, device: CUDADevice, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(cuda, "open_driver", lambda place: device.driver)
    CASE[name].write(tmp_path)
    emulated = ffi.dlopen(str(CUBLAS))
    before = emulated.emulated_products
    report = verify(str(tmp_path), list(range(20, 50)), gen_len=1, device="cuda", **options)
    assert report.passed, report.lines
    assert emulated.emulated_products > before


def test_prompt_logits_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, device: CUDADevice, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "open_driver", lambda place: device.driver)
    CASE["qwen3-bias"].write(tmp_path)
    stored = golden(CASE["qwen3-bias"])
    with LLM(str(tmp_path), device="cuda", dtype="float32", max_seq_len=512) as llm:
        logits = llm.logits(stored["prompt"].tolist())
    assert np.abs(logits[stored["rows"]] - stored["logits"]).max() <= LOGIT_TOLERANCE


# Which library is taken.


class Place:
    """Where pip would have put two libraries of other names, which nobody else has."""

    NAMES = ("librill_cublas.so.2", "librill_cublas.so.1")

    def __init__(self, folder: Path) -> None:
        self.files = [folder / "nvidia" / home / "lib" / name for home, name in zip("ab", self.NAMES, strict=True)]

    def add(self, index: int, works: bool = True) -> str:
        file = self.files[index]
        file.parent.mkdir(parents=True)
        shutil.copy(CUBLAS, file) if works else file.write_text("no library")
        return str(file)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    monkeypatch.delenv("RILL_CUBLAS", raising=False)
    monkeypatch.setattr(cublas, "NAMES", Place.NAMES)
    monkeypatch.syspath_prepend(tmp_path)
    return Place(tmp_path)


def opened() -> tuple[str | None, str]:
    """The file of the library that is found, and the phrase."""
    found, phrase = cublas.open_cublas(0, EmulatedDriver(library()).allocate)
    if found is None:
        return None, phrase
    found.close()
    return found.file, phrase


def test_none_is_found(place: Place) -> None:
    assert opened() == (None, "without cuBLAS (none was found)")


def test_the_newest_that_pip_installed(place: Place) -> None:
    older = place.add(1)
    assert opened() == (older, "cuBLAS 13.4")
    newer = place.add(0)
    assert opened() == (newer, "cuBLAS 13.4")


def test_the_loader_comes_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.add(0)
    monkeypatch.setattr(cublas, "NAMES", (str(CUBLAS), *Place.NAMES))
    assert opened() == (str(CUBLAS), "cuBLAS 13.4")


def test_one_that_cannot_be_loaded_is_passed_over(place: Place) -> None:
    broken = place.add(0, works=False)
    assert opened()[0] is None and f"without cuBLAS (cuBLAS: cannot load library '{broken}'" in opened()[1]
    older = place.add(1)
    assert opened() == (older, "cuBLAS 13.4")


@pytest.fixture
def fails(emulated: Any) -> Iterator[None]:
    """No handle is to be had."""
    emulated.emulated_status = 1
    yield
    emulated.emulated_status = 0


def test_without_a_handle_own_kernels_multiply(
    place: Place, monkeypatch: pytest.MonkeyPatch, fails: None
) -> None:
    """As on a GPU whose driver is older than the library."""
    monkeypatch.setattr(cublas, "NAMES", (str(CUBLAS),))
    reason = f"cuBLAS: {CUBLAS}: the library was not initialized (status 1)"
    assert opened() == (None, f"without cuBLAS ({reason})")
    monkeypatch.setenv("RILL_CUBLAS", str(CUBLAS))
    with pytest.raises(RillError) as raised:
        opened()
    assert str(raised.value) == reason


@pytest.mark.parametrize("none", ["", "0"])
def test_none_is_wanted(place: Place, monkeypatch: pytest.MonkeyPatch, none: str) -> None:
    place.add(0)
    monkeypatch.setenv("RILL_CUBLAS", none)
    assert opened() == (None, "without cuBLAS (RILL_CUBLAS)")


def test_one_is_named(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place.add(0)
    monkeypatch.setenv("RILL_CUBLAS", str(CUBLAS))
    assert opened() == (str(CUBLAS), "cuBLAS 13.4")
    monkeypatch.setenv("RILL_CUBLAS", "librill_none.so")
    with pytest.raises(RillError, match=r"^cuBLAS: cannot load library 'librill_none.so': [^\n]*No such file[^\n]*$"):
        opened()
    other = CUBLAS.with_name("libcuda_emulation.so")
    monkeypatch.setenv("RILL_CUBLAS", str(other))
    with pytest.raises(RillError, match=f"^cuBLAS: .*cublasCreate_v2.*{other.name}[^\n]*$"):
        opened()


def test_the_device_says_which_and_closes_it(monkeypatch: pytest.MonkeyPatch, emulated: Any) -> None:
    memory = type("Memory", (int,), {"free": lambda self: None})
    stream = SimpleNamespace(handle=0, synchronize=lambda: None)
    use(monkeypatch, fake_cuda(Stream=lambda: stream, mem_alloc=lambda size: memory(1 << 20)))
    monkeypatch.setattr(cuda_driver, "Graphs", lambda handle: None)
    monkeypatch.setattr(cuda_driver, "prebuilt_kernels", lambda arch: [])
    before = emulated.emulated_handles
    for setting, phrase in ((str(CUBLAS), "cuBLAS 13.4"), ("0", "without cuBLAS (RILL_CUBLAS)")):
        monkeypatch.setenv("RILL_CUBLAS", setting)
        driver: Any = cuda_driver.open_driver()
        assert driver.description == f"Old GPU (sm_75), {phrase}"
        assert emulated.emulated_handles == before + (setting != "0")
        driver.close()
        atexit.unregister(driver.close)
        assert emulated.emulated_handles == before


def test_limits_know_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """f16 weights meet tensor cores in cuBLAS alone."""
    timed: list[str] = []

    def time(device: CUDADevice, launch: Launch, numbers: list[int]) -> float:
        timed.append(launch.kernel)
        return 1.0

    monkeypatch.setattr(CUDADevice, "_least_seconds", time)
    for with_cublas in (False, True):
        for dtype in (FLOAT32, FLOAT16, BFLOAT16):
            CUDADevice(EmulatedDriver(library(), cublas=with_cublas)).multiply_limit(dtype)
    adds, tensors = "multiply_f32", "multiply_bf16"
    assert timed == [adds, adds, tensors, adds, tensors, tensors]
