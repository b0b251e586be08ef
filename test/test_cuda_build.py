"""Every kernel compiles for every GPU that is listed, without a warning. Skipped without nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import kernels_of

from engine.cuda.kernels import find_nvcc, prebuilt_kernels

ROOT = Path(__file__).parent.parent
NVCC = find_nvcc()
SOURCES = sorted((ROOT / "native" / "cuda").glob("*.cu"))
CUOBJDUMP = shutil.which("cuobjdump", path=f"{NVCC and NVCC.parent}{os.pathsep}{os.environ.get('PATH', '')}")
HOPPER = {source.stem for source in SOURCES if source.stem.endswith("_hopper")}

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
    assert {file.stem for file in prebuilt_kernels("90a")} == {source.stem for source in SOURCES}, "and none is stale"
    assert {source.stem for source in SOURCES} - {file.stem for file in prebuilt_kernels("80")} == HOPPER


def test_hoppers_kernels_are_built_for_it_alone() -> None:
    code = {"80": "arch=compute_80", "90a": "arch=compute_90a", "100": "arch=compute_100"}
    for cubins, built in (("80 90a 100", HOPPER), ("80 100", set())):
        commands = make("-nB", "cuda", f"CUBINS={cubins}").stdout.splitlines()
        targets = {Path(words[-1]).stem: words for words in map(str.split, commands) if "-fatbin" in words}
        assert {name for name in targets if name.endswith("_hopper")} == built
        assert len(targets) == len(SOURCES) - len(HOPPER) + len(built)
        for name, words in targets.items():
            found = {arch for arch, target in code.items() if any(word.startswith(f"{target},") for word in words)}
            assert found == ({"90a"} if name in HOPPER else set(cubins.split())), name


@pytest.mark.parametrize("name", sorted(HOPPER))
def test_hoppers_kernels_keep_everything_in_registers(name: str, tmp_path: Path) -> None:
    """No spills, and no products that wait for each other (C7510), no registers that stay where they were (C7508)."""
    flags = ["-optf", "native/cuda/nvcc.flags", "-Inative", "-Inative/cuda", "-Xptxas", "-v"]
    command = [str(NVCC), *flags, "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", f"native/cuda/{name}.cu"]
    said = subprocess.run([*command, "-o", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True).stderr
    kernels = kernels_of(ROOT / "native" / "cuda" / f"{name}.cu")
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels) > 0, said
    assert not re.search(r"C75\d\d", said), said


@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump")
def test_hopper_makes_weights_while_it_multiplies() -> None:
    """In the loop over pages, the powers come between the waits for the two products."""
    fatbin = ROOT / "engine" / "_native" / "cuda" / "flash_attention_hopper.fatbin"
    assert make("cuda").returncode == 0
    path = os.pathsep.join([str(Path(str(CUOBJDUMP)).parent), os.environ["PATH"]])  # it needs nvdisasm
    code = subprocess.run([str(CUOBJDUMP), "--dump-sass", str(fatbin)], capture_output=True, text=True, check=True,
                          env={**os.environ, "PATH": path}).stdout  # fmt: skip
    kernels = code.split("Function : ")[1:]
    assert len(kernels) == 2
    for kernel in kernels:
        after_keys = kernel.split("WARPGROUP.DEPBAR.LE gsb0, 0x1")
        assert len(after_keys) == 2 and after_keys[0].count("HGMMA") > 0
        assert after_keys[1].split("WARPGROUP.DEPBAR.LE gsb0, 0x0")[0].count("MUFU.EX2") == 2 * 64 // 4 + 2


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
