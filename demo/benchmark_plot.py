"""Dense and streaming attention over a sweep of lengths: a table, a plot, and the numbers behind it.

    python -m demo.benchmark_plot --T-min 128 --T-max 4096 --heads 16 --head-dim 128 --window 64 --sink 16 -o PREFIX

Each T is twice the one before; all T rows are one step. Dense is `flash`. The table goes to standard output, progress
to standard error, the rest to PREFIX.png and PREFIX.json. A point that would take more than 60 s, going by the
one before it, is not run and never made up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from demo.artifacts import about_machine, new_figure, save_figure, write_json
from demo.attention import add_shape, check_shape, shape_of
from demo.attention_rig import AttentionRig, AttentionShape
from demo.options import Parser, integer, positive
from demo.program import check_output, run_program, tell
from demo.timing import enough_rounds, seconds
from engine import RillError
from engine.device import Device, open_device

NAME = "demo.benchmark_plot"
PATIENCE = 60.0  # seconds that a point may take
PROBE = 64  # positions: what a longer first point is predicted from
METHOD = ("one attention node over T rows in one step, keys and values stored before; median of interleaved rounds "
          "after one to warm up, more of them where they are short; a point predicted to take longer than 60 s is "
          "not run")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Seconds of one length; None: not run."""

    T: int
    dense: float | None
    streaming: float | None

    @property
    def speed_up(self) -> float | None:
        return self.dense / self.streaming if self.dense and self.streaming else None


class Curve:
    """One kind of attention over the sweep. Each time measured predicts the next, by how many scores either makes."""

    def __init__(self, device: Device, kind: str, shape: AttentionShape) -> None:
        self.device, self.kind, self.shape = device, kind, shape
        self.rate: float | None = None  # seconds a score

    def rig(self, T: int) -> AttentionRig | None:
        """A rig that is ready to be timed, or None where it would take too long."""
        shape = replace(self.shape, lengths=(T,))
        if self.rate is None and T > PROBE:
            probe = self._stored(replace(self.shape, lengths=(PROBE,)))
            probe.attend()
            self.learn(probe, seconds(probe.attend))
        if self.rate is not None and self.rate * shape.scores() > PATIENCE:
            return None
        return self._stored(shape)

    def _stored(self, shape: AttentionShape) -> AttentionRig:
        rig = AttentionRig(self.device, shape, self.kind)
        rig.store()
        return rig

    def learn(self, rig: AttentionRig, time: float) -> None:
        self.rate = time / rig.shape.scores()


def measure(curves: Sequence[Curve], T: int, rounds: int) -> Iterator[float | None]:
    """Median seconds of each curve at T, in rounds that go through both. Where a round is long there are fewer."""
    rigs = [curve.rig(T) for curve in curves]
    times: list[list[float]] = [[] for _ in rigs]
    warm = [seconds(rig.attend) for rig in rigs if rig]
    for _ in range(enough_rounds(max(warm, default=0.0), rounds)):
        for rig, kept in zip(rigs, times, strict=True):
            if rig and sum(kept) + (kept[-1] if kept else 0) <= PATIENCE:
                kept.append(seconds(rig.attend))
    for curve, rig, kept in zip(curves, rigs, times, strict=True):
        if rig:
            curve.learn(rig, median(kept))
        yield median(kept) if kept else None


def sweep(options: argparse.Namespace, device: Device) -> Iterator[Point]:
    shape = shape_of(options, options.T_min)
    windowed = replace(shape, window=options.window, sink=options.sink)
    curves = Curve(device, "flash", shape), Curve(device, "streaming", windowed)
    T = options.T_min
    while T <= options.T_max:
        tell(NAME, f"T = {T}")
        yield Point(T, *measure(curves, T, options.iters))
        T *= 2


def line(point: Point) -> str:
    def cell(value: float | None, scale: float, form: str) -> str:
        return "not run" if value is None else format(value * scale, form)

    speed_up = f"{point.speed_up:.2f}×" if point.speed_up else ""
    return f"| {point.T} | {cell(point.dense, 1e3, '.3f')} | {cell(point.streaming, 1e3, '.3f')} | {speed_up} |"


def plot(points: Sequence[Point], streaming: str, title: str, path: Path) -> None:
    if not any(point.dense or point.streaming for point in points):
        raise RillError("no plot: not one point was run")
    both = [p for p in points if p.speed_up]
    figure, [times, *ratios] = new_figure(2 if both else 1)
    for name, curve in (("dense (flash)", "dense"), (streaming, "streaming")):
        run = [(p.T, getattr(p, curve) * 1e3) for p in points if getattr(p, curve) is not None]
        times.plot([T for T, _ in run], [ms for _, ms in run], marker="o", label=name)
    times.set(yscale="log", ylabel="ms, all T rows", title=title)
    times.legend()
    for axes in ratios:
        axes.plot([p.T for p in both], [p.speed_up for p in both], marker="o", color="tab:green")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(ylabel="speed-up: dense / streaming", title="the same runs")
    for axes in (times, *ratios):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("T, positions")
        axes.set_xticks([p.T for p in points], [str(p.T) for p in points])
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--T-min", type=positive, default=128, metavar="T", help="by default 128")
    add("--T-max", type=positive, default=4096, metavar="T", help="by default 4096")
    add_shape(parser)
    add("--window", type=positive, metavar="W", help="of streaming; without one it sees everything, as dense does")
    add("--sink", type=integer, metavar="K", help="of streaming")
    add("-r", "--iters", type=positive, default=5, metavar="N", help="rounds, more where they are short; by default 5")
    add("-o", "--output", type=Path, default=Path("attention_sweep"), metavar="PREFIX")
    options = parser.parse_args(arguments)
    if options.T_max < options.T_min:
        parser.error(f"--T-max: {options.T_max} is less than --T-min {options.T_min}")
    if options.sink is not None and (options.window is None or options.sink < 0):
        parser.error("--sink: needs --window" if options.window is None else f"--sink: {options.sink} is negative")
    check_output(options.output)
    options.sink = options.sink or 0
    return check_shape(options, parser)


def run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    device = open_device(options.device, isa=options.isa, threads=options.threads)
    streaming = f"streaming, window {options.window} + sinks {options.sink}" if options.window else "streaming, exact"
    print(f"| T | dense ms | {streaming} ms | speed-up |\n|---|---|---|---|", flush=True)
    points: list[Point] = []
    for point in sweep(options, device):
        points.append(point)
        print(line(point), flush=True)
    write_json(options.output.with_name(f"{options.output.name}.json"), content(options, device, points))
    plot(points, streaming, f"{options.heads} heads of {options.head_dim}, {device.description}",
         options.output.with_name(f"{options.output.name}.png"))  # fmt: skip
    return 0


def content(options: argparse.Namespace, device: Device, points: Sequence[Point]) -> dict[str, Any]:
    names = ("heads", "kv_heads", "head_dim", "window", "sink", "iters")
    return {**about_machine(device), "method": METHOD, "settings": {name: getattr(options, name) for name in names},
            "unit": "seconds; null: not run",
            "points": [{**asdict(point), "speed_up": point.speed_up} for point in points]}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
