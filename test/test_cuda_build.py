"""Every kernel compiles for every GPU that is listed, without a warning. Skipped without nvcc."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated_cuda import kernels_of

from engine.cuda.kernels import find_nvcc, prebuilt_kernels

ROOT = Path(__file__).parent.parent
NVCC = find_nvcc()
SOURCES = sorted((ROOT / "native" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-f", "native/cuda/build.mk", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_kernel_for_every_gpu() -> None:
    """`make cuda`, which compiles nothing anew where nothing has changed."""
    result = make("cuda")
    assert result.returncode == 0, result.stdout + result.stderr
    for source in SOURCES:
        fatbin = (ROOT / "engine" / "_native" / "cuda" / f"{source.stem}.fatbin").read_bytes()
        missing = [name for name in kernels_of(source) if name.encode() not in fatbin]
        assert kernels_of(source) and not missing, f"{source.name}: {missing}"
    assert {file.stem for file in prebuilt_kernels()} == {source.stem for source in SOURCES}, "and none is stale"


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "warned.cu"
    source.write_text("__global__ void kernel(int *out) { int unused; *out = 1; }\n")
    flags = make("-pn", "cuda").stdout
    line = next(line for line in flags.splitlines() if line.startswith("NVCC_FLAGS := "))
    options = [word for word in line.removeprefix("NVCC_FLAGS := ").split() if not word.startswith(("code", "arch"))]
    options = [word for word in options if word != "-gencode"]
    result = subprocess.run([str(NVCC), *options, "-arch=sm_80", "-cubin", str(source), "-o", str(tmp_path / "out")],
                            cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert result.returncode != 0 and "unused" in result.stderr


def test_without_nvcc_it_says_so_and_succeeds() -> None:
    result = make("cuda", "NVCC=")
    assert result.returncode == 0 and "no nvcc" in result.stdout
