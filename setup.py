"""Adds to the wheel what is not Python: the native libraries, abi.h, the CUDA kernels and the bundled model.

The rules for compiling are those of `make native`. Without a compiler or without make the wheel is pure and
says so in engine/_native/why_no_native.txt, which the engine repeats when it falls back to NumPy. A compile
that fails fails the build.

The sources of the CUDA kernels are always there, so that they can be built at first use (engine/cuda/kernels.py); what
`make cuda` builds of them is there, too, where nvcc is found. NVCC= by itself leaves it out.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, FileError

BUNDLED_MODEL = Path("models/tiny-qwen3")


def what_is_missing() -> str | None:
    """The tool that keeps the libraries from being built, None where they can be."""
    compiler = shlex.split(os.environ.get("CC", "cc"))[0]
    if shutil.which(compiler) is None:
        return f"no C compiler was found when Rill was installed ({compiler})"
    return None if shutil.which("make") else "make was not found when Rill was installed"


def build_native(folder: Path) -> None:
    """Fills `folder` with the libraries, or with the reason why there are none."""
    if reason := what_is_missing():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy("native/abi.h", folder)
        (folder / "why_no_native.txt").write_text(f"{reason}\n")
        return
    if make("native", folder):
        raise CCompilerError("`make native` failed; its messages stand above")


def make(target: str, folder: Path) -> int:
    """The exit status."""
    flags = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # an outer make's job slots do not reach through pip
    environment = {name: value for name, value in os.environ.items() if name not in flags}
    return subprocess.run(["make", target, f"LIBRARIES={folder}"], env=environment).returncode


def add_kernels(folder: Path) -> None:
    """Fills `folder` with the sources of the CUDA kernels, as they lie in native/, and with what can be built of them.
    An nvcc that fails, which many have without wanting a GPU, is no reason to fail."""
    (folder / "cuda").mkdir()
    for file in Path("native/cuda").iterdir():
        if file.suffix in (".cu", ".cuh", ".h", ".flags"):
            shutil.copy(file, folder / "cuda")
    shutil.copy("native/drawing.h", folder)
    if what_is_missing() is None and make("cuda", folder):
        for file in (folder / "cuda").glob("*.fatbin"):
            file.unlink()
        print("warning: `make cuda` failed; the CUDA kernels will be built at first use", file=sys.stderr)


class BuildPackage(build_py):
    def run(self) -> None:
        if self.editable_mode:
            super().run()
            build_native(Path("engine/_native"))
            return
        if not BUNDLED_MODEL.is_dir():
            raise FileError(f"{BUNDLED_MODEL} is missing")
        package = Path(self.build_lib)
        shutil.rmtree(package, ignore_errors=True)  # nothing of an earlier build
        super().run()
        build_native(package / "engine" / "_native")
        add_kernels(package / "engine" / "_native")
        shutil.copytree(BUNDLED_MODEL, package / "engine" / "_models" / BUNDLED_MODEL.name)


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        return what_is_missing() is None


class Wheel(bdist_wheel):
    """Any Python 3; this platform, or any where nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(distclass=Package, cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
