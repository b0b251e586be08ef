"""Attention shared among ranks: each has some of the heads, and an AllGather gives all outputs to all.

    python -m demo.benchmark_mpi_attention --lengths 32,128,512,2048,8192 --ranks 1,2,4 -o PREFIX

T causal rows in one step over a float32 cache, standard against streaming, for T from 32 to 8,192. The program starts
itself under mpiexec with as many ranks as are needed at most; the others sleep while fewer are measured, so that the
rounds of all can be interleaved. Times are rank 0's, from when all begin until it has the outputs of all; medians.
Speed-up is against one rank, efficiency against half as many. With `-o`, PREFIX.json and PREFIX.png, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from demo.artifacts import about_machine, new_figure, save_figure, write_json
from demo.attention import add_shape, check_shape
from demo.attention_rig import AttentionRig, AttentionShape
from demo.options import OptionError, Parser, lengths, positive
from demo.program import check_kinds, check_output, find_mpiexec, listed, run_program
from demo.timing import enough_rounds
from engine.abi import FLOAT32
from engine.attention_choice import ATTENTION_KINDS
from engine.device import Device, open_device
from engine.machine import available_cores
from engine.ranks.comm import Comm, open_comm

NAME = "demo.benchmark_mpi_attention"
PATIENCE = 5.0  # seconds for all rounds of a point
HEAD = "| T | attention | ranks | ms | iterations/s | speed-up | efficiency | streaming / standard | |"


@dataclass
class Point:
    """Median seconds of an iteration; ratios are None where there is nothing to compare with."""

    T: int
    attention: str
    ranks: int
    threads: int
    seconds: float
    oversubscribed: bool
    speed_up: float | None = None
    efficiency: float | None = None
    against_standard: float | None = None

    def line(self) -> str:
        ratios = (self.speed_up, self.efficiency, self.against_standard)
        forms = (".2f", ".0%", ".2f")
        shown = " | ".join("" if r is None else f"{r:{form}}" for r, form in zip(ratios, forms, strict=True))
        note = "oversubscribed" if self.oversubscribed else ""
        return (f"| {self.T} | {self.attention} | {self.ranks} | {self.seconds * 1e3:.3f} | {1 / self.seconds:.1f} | "
                f"{shown} | {note} |")  # fmt: skip


class SharedAttention:
    """One layer of attention on the first `ranks` ranks. `seconds()` is called by all ranks of `everyone`."""

    def __init__(self, everyone: Comm | None, ranks: int, device: Device, shape: AttentionShape, kind: str) -> None:
        self.everyone, self.ranks = everyone, ranks
        self.comm = everyone.first(ranks) if everyone else None
        self.takes_part = everyone is None or everyone.rank < ranks
        if self.takes_part:
            part = (self.comm.split.part(n) for n in (shape.heads, shape.kv_heads)) if self.comm else None
            heads, kv_heads = (len(each) for each in part) if part else (shape.heads, shape.kv_heads)
            own = AttentionShape(heads, kv_heads, shape.head_dim, shape.lengths)
            self.rig = AttentionRig(device, own, kind, FLOAT32)
            self.rig.store()
            self.out = np.empty((shape.lengths[0], shape.heads * shape.head_dim), np.float32)

    def seconds(self) -> float:
        """Of one iteration."""
        if self.everyone:
            self.everyone.beat()  # all begin together
        start = time.perf_counter()
        if self.takes_part:
            self.rig.attend()
            if self.comm:
                self.comm.all_gather(self.rig.device.view(self.rig.out), self.out)
        return time.perf_counter() - start


def measure(options: argparse.Namespace, comm: Comm | None, device: Device) -> Iterator[Point]:
    for T in options.lengths:
        shape = AttentionShape(options.heads, options.kv_heads, options.head_dim, (T,))
        cases = [(kind, ranks) for kind in options.attention for ranks in options.ranks]
        works = [SharedAttention(comm, ranks, device, shape, kind) for kind, ranks in cases]
        times = rounds_of(works, comm, options.iters)
        points = [
            Point(T, kind, ranks, options.threads, median(found), ranks * options.threads > available_cores())
            for (kind, ranks), found in zip(cases, times, strict=True)
        ]
        by_case = {(p.attention, p.ranks): p.seconds for p in points}
        for p in points:
            one, standard = by_case.get((p.attention, 1)), by_case.get(("standard", p.ranks))
            half = None if p.ranks % 2 else by_case.get((p.attention, p.ranks // 2))
            p.speed_up = one / p.seconds if one else None
            p.efficiency = half / p.seconds / 2 if half else None
            p.against_standard = standard / p.seconds if standard and p.attention != "standard" else None
            yield p


def rounds_of(works: Sequence[SharedAttention], comm: Comm | None, least: int) -> list[list[float]]:
    """The seconds of each work in each round, after one to warm up. Rank 0 says how many there are."""
    first = sum(work.seconds() for work in works)
    count = np.array([max(1, min(enough_rounds(first, least), int(PATIENCE / first)))], np.int32)
    if comm:
        comm.broadcast(count)
    rounds = [[work.seconds() for work in works] for _ in range(count[0])]
    return [list(times) for times in zip(*rounds, strict=True)]


def run_on_ranks(options: argparse.Namespace, comm: Comm | None) -> int:
    device = open_device(options.device, isa=options.isa, threads=options.threads)
    points = []
    leads = comm is None or comm.rank == 0
    if leads:
        print(f"{options.heads} heads of {options.head_dim} on {options.kv_heads}; {device.type} {device.description}; "
              f"{available_cores()} cores\n\n{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|")  # fmt: skip
    for point in measure(options, comm, device):
        points.append(point)
        if leads:
            print(point.line(), flush=True)
    if leads and options.output:
        content = about_machine(device) | {"points": [asdict(point) for point in points]}
        write_json(options.output.with_name(f"{options.output.name}.json"), content)
        plot(points, options.output.with_name(f"{options.output.name}.png"))
    if comm:
        comm.ended = True  # there is nobody to tell: all are here
    return 0


def plot(points: Sequence[Point], path: Path) -> None:
    figure, panels = new_figure(2)
    quantities: tuple[tuple[str, Callable[[Point], float | None]], ...] = (
        ("ms", lambda p: p.seconds * 1e3), ("speed-up against one rank", lambda p: p.speed_up)
    )  # fmt: skip
    for panel, (label, value) in zip(panels, quantities, strict=True):
        for kind, ranks in dict.fromkeys((p.attention, p.ranks) for p in points):
            mine = [p for p in points if (p.attention, p.ranks) == (kind, ranks) and value(p) is not None]
            style = "--" if any(p.oversubscribed for p in mine) else "-"
            panel.plot([p.T for p in mine], [value(p) for p in mine], style, marker="o", label=f"{kind}, {ranks}")
        panel.set(xlabel="T", ylabel=label, xscale="log")
        panel.legend(title="attention, ranks (dashed: oversubscribed)")
    panels[0].set(yscale="log")
    save_figure(figure, path)


def start_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Runs this program under mpiexec."""
    command = [find_mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", NAME, *arguments]
    return subprocess.run(command).returncode


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lengths", type=lengths, default=[32 << i for i in range(9)], metavar="LIST", help="by default 32 to 8192")
    add("--ranks", type=lengths, default=[1, 2, 4], metavar="LIST", help="by default 1,2,4")
    add("--attention", type=listed, default=["standard", "streaming"], metavar="LIST")
    add_shape(parser)
    add("-r", "--iters", type=positive, default=5, metavar="N", help="rounds; by default 5")
    add("-o", "--output", type=Path, metavar="PREFIX", help="PREFIX.json and PREFIX.png")
    options = check_shape(parser.parse_args(arguments), parser)
    check_kinds(options.attention, ATTENTION_KINDS)
    options.threads = options.threads or 1
    if options.output:
        check_output(options.output)
        new_figure(1)  # raises where there is no matplotlib, before anything is measured
    for ranks in options.ranks:
        if options.heads % ranks or (options.kv_heads % ranks and ranks % options.kv_heads):
            raise OptionError(f"--ranks {ranks}: cannot share {options.heads} heads on {options.kv_heads}")
    return options


def run(arguments: Sequence[str]) -> int:
    options, comm = parse(arguments), open_comm()
    most = max(options.ranks)
    if comm is None and most > 1:
        return start_ranks(arguments, most)
    if comm and comm.size < most:
        raise OptionError(f"--ranks {most}: mpiexec has started {comm.size}")
    return run_on_ranks(options, comm)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(sys.argv[1:] if arguments is None else arguments), joins_ranks=False)


if __name__ == "__main__":
    sys.exit(main())
