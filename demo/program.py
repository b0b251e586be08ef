"""What the measuring programs share: how they end, and the options that they have in common."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo import report
from demo.console import CONTROLS, drop_output, enter_ranks, mutter, open_streams
from demo.options import OptionError, given
from engine import RillError
from engine.attention_choice import ATTENTION_KINDS

FAILED, MISUSED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def run_program(name: str, work: Callable[[], int], joins_ranks: bool = True) -> int:
    """The exit status of work(). Whatever goes wrong is one line on standard error: 2 for misuse, 1 for a failure.
    joins_ranks: under mpiexec, work is rank 0's; else every rank's."""
    try:
        open_streams()
        if joins_ranks:
            enter_ranks()
        return work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:
        tell(name, f"error: {report.describe(error)}")
        return MISUSED if report.is_misuse(error) else FAILED
    finally:
        drop_output()


def find_mpiexec() -> str:
    """The one beside this Python, which MPICH's package brings, or the system's. Raises RillError."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise RillError("there is no mpiexec: pip install 'rill-engine[mpi]'")
    return found


def tell(name: str, message: str) -> None:
    """One line on standard error."""
    mutter(f"{name}: {CONTROLS.sub(' ', message).strip()}\n")


# Options.


def listed(text: str) -> list[str]:
    """Names with commas between them."""
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text[:40]!r}")
    return list(dict.fromkeys(names))


def check_kinds(kinds: Sequence[str], allowed: Sequence[str] = ("auto", *ATTENTION_KINDS)) -> None:
    for kind in kinds:
        if kind not in allowed:
            raise OptionError(f"--attention {kind!r}: expected {', '.join(allowed)}")


def check_output(prefix: Path) -> None:
    """Before anything is measured: PREFIX.json has a place."""
    if not prefix.name or not prefix.parent.is_dir():
        raise OptionError(f"--output {prefix}: {prefix.parent} is no directory" if prefix.name else "--output: no name")


def attention_arguments(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What LLM is told of one kind of attention: windows are for `streaming`, blocks for those that go in blocks."""
    blocks = ("q_block", "kv_block") if kind in ("flash", "streaming") else ()
    window = ("sink", "window") if kind == "streaming" else ()
    return {"attention": kind, **given(options, (*blocks, *window))}
