"""tools.compare_gpu: our side in emulation, with a stand-in where PyTorch would be."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from emulated_cuda import EmulatedDriver, emulated_cublas, emulated_devices, library

from engine.device.cuda import CUDADevice
from tools import compare_gpu
from tools.compare_gpu import Attention, Product


class Event:
    """Of a stream in which each call takes 2 ms."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Event) -> float:
        return 2.0


class Torch(SimpleNamespace):
    """As much of PyTorch as is asked for. calls: what it was asked to do, by which backend."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.backend: Any = None
        self.cuda = SimpleNamespace(Event=Event, is_available=lambda: True)
        self.version, self.__version__ = SimpleNamespace(cuda="13.0"), "2.13"
        self.bfloat16, self.inference_mode = "bf16", contextlib.nullcontext
        self.nn = SimpleNamespace(functional=SimpleNamespace(scaled_dot_product_attention=self.attend))
        backends = SimpleNamespace(FLASH_ATTENTION="flash", CUDNN_ATTENTION="cudnn")
        attention = SimpleNamespace(SDPBackend=backends, sdpa_kernel=self.forced)
        for name, module in (("torch", self), ("torch.nn", self.nn), ("torch.nn.attention", attention)):
            monkeypatch.setitem(sys.modules, name, module)

    def randn(self, *shape: int, dtype: str, device: str) -> Any:
        assert (dtype, device) == ("bf16", "cuda")
        return SimpleNamespace(shape=shape, t=lambda: SimpleNamespace(shape=shape[::-1]))

    @contextlib.contextmanager
    def forced(self, backend: str) -> Any:
        self.backend = backend
        yield
        self.backend = None

    def attend(self, *inputs: Any, is_causal: bool, enable_gqa: bool) -> None:
        if self.backend == "cudnn" and not is_causal:
            raise RuntimeError("No available kernel.\n Aborting execution.")
        self.calls.append((self.backend, [each.shape for each in inputs], is_causal, enable_gqa))

    def matmul(self, x: Any, weight: Any) -> None:
        self.calls.append((x.shape, weight.shape))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Torch:
    monkeypatch.setattr(compare_gpu, "ROUNDS", 3)
    monkeypatch.setattr(compare_gpu, "WARM", 1)
    return Torch(monkeypatch)


needs_emulation = pytest.mark.skipif(not emulated_devices(), reason="no C++ compiler for the emulation")


@needs_emulation
def test_rows_of_both(torch: Torch) -> None:
    cases: list[Attention | Product] = [Attention(4, 2, 70, 70), Attention(4, 2, 70, 1), Product("qkv", 5, 32, 48)]
    device = CUDADevice(EmulatedDriver(library()))
    device.driver.hopper = False
    rows = list(compare_gpu.compare(device, torch, cases))
    flash, cudnn = "PyTorch FLASH_ATTENTION", "PyTorch CUDNN_ATTENTION"
    assert [row["by"] for row in rows] == ["Rill", flash, cudnn, "Rill", flash, cudnn, "Rill", "cuBLAS"]
    for i, row in enumerate(rows):
        if row["by"] == "Rill":
            ours = row["seconds"]
            assert ours > 0 and row["times_ours"] == 1
        elif i != 5:
            assert row["seconds"] == 2e-3 and row["times_ours"] == 2e-3 / ours
    assert rows[5] == {"case": "decode, 4/2 heads, 70 keys", "by": cudnn, "seconds": None, "flops": None,
                       "times_ours": None, "refused": "No available kernel. Aborting execution."}  # fmt: skip
    assert rows[1]["flops"] == 4 * 4 * 128 * (70 * 71 // 2) / 2e-3
    assert rows[4]["flops"] == 4 * 4 * 128 * 70 / 2e-3 and rows[7]["flops"] == 2 * 5 * 32 * 48 / 2e-3
    keys = (1, 2, 70, 128)
    assert torch.calls == ([("flash", [(1, 4, 70, 128), keys, keys], True, True)] * 4
                           + [("cudnn", [(1, 4, 70, 128), keys, keys], True, True)] * 4
                           + [("flash", [(1, 4, 1, 128), keys, keys], False, True)] * 4
                           + [((5, 32), (32, 48))] * 4)  # fmt: skip
    lines = compare_gpu.table(rows).splitlines()
    assert len(lines) == 2 + 8 and f"| {flash} | 2.0000 |" in lines[3] and "refused: No available kernel" in lines[7]


def test_there_is_no_ratio_to_what_did_not_run() -> None:
    def refuse() -> Any:
        raise RuntimeError

    rows = list(compare_gpu.case_rows(Product("o", 1, 2, 3), {"Rill": refuse, "cuBLAS": lambda: lambda: 0.5}))
    assert [row["times_ours"] for row in rows] == [None, None]
    assert rows[0]["refused"] == "RuntimeError" and rows[1]["seconds"] == 0.5


def test_the_cases() -> None:
    names = [case.name for case in compare_gpu.attention_cases()]
    assert names[0] == "prefill, 16/16 heads, 1024 keys" and names[9] == "prefill, 64/8 heads, 16384 keys"
    assert names[10] == "decode, 64/8 heads, 2048 keys" and names[-1] == "decode, 64/8 heads, 131072 keys"
    assert [tuple(case) for case in compare_gpu.product_cases()] == [
        ("qkv", 2048, 1024, 4096), ("o", 2048, 2048, 1024), ("gate·up", 2048, 1024, 6144), ("down", 2048, 3072, 1024),
    ]  # fmt: skip


def test_without_pytorch_or_its_gpu(torch: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.is_available = lambda: False
    assert compare_gpu.beside_pytorch(None) == {"rows": [], "absent": "PyTorch 2.13 sees no GPU"}
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "no PyTorch" in compare_gpu.beside_pytorch(None)["absent"]


@needs_emulation
def test_prefill_by_both_kernels(torch: Torch) -> None:
    device: Any = emulated_devices()[0]
    rows = list(compare_gpu.compare(device, torch, [Attention(2, 1, 40, 40), Attention(2, 1, 40, 1)]))
    pytorch = [f"PyTorch {backend}" for backend in compare_gpu.BACKENDS]
    assert [row["by"] for row in rows] == ["Rill", "Rill by wgmma", *pytorch, "Rill", *pytorch]
    assert rows[1]["times_ours"] == rows[1]["seconds"] / rows[0]["seconds"]
    kernels = [launch.kernel for launch in device.driver.launched if "flash" in launch.kernel]
    assert kernels[-8:] == ["flash_attention_128"] * 4 + ["flash_attention_hopper_128"] * 4
    assert not device.hopper


@needs_emulation
def test_products_with_and_without_cublas(torch: Torch) -> None:
    device: Any = emulated_cublas()
    rows = list(compare_gpu.compare(device, torch, [Product("qkv", 9, 32, 48)]))
    assert [row["by"] for row in rows] == ["Rill", "Rill's own kernel", "cuBLAS"]
    assert rows[1]["times_ours"] == rows[1]["seconds"] / rows[0]["seconds"]
    kernels = [launch.kernel for launch in device.driver.launched[-8:]]
    assert kernels == ["matmul_round_bf16"] * 4 + ["matmul_many_bf16"] * 4
    assert device.cublas is device.driver.cublas
