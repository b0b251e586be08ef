"""The cache of quantised weights: a model is quantised once, and nothing stale or broken is ever taken from it. By the
CPU, and by a GPU in emulation and, with `pytest -m cuda`, a real one."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulated_cuda import EmulatedDriver, emulated_devices, library
from harness import cpu_devices, gpu_devices

from demo import infer
from engine import LLM, UsageError
from engine.cuda import arena
from engine.cuda.device_array import DeviceArray
from engine.device import cuda
from engine.files.packed_cache import (
    CHECKSUM,
    LAYOUTS,
    HostArena,
    cache_directory,
    cache_name,
    make_room,
    write_cached,
)
from engine.layer import Weight, matrix, vector
from engine.quantised import Format, QuantisedMatrix

IDS = [1, 7, 3, 9]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rill"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedDriver:
    """What the cuda device finds when it looks for a GPU."""
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    driver = EmulatedDriver(library())
    monkeypatch.setattr(cuda, "open_driver", lambda place: driver)
    return driver


@pytest.fixture(params=["cpu", "cuda", pytest.param("gpu", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """A type of device that models are loaded on."""
    if request.param == "gpu":
        return "cuda" if gpu_devices() else pytest.skip("no GPU")
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    return str(request.param)


def forbid_quantising(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("was quantised again")

    monkeypatch.setattr(Weight, "quantised_rows", refuse)


def logits(model: Path, **options: Any) -> np.ndarray:
    with LLM(model, **{"dtype": "int8", "max_seq_len": 16, "device": "cpu", **options}) as llm:
        return llm.logits(IDS)


def test_the_second_load_takes_what_the_first_has_kept(
    model: Path, home: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logits(model, device=device)
    assert len(list(home.iterdir())) == 1
    forbid_quantising(monkeypatch)
    assert np.array_equal(logits(model, device=device), first)
    with pytest.raises(AssertionError, match="quantised again"):
        logits(model, device=device, cache=False)
    with pytest.raises(AssertionError, match="quantised again"):
        logits(model, device=device, dtype="int4")


def test_every_isa_takes_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits(model)
    forbid_quantising(monkeypatch)
    assert np.array_equal(logits(model, isa="baseline", threads=1).argmax(axis=1), first.argmax(axis=1))


def test_devices_keep_files_of_their_own(
    model: Path, home: Path, emulated: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {device: logits(model, device=device) for device in ("cpu", "cuda")}
    one, other = kept(home)
    assert {one[40:], other[40:]} == {f".{device}{LAYOUTS[device]}.weights" for device in first}
    assert one[:20] != other[:20], "one would count as a rank's part of the other"
    forbid_quantising(monkeypatch)
    for device, before in first.items():
        assert np.array_equal(logits(model, device=device), before)


def test_a_gpu_is_read_and_filled_in_pieces(
    model: Path, home: Path, emulated: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through its pinned memory: the whole never lies in that of the host."""
    before = logits(model, device="cuda", cache=False)
    monkeypatch.setattr(arena, "STAGED", 100_000)
    sizes: list[int] = []
    staging = emulated.staging

    def noting(size: int) -> np.ndarray:
        sizes.extend([size] if size else [])
        return staging(size)

    monkeypatch.setattr(emulated, "staging", noting)
    for made in (True, False):
        sizes.clear()
        assert np.array_equal(logits(model, device="cuda"), before)
        (file,) = home.iterdir()
        count, rest = divmod(file.stat().st_size - CHECKSUM, 100_000)
        assert sizes[-count - 1 :] == [100_000] * count + [rest] and made == (len(sizes) > count + 1)


def test_plain_weights_and_no_cache_leave_nothing(model: Path, home: Path, device: str) -> None:
    logits(model, device=device, dtype="auto")
    logits(model, device=device, cache=False)
    assert not home.exists()


def test_a_file_that_changed_is_another_model(model: Path, home: Path, device: str) -> None:
    before = logits(model, device=device)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-64:] = bytes(64)
    file.write_bytes(data)
    assert not np.array_equal(logits(model, device=device), before)
    assert len(list(home.iterdir())) == 2


def test_what_is_cut_short_is_made_again(model: Path, home: Path, device: str) -> None:
    before = logits(model, device=device)
    kept = next(home.iterdir())
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    assert np.array_equal(logits(model, device=device), before) and kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_harmless(
    model: Path, home: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("in the way")
    command = [str(model), "--raw", "-p", "a", "-n", "2", "--dtype", "int4", "--device", device]
    assert infer.main(command) == 0
    said = capsys.readouterr().err
    assert said.count("quantised weights are not kept: ") == 1 and "exists" in said
    assert home.read_text() == "in the way"
    home.unlink()
    assert infer.main([*command, "--no-cache"]) == 0
    assert not home.exists() and "not kept" not in capsys.readouterr().err


def test_a_file_that_changed_in_place_is_another_model(model: Path, home: Path) -> None:
    """Though size and time of change are what they were."""
    file = model / "model.safetensors"
    before, times = logits(model), file.stat()
    data = bytearray(file.read_bytes())
    data[-64:] = bytes(64)
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not np.array_equal(logits(model), before)


def test_other_contents_are_not_taken(model: Path, home: Path, device: str) -> None:
    before = logits(model, device=device)
    kept = next(home.iterdir())
    whole = kept.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    kept.write_bytes(damaged)
    assert np.array_equal(logits(model, device=device), before) and kept.read_bytes() == whole


def test_progress_ends_at_all_bytes(model: Path, device: str) -> None:
    for kept in (False, True):
        seen: list[tuple[int, int]] = []
        options: Any = {"dtype": "int8", "max_seq_len": 16, "device": device}
        with LLM(model, **options, progress=lambda *so_far, seen=seen: seen.append(so_far)) as llm:
            total = llm.runner.weight_bytes
        assert seen[-1] == (total, total) and (len(seen) == 1) == kept


def test_every_format_has_a_name_of_its_own(model: Path) -> None:
    names: set[str] = set()
    for dtype in ("int8", "int8-32", "int4", "int4-64"):
        with LLM(model, dtype=dtype, max_seq_len=16, cache=False) as llm:
            names.update(cache_name(llm.runner.weights, device) for device in LAYOUTS)
    assert len(names) == 4 * len(LAYOUTS)


def test_without_a_home_models_load_all_the_same(model: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", homeless)
    with LLM(model, dtype="int8", max_seq_len=16, device=device) as llm:
        assert llm.device.notes == ["quantised weights are not kept: Could not determine home directory."]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "rill"


def test_a_disk_that_is_full_keeps_nothing_half_written(home: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # Python ignores the signal that comes with it
    try:
        said = write_cached(NAMES[0], HostArena(np.ones(2 << 20, np.uint8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "too large" in said and kept(home) == []
    assert write_cached(NAMES[0], HostArena(np.ones(2 << 20, np.uint8))) == "" and kept(home) == [NAMES[0]]


KINDS = ("int8", "int4", "uint8", "uint4", "float32", "bfloat16", "float16")
DIGESTS = {
    "cpu2": "7792ccf4c1e5688f240c4e84a30d428607aad6eb6f16d7fa03ecdb2b68fa5462",
    "cuda1": "f5fd25406cb8ce53c4b4eff4c995591abcf0f8289a19964da4d25bea8d320553",
}


def counted(kind: str, shape: tuple[int, int]) -> Any:
    """A matrix of small whole numbers, the same on any machine: of a dtype, or quantised in groups of 32."""
    numbers, dtype = np.arange(math.prod(shape)).reshape(shape) * 37 % 251, np.dtype(getattr(ml_dtypes, kind, kind))
    if "int" not in kind:
        return numbers.astype(dtype)
    quants = (numbers % 16 if "4" in kind else numbers).astype(np.uint8)
    scales = (numbers[:, ::32] + 1).astype(np.float16)
    return QuantisedMatrix(Format(dtype, 32), quants, scales, scales + 7 if "u" in kind else None)


def packed(device: Any, weights: list[Weight]) -> np.ndarray:
    """What a device makes of weights, as it would be kept."""
    device.load(weights)
    if device.type == "cpu":
        return np.asarray(device.arena)
    memory = weights[0].storage.allocation
    return DeviceArray(memory, (memory.size,), np.dtype(np.uint8)).copy()


def test_another_layout_has_another_number() -> None:
    """What is kept is taken as it is. So where other bytes come of the same weights, the device's number in LAYOUTS has
    to be raised, and then they have another digest here."""
    weights = [matrix(kind, [counted(kind, shape)]) for kind in KINDS for shape in ((16, 128), (19, 77))]
    for device in (*cpu_devices(), *emulated_devices(), *gpu_devices()):
        found = hashlib.sha256(packed(device, weights).tobytes()).hexdigest()
        assert DIGESTS.get(f"{device.type}{LAYOUTS[device.type]}") == found, device.description


def test_no_byte_of_a_gpu_is_kept_as_it_was() -> None:
    """Behind the ends of rows and of vectors: an emulated GPU's memory holds 0xFF until it is written."""
    weights = [vector("v", np.ones(3, np.float32)), matrix("m", [np.ones((2, 5), np.float32)])]
    for device in emulated_devices():
        memory = packed(device, weights).view(np.float32)
        assert memory.size > 13 and np.sort(memory).tolist() == [0] * (memory.size - 13) + [1] * 13


# How much is kept.

NAMES = [f"{digit * 40}.{type}{LAYOUTS[type]}.weights" for digit, type in zip("abcd", [*LAYOUTS] * 2, strict=True)]
MB = 1_000_000


def fill(home: Path, name: str, used: float, size: int = MB) -> Path:
    """A file of the cache, used so many seconds ago."""
    home.mkdir(parents=True, exist_ok=True)
    (home / name).write_bytes(bytes(size))
    os.utime(home / name, times=(time.time() - used,) * 2)
    return home / name


def kept(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_the_longest_unused_go_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, used in zip(NAMES, (30, 40, 10, 20), strict=True):
        fill(home, name, used)
    monkeypatch.setenv("RILL_CACHE_GB", "0.004")
    assert make_room(NAMES[1], MB) == "" and len(kept(home)) == 4
    monkeypatch.setenv("RILL_CACHE_GB", "0.003")
    assert make_room("e" * 40 + NAMES[0][40:], MB).endswith("of no use or unused for longest: 2 files, 0.002 GB")
    assert kept(home) == [NAMES[1], NAMES[2]], "the one that was the oldest has been used since"


def test_ranks_leave_each_others_parts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RILL_CACHE_GB", "0.002")
    part = f"{'c' * 20}{'d' * 20}{NAMES[2][40:]}"  # NAMES[2] is another of the same model
    for name, used in ((part, 99), (NAMES[0], 10), (NAMES[1], 20), (NAMES[3], 30)):
        fill(home, name, used)
    assert "longest: 2 files" in make_room(NAMES[2], MB)
    assert kept(home) == [NAMES[0], part]


def test_what_is_used_now_stays_whatever_the_limit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, other = fill(home, NAMES[0], 99), fill(home, NAMES[1], 1)
    monkeypatch.setenv("RILL_CACHE_GB", "0")
    assert make_room(NAMES[0], MB)
    assert used.exists() and not other.exists()


def test_older_layouts_and_what_was_never_finished_go(home: Path) -> None:
    older = [f"{'a' * 40}.{type}{layout - 1}.weights" for type, layout in LAYOUTS.items()]
    newer = [f"{'a' * 40}.{type}{layout + 1}.weights" for type, layout in LAYOUTS.items()]
    stays = [*newer, f"{'a' * 40}.npu1.weights", NAMES[1], NAMES[2] + "xyz.part", "notes.txt", "b.weights"]
    for name in (*older, f"{'a' * 40}.2.weights", f"{'a' * 40}.weights", *stays):
        fill(home, name, 60)
    fill(home, NAMES[3] + "xyz.part", 25 * 3600)
    assert "longest: 5 files, " in make_room(NAMES[1], MB)
    assert kept(home) == sorted(stays)


def test_links_are_left_alone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = fill(tmp_path / "elsewhere", NAMES[0], 60)
    before = outside.stat().st_mtime_ns
    home.mkdir(parents=True)
    (home / NAMES[0]).symlink_to(outside)
    (home / NAMES[1]).symlink_to(outside)
    (home / NAMES[2]).mkdir()
    monkeypatch.setenv("RILL_CACHE_GB", "0")
    assert make_room(NAMES[0], MB) == ""
    assert len(kept(home)) == 3 and outside.stat().st_mtime_ns == before


def test_two_processes_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other has removed between a look and the deed counts as removed by the other."""
    for name, used in zip(NAMES, (30, 40, 10, 20), strict=True):
        fill(home, name, used)
    monkeypatch.setenv("RILL_CACHE_GB", "0.002")
    unlink = Path.unlink

    def twice(path: Path) -> None:
        unlink(path)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", twice)
    assert make_room(NAMES[2], MB) == ""
    assert kept(home) == [NAMES[2], NAMES[3]]


def test_a_model_larger_than_the_limit_is_not_kept(
    model: Path, home: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fill(home, NAMES[0], 1, size=100)
    monkeypatch.setenv("RILL_CACHE_GB", "1e-6")
    with LLM(model, dtype="int8", max_seq_len=16, device=device) as llm:
        assert len(llm.device.notes) == 1 and "GB that RILL_CACHE_GB allows" in llm.device.notes[0]
    assert kept(home) == [other.name]


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_another_limit_is_refused(model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RILL_CACHE_GB", text)
    with pytest.raises(UsageError, match=f"RILL_CACHE_GB '{text}': expected gigabytes, 0 or more"):
        logits(model)
    assert not home.exists()


def test_what_was_removed_is_said_to_those_who_ask(model: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(model), "--raw", "-p", "a", "-n", "2", "--dtype", "int4"]
    for options, times in (([], 0), (["--verbose"], 1)):
        fill(home, "a" * 40 + ".weights", 1)
        assert infer.main([*command, *options]) == 0
        assert capsys.readouterr().err.count("longest: 1 file, ") == times
        assert len(kept(home)) == 1


def test_by_default_it_is_a_share_of_the_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(home, NAMES[0], 60), fill(home, NAMES[1], 61)
    disk = shutil.disk_usage(home)._replace(total=8 * MB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    assert "longest: 1 file, " in make_room(NAMES[2], MB)
    assert kept(home) == [NAMES[0]]
