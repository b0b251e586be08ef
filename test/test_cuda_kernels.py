"""Where the cuda device takes its kernels from: prebuilt, kept, or built at first use."""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from emulated_cuda import kernels_of
from test_cuda_device import FakeError, fake_cuda, use

from engine import abi
from engine.cuda import driver as cuda_driver
from engine.cuda import kernels
from engine.errors import RillError

ROOT = Path(__file__).parent.parent
NVCC = kernels.find_nvcc()

# Writes its own command line into what it is to make, slowly, and notes each call beside itself.
COMPILER = """#!/bin/sh
echo "$@" >>"$0.calls"
[ "$1" = --version ] && cat "$0.version" && exit
for last; do :; done
echo "$@" >"$last"
sleep 0.3
cat "$0.fails" >&2 2>/dev/null && exit 3
echo whole >>"$last"
"""


class Place(NamedTuple):
    """Where everything is in a test: sources, what `make cuda` built, the cache, a compiler."""

    sources: Path
    built: Path
    cache: Path
    nvcc: Path

    def build_before(self) -> list[Path]:
        """As `make cuda` leaves it."""
        self.built.mkdir(exist_ok=True)
        files = [self.built / f"{name}.fatbin" for name in ("matmul", "rope")]
        for file in files:
            file.write_text("prebuilt")
        named = ["cuda/matmul.cu", "cuda/rope.cu", "cuda/common.cuh", "cuda/nvcc.flags", "abi.h"]
        sums = [f"{hashlib.sha256((self.sources / name).read_bytes()).hexdigest()}  {name}\n" for name in named]
        (self.built / "built_from.txt").write_text("".join(sums))
        return files

    def kept(self) -> list[Path]:
        return sorted(file for file in self.cache.rglob("*") if file.is_file())

    def compiled(self) -> list[str]:
        """The sources that the compiler was called for."""
        calls = Path(f"{self.nvcc}.calls")
        text = calls.read_text() if calls.exists() else ""
        return sorted(re.findall(r"(\w+\.cu) -o", text))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path / "native", tmp_path / "cuda", tmp_path / "home" / "rill", tmp_path / "nvcc")
    (place.sources / "cuda").mkdir(parents=True)
    for name in ("cuda/matmul.cu", "cuda/rope.cu", "cuda/common.cuh", "cuda/nvcc.flags", "cuda/build.mk", "abi.h"):
        (place.sources / name).write_text(f"{name}\n")
    place.nvcc.write_text(COMPILER)
    place.nvcc.chmod(0o755)
    Path(f"{place.nvcc}.version").write_text("release 1.0\n")
    monkeypatch.setenv("NVCC", str(place.nvcc))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.cache.parent))
    monkeypatch.setattr(abi, "SOURCES", place.sources)
    monkeypatch.setattr(abi, "LIBRARIES", tmp_path)
    return place


def opened(monkeypatch: pytest.MonkeyPatch, suits: Any = lambda file: True, sm: tuple[int, int] = (7, 5)) -> list[Path]:
    """The kernels that a GPU ends up with. suits: whether it takes a file."""
    loaded: list[Path] = []

    def load(file: str) -> object:
        if not suits(Path(file)):
            raise FakeError("cuModuleLoad failed: no kernel image is available")
        loaded.append(Path(file))
        return object()

    stream = SimpleNamespace(handle=0, synchronize=lambda: None)
    fake = fake_cuda(module_from_file=load, Stream=lambda: stream)
    monkeypatch.setattr(fake.Device(0), "compute_capability", lambda: sm)
    use(monkeypatch, fake)
    monkeypatch.setattr(cuda_driver, "Graphs", lambda handle: None)
    monkeypatch.setenv("RILL_CUBLAS", "0")
    driver: Any = cuda_driver.open_driver()
    driver.close()
    atexit.unregister(driver.close)
    return loaded


def test_prebuilt_kernels_are_taken_as_they_are(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    files = place.build_before()
    assert opened(monkeypatch) == files
    assert place.compiled() == [] and place.kept() == []


def test_missing_kernels_are_built_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = opened(monkeypatch)
    assert [file.name for file in loaded] == ["matmul.fatbin", "rope.fatbin"] and loaded == place.kept()
    for file, source in zip(loaded, ("matmul.cu", "rope.cu"), strict=True):
        command, rest = file.read_text().split("\n", 1)
        sources = place.sources / "cuda"
        assert rest == "whole\n" and "-gencode arch=compute_75,code=sm_75 " in command
        assert f"-optf {sources}/nvcc.flags -I {place.sources} -I {sources} " in command
        assert f" -fatbin {sources}/{source} " in command
    said = capsys.readouterr().err.splitlines()
    assert said == [f"rill: building the CUDA kernels for sm_75 with {place.nvcc}; they will be kept in "
                    f"{loaded[0].parent}"]  # fmt: skip
    assert opened(monkeypatch) == loaded
    assert place.compiled() == ["matmul.cu", "rope.cu"] and not capsys.readouterr().err
    loaded[0].unlink()
    assert opened(monkeypatch) == loaded
    assert place.compiled() == ["matmul.cu", "matmul.cu", "rope.cu"], "what was deleted alone is built again"


@pytest.mark.parametrize("change", ["abi.h", "cuda/rope.cu", "cuda/common.cuh", "cuda/nvcc.flags", "new", "gone"])
def test_stale_kernels_are_built_anew(place: Place, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    files = place.build_before()
    if change == "new":
        (place.sources / "cuda" / "new.cu").write_text("")
    elif change == "gone":
        (place.sources / "cuda" / "rope.cu").unlink()
    else:
        (place.sources / change).write_text("changed")
    assert opened(monkeypatch) == place.kept() != files
    monkeypatch.setenv("NVCC", "")
    with pytest.raises(RillError, match="built from other sources: run `make cuda`"):
        opened(monkeypatch)


def test_what_is_no_source_makes_nothing_stale(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    files = place.build_before()
    (place.sources / "cuda" / "build.mk").write_text("changed")
    (place.sources / "simd.h").write_text("the CPU's")
    assert opened(monkeypatch) == files


def test_a_gpu_that_no_prebuilt_kernel_suits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    files = place.build_before()
    assert opened(monkeypatch, suits=lambda file: file not in files) == place.kept() != []
    with pytest.raises(RillError, match=rf"built for this GPU cannot be loaded \(sm_75, .*delete {place.cache}"):
        opened(monkeypatch, suits=lambda file: False)


def test_hopper_gets_its_own_instructions(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And, built before or now, kernels that are of no use to others."""
    (place.sources / "cuda" / "rope_hopper.cu").write_text("for sm_90a")
    assert "arch=compute_90a,code=sm_90a " in opened(monkeypatch, sm=(9, 0))[0].read_text()
    assert place.compiled() == ["matmul.cu", "rope.cu", "rope_hopper.cu"]
    assert [file.stem for file in opened(monkeypatch, sm=(10, 0))] == ["matmul", "rope"]
    files = [*place.build_before(), place.built / "rope_hopper.fatbin"]
    files[-1].write_text("prebuilt")
    with (place.built / "built_from.txt").open("a") as noted:
        source = place.sources / "cuda" / "rope_hopper.cu"
        noted.write(f"{hashlib.sha256(source.read_bytes()).hexdigest()}  cuda/{source.name}\n")
    assert opened(monkeypatch, sm=(9, 0)) == files
    assert opened(monkeypatch, sm=(10, 0)) == files[:-1]


def test_whatever_decides_the_kernels_is_in_the_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [kernels.built_kernels(place.nvcc, "80")[0].parent]

    def add(arch: str = "80") -> None:
        folders.append(kernels.built_kernels(place.nvcc, arch)[0].parent)

    add("89")
    for name in ("cuda/rope.cu", "cuda/common.cuh", "cuda/nvcc.flags", "abi.h"):
        (place.sources / name).write_text("changed")
        add()
    Path(f"{place.nvcc}.version").write_text("release 1.1\n")
    add()
    for variable in kernels.NVCC_VARIABLES:
        monkeypatch.setenv(variable, "-lineinfo")
        add()
    assert len(set(folders)) == len(folders) == 9
    assert len(place.kept()) == 18


def test_a_compiler_that_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(f"{place.nvcc}.fails").write_text("In file included from rope.cu:1:\nrope.cu(7): error: no such type\nmore\n")
    reason = r"kernels cannot be built for sm_75: (matmul|rope).cu: rope.cu\(7\): error: no such type$"
    with pytest.raises(RillError, match=reason):
        opened(monkeypatch)
    assert place.kept() == [], "nothing half-written"
    Path(f"{place.nvcc}.fails").write_text("")
    with pytest.raises(RillError, match="nvcc ended with status 3$"):
        opened(monkeypatch)


def test_a_compiler_that_cannot_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.nvcc.write_text("#!/no/such/interpreter\n")
    with pytest.raises(RillError, match="cannot be built and kept: .*No such file or directory"):
        opened(monkeypatch)


def test_a_cache_that_cannot_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.cache.parent.write_text("a file")
    with pytest.raises(RillError, match=rf"cannot be built and kept: {place.cache}.*: Not a directory$"):
        opened(monkeypatch)


def test_processes_that_build_at_the_same_time(place: Place) -> None:
    program = "import sys; from pathlib import Path; from engine import abi; from engine.cuda import kernels; " \
              f"abi.SOURCES = Path({str(place.sources)!r}); " \
              f"files = kernels.built_kernels(Path({str(place.nvcc)!r}), '80'); " \
              "sys.exit(not all(file.read_text().endswith('whole\\n') for file in files))"  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: subprocess.run(command, env=environment).returncode, range(3)))
    assert codes == [0, 0, 0]
    assert [file.name for file in place.kept()] == ["matmul.fatbin", "rope.fatbin"]


# Finding the compiler.


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def make_finds() -> str:
    command = ["make", "-s", "-f", "native/cuda/build.mk", "--eval", "found:; @echo '$(NVCC)'", "found"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last place to the first; make looks there, too, but for what pip installs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "sh", "echo"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tools))
    by_pip = executable(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(kernels, "USUAL_HOME", str(tmp_path / "usual"))
    assert kernels.find_nvcc() == by_pip and kernels.system_nvcc() is None
    usual = executable(tmp_path / "usual" / "bin" / "nvcc")
    assert kernels.find_nvcc() == usual
    home = executable(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert kernels.find_nvcc() == home and make_finds() == str(home)
    on_path = executable(tmp_path / "first" / "nvcc")
    monkeypatch.setenv("PATH", f"{on_path.parent}:{tools}")
    assert kernels.find_nvcc() == on_path and make_finds() == str(on_path)
    monkeypatch.setenv("NVCC", str(by_pip))
    assert kernels.find_nvcc() == by_pip and make_finds() == str(by_pip)
    monkeypatch.setenv("NVCC", "")
    assert kernels.find_nvcc() is None and make_finds() == ""


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_builds_a_kernel(place: Place) -> None:
    """The smallest, from its own sources, with the flags that `make cuda` has."""
    shutil.rmtree(place.sources)
    (place.sources / "cuda").mkdir(parents=True)
    source = ROOT / "native" / "cuda" / "embedding.cu"
    for file in (ROOT / "native" / "cuda").iterdir():
        if file.suffix in (".h", ".cuh", ".flags") or file == source:
            shutil.copy(file, place.sources / "cuda")
    for name in ("abi.h", "drawing.h"):
        shutil.copy(ROOT / "native" / name, place.sources)
    (built,) = kernels.built_kernels(Path(str(NVCC)), "80")
    assert all(name.encode() in built.read_bytes() for name in kernels_of(source))
    with pytest.raises(RillError, match="cannot be built for sm_1: embedding.cu: nvcc fatal"):
        kernels.built_kernels(Path(str(NVCC)), "1")
