"""What needs a GPU: `pytest -m cuda`. The tests of the ops run on it, too, wherever there is one (harness.devices)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    ATTENTION_CASES,
    CACHE_DTYPES,
    WEIGHT_DTYPES,
    AttentionCase,
    AttentionRig,
    Part,
    assert_close,
    assert_same_bits,
    error_limit,
    exact_attention,
    normal,
    product_limit,
    sequences,
)

from engine import LLM, SamplingParams, abi
from engine.device import open_device
from engine.device.cuda import CUDADevice
from engine.errors import RillError
from engine.ops.matmul import Linear
from engine.verify import verify

ROOT = Path(__file__).parent.parent
MODELS = ["tiny-qwen3", "tiny-llama"]


def why_not() -> str | None:
    try:
        open_device("cuda")
    except RillError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]


@pytest.fixture(scope="module")
def gpu() -> CUDADevice:
    device: Any = open_device("cuda")
    return device


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["standard", "flash", "streaming"])
def test_attention(gpu: CUDADevice, kind: str, dtype: np.dtype) -> None:
    for case in ATTENTION_CASES:
        data = sequences(case)
        outputs = AttentionRig(gpu, replace(case, kind=kind), dtype).run_whole(data)
        for output, sequence in zip(outputs, data, strict=True):
            assert_close(output, exact_attention(case, sequence, dtype), error_limit(gpu, dtype), case)


def test_attention_by_wgmma(gpu: CUDADevice) -> None:
    """All cases, and prompts that keep every processor busy for a while, in one step and in chunks."""
    if not gpu.driver.hopper:
        pytest.skip("this GPU is no Hopper")
    device = CUDADevice(gpu.driver)
    device.hopper = True
    long = (AttentionCase(16, 2, 64, (1500, 700)), AttentionCase(8, 8, 128, (1000, 1, 900), window=300),
            AttentionCase(8, 1, 96, (2000,)))  # fmt: skip
    for case in (replace(case, kind="flash") for case in (*ATTENTION_CASES, *long)):
        data = sequences(case)
        whole = AttentionRig(device, case, abi.BFLOAT16).run_whole(data)
        chunks = AttentionRig(device, case, abi.BFLOAT16).run_chunks(data, 450)
        for output, other, sequence in zip(whole, chunks, data, strict=True):
            exact = exact_attention(case, sequence, abi.BFLOAT16)
            assert_close(output, exact, error_limit(device, abi.BFLOAT16), case)
            assert_close(other, exact, error_limit(device, abi.BFLOAT16), case)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_decode_over_ranges(gpu: CUDADevice, dtype: np.dtype) -> None:
    for case in (AttentionCase(8, 2, 128, (3000,), kind="streaming"),
                 AttentionCase(8, 2, 64, (3000,), window=1500, sink=16, kind="streaming")):  # fmt: skip
        data = sequences(case)
        rig = AttentionRig(gpu, case, dtype)
        rig.store(data, [Part(0, 0, 3000)])
        for first in (2999, 1024, 5):
            output = rig.run(data, [Part(0, first, first + 1)])[0]
            exact = exact_attention(case, data[0], dtype)[first : first + 1]
            assert_close(output, exact, error_limit(gpu, dtype), (case, first))


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"attention": "streaming", "window": 32, "sink": 4},
                                     {"kv_dtype": "int8"}, {"attention": "standard"}, {"dtype": "int8"},
                                     {"dtype": "int4"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_every_node_is_the_oracles(name: str, options: dict[str, Any]) -> None:
    report = verify(str(ROOT / "models" / name), list(range(20, 120)), gen_len=4, device="cuda", **options)
    assert report.passed, report.lines


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_cpus(name: str) -> None:
    """In float32, where rounding turns no tie of a trained model."""
    greedy, tokens = SamplingParams(temperature=0, max_tokens=64), []
    for device in ("cpu", "cuda"):
        with LLM(str(ROOT / "models" / name), device=device, dtype="float32", max_seq_len=256) as llm:
            tokens.append(list(llm.generate("Once upon a time", greedy).token_ids))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_products_of_many_rows(gpu: CUDADevice, monkeypatch: pytest.MonkeyPatch, dtype: np.dtype) -> None:
    """By cuBLAS where it is, and by our own kernel."""
    rng = np.random.default_rng(0)
    for cublas in {gpu.cublas, None}:
        monkeypatch.setattr(gpu, "cublas", cublas)
        for rows, outputs, inputs in ((9, 33, 31), (100, 4096, 1024), (2048, 1000, 3072)):
            x, weight, bias = normal(rng, rows, inputs), normal(rng, outputs, inputs, dtype=dtype), normal(rng, outputs)
            out = Linear([weight], [bias], device=gpu).forward(x)
            exact = x.astype(np.float64) @ weight.astype(np.float64).T + bias
            assert_close(out, exact, product_limit(gpu, dtype), (gpu.description, cublas, rows))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_recorded_prompt_gives_the_bits_of_a_launched_one(dtype: str) -> None:
    """The first step is launched, the second recorded, the third replayed; lengths take turns."""
    with LLM(str(ROOT / "models" / "tiny-qwen3"), device="cuda", dtype=dtype, max_seq_len=256) as llm:
        prompts = [list(range(20, 20 + length)) for length in (60, 90)]
        first, second, third = ([llm.logits(prompt) for prompt in prompts] for _ in range(3))
    for a, b, c in zip(first, second, third, strict=True):
        assert_same_bits(b, a, "recorded")
        assert_same_bits(c, a, "replayed")


def test_limits(gpu: CUDADevice) -> None:
    """Plausible for any GPU: more than a CPU's, less than ten times the fastest's."""
    assert 1e11 < gpu.read_limit() < 1e14
    assert 1e12 < gpu.multiply_limit(abi.BFLOAT16) < 1e16
    assert 1e12 < gpu.multiply_limit(abi.FLOAT32) < 1e15


@pytest.mark.parametrize(
    "settings", [{}, {"RILL_CUDA_HOPPER": "1"}, {"RILL_CUDA_PERSISTENT": "1"}], ids=["", "wgmma", "persistent"]
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(gpu: CUDADevice, tool: str, settings: dict[str, str]) -> None:
    """A prompt of more than one tile, and some tokens."""
    if "RILL_CUDA_HOPPER" in settings and not gpu.driver.hopper:
        pytest.skip("this GPU is no Hopper")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    program = "from engine import LLM, SamplingParams as S; " \
              "print(LLM('models/tiny-qwen3', device='cuda').generate('Once ' * 99, S(max_tokens=4)).text)"  # fmt: skip
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    environment = os.environ | settings
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
