"""Installs the wheel in a fresh environment, far from the checkout, and generates: as built, and built pure.

    python -m tools.check_wheel dist

The folder holds what `make wheel` made: an sdist and the wheel built from it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from engine.cuda.kernels import system_nvcc

NATIVE = "engine/_native/"
PROMPT = "Once upon a time"
NEEDED = """engine/__init__.py engine/py.typed engine/_native/abi.h demo/infer.py tools/random_model.py
engine/_native/cuda/launch.h engine/_native/cuda/nvcc.flags
engine/_models/tiny-qwen3/config.json engine/_models/tiny-qwen3/tokenizer.json""".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one sdist")
    dist = parser.parse_args().dist.resolve()
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    check_contents(wheel, pure=False)
    check_kernels(wheel, prebuilt=system_nvcc() is not None)
    with tempfile.TemporaryDirectory(prefix="rill-wheel-") as scratch:
        room = Path(scratch)
        environment = clean_environment(room)
        run([sys.executable, "-m", "venv", "venv"], room, environment)
        pip = [str(room / "venv" / "bin" / "python"), "-m", "pip"]
        run([*pip, "install", "--quiet", str(wheel)], room, environment)
        native = generate(room, environment, 8)

        without_compiler = environment | {"CC": "no-such-compiler"}
        run([*pip, "wheel", "--quiet", "--no-deps", "-w", "pure", str(sdist)], room, without_compiler)
        (pure,) = (room / "pure").glob("*.whl")
        check_contents(pure, pure=True)
        check_kernels(pure, prebuilt=False)
        run([*pip, "install", "--quiet", "--no-deps", "--force-reinstall", str(pure)], room, environment)
        slow = generate(room, environment, 4)
    expect("no-such-compiler" not in native.stderr, "the compiled wheel speaks of a missing compiler", native)
    expect("no-such-compiler" in slow.stderr, "the pure wheel does not say why it runs on NumPy", slow)
    print(f"{wheel.name} and {pure.name}: installed and generated text outside the checkout")


def check_contents(wheel: Path, pure: bool) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in NEEDED if name not in names]
    libraries = [name for name in names if name.endswith(".so")]
    strays = [name for name in libraries if not name.startswith("engine/_native/libengine_")]
    strays += [name for name in names if name.split("/")[0] in ("test", "build", "native", "models")]
    if missing or strays or pure == bool(libraries) or pure != wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"{wheel.name}: missing {missing}, stray {strays}, libraries {libraries}")


def check_kernels(wheel: Path, prebuilt: bool) -> None:
    """The CUDA sources with all that they include; and, if prebuilt, what was made of each of just these sources."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name.removeprefix(NATIVE) for name in archive.namelist() if name.startswith(NATIVE)]
        files = {name: archive.read(NATIVE + name) for name in names if not name.endswith(".so")}
    sources = {name for name in files if name.endswith(".cu")}
    kernels = {name for name in files if name.endswith(".fatbin")}
    included = {name.decode() for text in files.values() for name in re.findall(rb'#include "([^"]+)"', text)}
    missing = sorted(name for name in included if not files.keys() & {name, f"cuda/{name}"})
    sums = [line.split() for line in files.get("cuda/built_from.txt", b"").decode().splitlines()]
    stale = [name for digest, name in sums if digest != hashlib.sha256(files.get(name, b"")).hexdigest()]
    wanted = {name.replace(".cu", ".fatbin") for name in sources} if prebuilt else set()
    if not sources or missing or stale or kernels != wanted or bool(sums) != prebuilt:
        sys.exit(f"{wheel.name}: CUDA sources {sorted(sources)}, missing {missing}, made of others {stale}, kernels "
                 f"{sorted(kernels)}")  # fmt: skip
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes; {len(kernels)} files of prebuilt CUDA kernels, "
          f"{sum(len(files[name]) for name in kernels):,} bytes unpacked")  # fmt: skip


def generate(room: Path, environment: dict[str, str], tokens: int) -> subprocess.CompletedProcess[str]:
    """Runs the installed `rill` and checks that it wrote text."""
    rill = str(room / "venv" / "bin" / "rill")
    result = run([rill, "-p", PROMPT, "-n", str(tokens), "--temperature", "0"], room, environment)
    expect(bool(result.stdout.strip()), "no text was generated", result)
    return result


def run(command: Sequence[str], room: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    nothing = subprocess.DEVNULL
    result = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, stdin=nothing)
    expect(result.returncode == 0, f"{' '.join(command)} ended with {result.returncode}", result)
    return result


def expect(condition: bool, problem: str, result: subprocess.CompletedProcess[str]) -> None:
    if not condition:
        sys.exit(f"{problem}\n{result.stdout}{result.stderr}")


def clean_environment(room: Path) -> dict[str, str]:
    """This one's, without anything that leads Python, make or the engine back to the checkout."""
    strays = ("PYTHON", "RILL", "MAKE", "MFLAGS", "VIRTUAL_ENV", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if not name.startswith(strays)}


if __name__ == "__main__":
    main()
