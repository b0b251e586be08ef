"""The wheel's CUDA kernels: what setup.py puts there, and what tools.check_wheel says of what it finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.check_wheel import check_kernels

ROOT = Path(__file__).parent.parent
COMPILER = """#!/bin/sh
case "$*" in *$FAILS*) echo "fatal error" >&2; exit 1 ;; esac
for last; do :; done
echo kernels >"$last"
"""
# A stand-in for setuptools, which pip brings when it builds: setup.py is imported for one function.
SETUPTOOLS = """import sys, types
for name in ("setuptools", "command.build_py", "command.bdist_wheel", "errors"):
    parts = {part: object for part in ("Distribution", "build_py", "bdist_wheel", "CCompilerError", "FileError")}
    sys.modules["setuptools." * (name != "setuptools") + name] = types.SimpleNamespace(setup=lambda **_: 0, **parts)
"""


def native_of(tmp_path: Path, fails: str = "nothing") -> Path:
    """What setup.py adds to a package, with a stand-in for nvcc that fails where it is told a word. C is left out."""
    tree, package, nvcc = tmp_path / "tree", tmp_path / "package", tmp_path / "nvcc"
    shutil.copytree(ROOT / "native", tree / "native")
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tree)
    nvcc.write_text(COMPILER)
    nvcc.chmod(0o755)
    package.mkdir()
    shutil.copy(ROOT / "native" / "abi.h", package)  # with the libraries
    program = f"{SETUPTOOLS}\nfrom pathlib import Path; import setup; setup.add_kernels(Path({str(package)!r}))"
    environment = os.environ | {"NVCC": str(nvcc), "FAILS": fails, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("kernels will be built at first use" in done.stderr) == (fails != "nothing")
    return package


def packed(native: Path) -> Path:
    wheel = native.parent / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in native.rglob("*"):
            archive.write(file, f"engine/_native/{file.relative_to(native)}")
    return wheel


def test_kernels_and_their_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = native_of(tmp_path)
    check_kernels(packed(native), prebuilt=True)
    sources = list((ROOT / "native" / "cuda").glob("*.cu"))
    assert f"{len(sources)} files of prebuilt CUDA kernels, {8 * len(sources)} bytes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check_kernels(packed(native), prebuilt=False)


def test_an_nvcc_that_fails_leaves_the_sources(tmp_path: Path) -> None:
    native = native_of(tmp_path, fails="rope.cu")
    check_kernels(packed(native), prebuilt=False)
    with pytest.raises(SystemExit, match=r"kernels \[\]"):
        check_kernels(packed(native), prebuilt=True)
    (native / "cuda" / "quants.cuh").unlink()
    with pytest.raises(SystemExit, match="missing ..quants.cuh"):
        check_kernels(packed(native), prebuilt=False)


@pytest.mark.parametrize(("change", "named"), [
    (lambda native: (native / "drawing.h").unlink(), "missing ..drawing.h"),
    (lambda native: (native / "cuda" / "quants.cuh").unlink(), "missing ..quants.cuh"),
    (lambda native: (native / "cuda" / "rope.cu").write_text("changed"), "made of others ..cuda/rope.cu"),
    (lambda native: (native / "cuda" / "rope.fatbin").unlink(), "kernels"),
    (lambda native: (native / "cuda" / "built_from.txt").unlink(), "kernels"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, change: object, named: str) -> None:
    native = native_of(tmp_path)
    change(native)  # type: ignore[operator]
    with pytest.raises(SystemExit, match=named):
        check_kernels(packed(native), prebuilt=True)
