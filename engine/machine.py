"""What this machine, and the container around it, lets a process have."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path


@cache
def allowed_cpus() -> frozenset[int]:
    """CPUs that this process may run on, as it was when first asked: before OpenMP, where OMP_PROC_BIND is set,
    binds the thread that loads it."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def available_cores() -> int:
    """Threads that can run at once without sharing a core: the least of the affinity mask, the container's CPU quota
    and the physical cores."""
    return max(1, min(len(allowed_cpus()), _quota(), _physical_cores(allowed_cpus())))


def _quota() -> int:
    """Whole CPUs that the control group grants, rounded up."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # control groups of the first version
            folder = Path("/sys/fs/cgroup/cpu")
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return sys.maxsize
    if not limit.isdigit() or not period.isdigit() or int(period) == 0:
        return sys.maxsize
    return max(1, -(-int(limit) // int(period)))


def _physical_cores(cpus: frozenset[int]) -> int:
    """Distinct cores among these CPUs: hyper-threads of one core share its arithmetic units."""
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(cpus)
    return len(siblings)


def free_memory() -> int | None:
    """Bytes that can be taken without swapping, None where the system does not say."""
    candidates = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit_file, used_file in (("memory.max", "memory.current"),
                                  ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        try:
            limit = (Path("/sys/fs/cgroup") / limit_file).read_text().strip()
            used = (Path("/sys/fs/cgroup") / used_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            candidates.append(int(limit) - int(used) + _reclaimable())
    return max(0, min(candidates)) if candidates else None


def _reclaimable() -> int:
    """Page cache that counts as used in a control group but is given up on demand."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # on Linux a child starts with its parent's figure here

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
