"""Where the kernels are: prebuilt by `make cuda`, or else built for the GPU at hand at first use.

What is built at first use is kept in the user's cache directory, in a folder whose name is a digest of all that decides
its content: sources, flags, compiler and GPU. Files are written beside their place and renamed, so that processes which
build at the same time do no harm; any may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from engine import abi, machine
from engine.errors import RillError
from engine.files.packed_cache import cache_directory

USUAL_HOME = "/usr/local/cuda"
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # what nvcc adds to its command line by itself


def prebuilt_kernels(arch: str) -> list[Path]:
    """What `make cuda` built that is of use to an architecture ("90a"). Raises RillError where there is nothing, or
    where it is of other sources than these."""
    folder = abi.LIBRARIES / "cuda"
    files = sorted(file for file in folder.glob("*.fatbin") if is_for(file, arch))
    if not files:
        raise RillError("no cuda device: its kernels have not been built (`make cuda`, which needs nvcc)")
    digests = _digests()
    built_from = _noted(folder / "built_from.txt")
    sources = {name for name in digests if name.endswith(".cu")}
    if not (sources <= built_from.keys() and built_from.items() <= digests.items()):
        raise RillError("no cuda device: its kernels were built from other sources: run `make cuda`")
    return files


def is_for(file: Path, arch: str) -> bool:
    """Whether a source, or what was built of it, is for an architecture; native/cuda/build.mk has the same rule."""
    return arch == "90a" or not file.stem.endswith("_hopper")


def _noted(file: Path) -> dict[str, str]:
    """Source -> SHA-256, as sha256sum writes them; nothing where there is no such file."""
    try:
        pairs = [line.split(maxsplit=1) for line in file.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        return {}
    return {pair[-1]: pair[0] for pair in pairs if pair}


def _digests() -> dict[str, str]:
    """Of everything that kernels may be made of."""
    folder = abi.SOURCES
    files = [*folder.glob("*.h"), *(file for file in (folder / "cuda").iterdir() if file.suffix != ".fatbin")]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.suffix in (".h", ".cuh", ".cu", ".flags")
    }


def find_nvcc() -> Path | None:
    """The system's, or else what PyPI's nvidia-cuda-nvcc installs."""
    if "NVCC" in os.environ:
        return system_nvcc()
    return system_nvcc() or _first(map(str, pip_files("*/bin/nvcc")))


def pip_files(pattern: str) -> list[Path]:
    """Of NVIDIA's packages, which share the folder `nvidia`; the newest first."""
    package = importlib.util.find_spec("nvidia")
    folders = package and package.submodule_search_locations or []
    return [file for folder in folders for file in sorted(Path(folder).glob(pattern), reverse=True)]


def system_nvcc() -> Path | None:
    """As native/cuda/build.mk looks for it: $NVCC (empty: none is wanted), the PATH, $CUDA_HOME, its usual home."""
    if "NVCC" in os.environ:
        return _first([os.environ["NVCC"]])
    homes = [home for home in (os.environ.get("CUDA_HOME"), USUAL_HOME) if home]
    return _first(["nvcc", *(f"{home}/bin/nvcc" for home in homes)])


def _first(commands: Iterable[str]) -> Path | None:
    return next((Path(found) for found in map(shutil.which, commands) if found), None)


def built_kernels(nvcc: Path, arch: str) -> list[Path]:
    """One file a source, for one architecture ("90a"), built now unless they are kept. Raises RillError with the
    reason where that fails."""
    try:
        folder = cache_directory() / "cuda" / _key(nvcc, arch)
        sources = sorted(file for file in (abi.SOURCES / "cuda").glob("*.cu") if is_for(file, arch))
        files = [folder / f"{source.stem}.fatbin" for source in sources]
        missing = [(source, file) for source, file in zip(sources, files, strict=True) if not file.exists()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            print(f"rill: building the CUDA kernels for sm_{arch} with {nvcc}; they will be kept in {folder}",
                  file=sys.stderr, flush=True)  # fmt: skip
            _build_all(nvcc, arch, missing)
        return files
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise RillError(f"no cuda device: its kernels cannot be built and kept: {reason}") from None


def _key(nvcc: Path, arch: str) -> str:
    version = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, errors="replace").stdout
    added = [os.environ.get(name, "") for name in NVCC_VARIABLES]
    described = json.dumps([_digests(), version, arch, added], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:40]


def _build_all(nvcc: Path, arch: str, work: list[tuple[Path, Path]]) -> None:
    with ThreadPoolExecutor(machine.available_cores()) as pool:
        try:
            list(pool.map(partial(_build, nvcc, arch), *zip(*work, strict=True)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _build(nvcc: Path, arch: str, source: Path, into: Path) -> None:
    folder = abi.SOURCES
    flags = ["-optf", f"{folder}/cuda/nvcc.flags", "-I", f"{folder}", "-I", f"{folder}/cuda"]
    code = f"arch=compute_{arch},code=sm_{arch}"
    handle, partial_name = tempfile.mkstemp(dir=into.parent, prefix=f"{into.stem}.", suffix=".part")
    os.close(handle)
    try:
        command = [str(nvcc), *flags, "-gencode", code, "-fatbin", str(source), "-o", partial_name]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RillError(f"no cuda device: its kernels cannot be built for sm_{arch}: {source.name}: "
                            f"{_reason(done)}")  # fmt: skip
        os.replace(partial_name, into)
    finally:
        Path(partial_name).unlink(missing_ok=True)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The first error that a compiler names, else the last thing that it says."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.I)]
    return [*errors[:1], *lines[-1:], f"nvcc ended with status {done.returncode}"][0]
