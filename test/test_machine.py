"""What the machine and its container grant, from made-up files of the kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import machine

Files = Callable[[dict[str, str]], None]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Files:
    """Makes machine.py read these files, by absolute path, and no others; eight CPUs are allowed."""
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    monkeypatch.setattr(machine, "allowed_cpus", lambda: frozenset(range(8)))

    def write(files: dict[str, str]) -> None:
        for path, text in files.items():
            target = tmp_path / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

    return write


def siblings(*groups: str) -> dict[str, str]:
    """The topology files of CPUs 0, 1, ..., each naming the hyper-threads of its core."""
    folder = "/sys/devices/system/cpu"
    return {f"{folder}/cpu{i}/topology/thread_siblings_list": f"{group}\n" for i, group in enumerate(groups)}


def test_without_any_file_the_affinity_counts(kernel: Files) -> None:
    assert machine.available_cores() == 8


def test_hyper_threads_of_a_core_count_once(kernel: Files) -> None:
    kernel(siblings("0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7"))
    assert machine.available_cores() == 4


@pytest.mark.parametrize(
    "quota, cores", [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 3), ("1 100000", 1)]
)
def test_the_quota_of_a_control_group(kernel: Files, quota: str, cores: int) -> None:
    kernel({"/sys/fs/cgroup/cpu.max": f"{quota}\n"})
    assert machine.available_cores() == cores


@pytest.mark.parametrize("quota, cores", [("-1", 8), ("200000", 2)])
def test_the_quota_of_an_old_control_group(kernel: Files, quota: str, cores: int) -> None:
    folder = "/sys/fs/cgroup/cpu"
    kernel({f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"})
    assert machine.available_cores() == cores


def test_free_memory_is_the_least_that_anyone_grants(kernel: Files) -> None:
    assert machine.free_memory() is None
    kernel({"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"})
    assert machine.free_memory() == 5000 * 1024
    kernel({"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "77\n"})
    assert machine.free_memory() == 5000 * 1024
    kernel({"/sys/fs/cgroup/memory.max": "1000000\n", "/sys/fs/cgroup/memory.current": "900000\n"})
    assert machine.free_memory() == 100_000
    kernel({"/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 3000\nactive_file 200\n"})
    assert machine.free_memory() == 103_200, "the page cache is given up on demand"


def test_peak_memory_grows_with_what_is_touched() -> None:
    before = machine.peak_memory()
    taken = bytearray(64 << 20)
    assert machine.peak_memory() >= max(before, 64 << 20)
    assert len(taken) and sys.getsizeof(taken) > 1
