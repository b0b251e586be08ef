"""What the measuring programs leave behind: figures and numbers, each file whole or not there at all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from engine import RillError, __version__


def about_machine(device: Any = None) -> dict[str, Any]:
    """Where figures were taken and with what; device: where all of them were taken on one."""
    try:
        matplotlib = version("matplotlib")
    except PackageNotFoundError:
        matplotlib = "absent"
    machine: dict[str, Any] = {"cpu": _cpu_name(), "system": platform.platform()}
    if device is not None:
        machine |= {"device": device.description, "threads": getattr(device, "threads", None)}
    return {
        "machine": machine,
        "versions": {"rill": __version__, "python": platform.python_version(), "numpy": np.__version__,
                     "matplotlib": matplotlib},
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, content: Any) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written under another name, and renames it."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def new_figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure of matplotlib with panels side by side. Raises RillError that says how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RillError("no plot without matplotlib: pip install 'rill-engine[plot]'") from None
    figure = Figure(figsize=(6.4 * panels, 4.4), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def save_figure(figure: Any, path: Path) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130))
