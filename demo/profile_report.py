"""`rill --profile`: where the time of a run went, as a table on standard error and as a trace in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from demo.console import in_background, mutter, say
from demo.options import OptionError

if TYPE_CHECKING:
    from engine.device import Device
    from engine.profile import OpTime, Phase, Profile
    from engine.work import Limits

COLUMNS = ("calls", "ms", "of time", "µs/call", "GB/s", "GFLOP/s", "of limit", "waiting")


def check_trace(path: Path) -> None:
    """Before anything is computed: a file can be written there, and takes the place of nothing but a file. Raises
    OptionError."""
    from tempfile import TemporaryFile

    problem: str | None = None
    try:
        with TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            problem = None if path.is_file() else "is there and is no file"
            problem = problem or (None if os.access(path, os.W_OK) else "is there and may not be written")
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise OptionError(f"--profile: {path}: {problem}")


def show_profile(profile: Profile, device: Device) -> None:
    """The tables of the phases that there were, against limits that are measured now."""
    from engine.work import measure_limits

    limits = in_background(lambda: measure_limits(device, sorted(profile.dtypes(), key=str)))
    for name, phase in profile.phases.items():
        if phase.steps:
            mutter("".join(f"{line}\n" for line in table(name, phase, limits)))
    if profile.cost:
        from demo.rank_cost import lines

        mutter("".join(f"{line}\n" for line in lines(profile.cost)))
    if profile.no_cost:
        say(f"nothing on what each rank costs: {profile.no_cost}")
    if limits:
        say(f"limits, measured after the run: {describe_limits(limits)}")
    if profile.stopped:
        say(f"steps that were stopped and count nowhere: {profile.stopped}")


def describe_limits(limits: Limits) -> str:
    rates = [f"{rate / 1e9:.0f} GFLOP/s on {dtype}" for dtype, rate in limits.multiply.items()]
    return ", ".join([f"{limits.read / 1e9:.1f} GB/s read from memory", *rates])


def table(name: str, phase: Phase, limits: Limits | None) -> Iterator[str]:
    """A line an op, then what passed outside the nodes."""
    yield f"{name}: {_count(phase.rows, 'row')} in {_count(phase.steps, 'step')}, {phase.seconds * 1e3:.1f} ms"
    ops = phase.by_op(limits)
    width = max(len("thread start"), *(len(each.op) for each in ops))
    yield f"  {'op':{width}}" + "".join(f"{column:>10}" for column in COLUMNS)
    for each in ops:
        yield f"  {each.op:{width}}{cells(each, phase.seconds)}"
    outside = {"barriers": phase.barriers, "thread start": phase.starting, "Python": phase.python}
    for what, seconds in outside.items():
        share = f"{seconds / phase.seconds:.1%}"
        yield f"  {what:{width}}{'':10}{seconds * 1e3:>10.2f}{share:>10}{seconds / phase.steps * 1e6:>10.1f} a step"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def cells(each: OpTime, total: float) -> str:
    values = [
        f"{each.calls}",
        f"{each.seconds * 1e3:.2f}",
        f"{each.seconds / total:.1%}",
        f"{each.seconds / each.calls * 1e6:.1f}",
        f"{each.work.bytes / each.seconds / 1e9:.2f}",
        f"{each.work.flops / each.seconds / 1e9:.1f}" if each.work.flops else "",
        f"{each.least / each.seconds:.1%}" if each.least is not None else "",
        f"{each.waiting:.1%}",
    ]
    return "".join(f"{value:>10}" for value in values)


def save_trace(profile: Profile, path: Path) -> None:
    """Writes the trace, whole or not at all, and says so."""
    from demo.artifacts import write_whole

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            profile.write_trace(file)

    write_whole(path, write)
    kept = len(profile.trace)
    of_all = f"the first {kept} of {kept + profile.left_out} steps" if profile.left_out else _count(kept, "step")
    say(f"trace of {of_all} in {path}: open it in https://ui.perfetto.dev or chrome://tracing")
