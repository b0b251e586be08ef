"""Every ISA and kind of attention over a list of lengths: a whole prompt in one step, and one token after it.

    python -m demo.attention_sweep --lengths 4,64,512,2048 --kv-dtype float32,bfloat16 -o json

16 heads of 128. Prompts: milliseconds, and GFLOP/s of the scores and sums that causal attention needs, as a share of
what the ISA multiplies and adds in registers. Tokens: the time, and GB/s of keys and values, as a share of what the
same memory can be read at. Limits are measured in the same rounds. A point that would take too long is "not run".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from demo.attention_rig import AttentionRig, AttentionShape, scratch_bytes
from demo.options import Parser, lengths, positive
from demo.program import listed, run_program
from demo.timing import enough_rounds, seconds
from engine.attention_choice import ATTENTION_KINDS
from engine.device import open_device
from engine.device.cpu import available_isas
from engine.runner import KV_DTYPES

HEADS, HEAD_DIM = 16, 128
TOO_LONG, MOST_ROUNDS = 5.0, 20  # seconds of one replay


@dataclass
class Point:
    """One measurement; rates in operations or bytes a second."""

    isa: str
    kv_dtype: str
    attention: str
    test: str  # "prefill" or "decode"
    length: int
    seconds: float
    rate: float
    limit: float
    scratch_bytes_per_thread: int | None

    @property
    def share(self) -> float:
        return self.rate / self.limit


def measure(device: Any, dtype_name: str, kind: str, length: int, decode: bool, rounds: int) -> Point | None:
    """A point, or None where one replay takes too long."""
    dtype = KV_DTYPES[dtype_name]
    shape = AttentionShape(HEADS, HEADS, HEAD_DIM, (length,))
    rig = AttentionRig(device, shape, kind, dtype, rows=1 if decode else None)
    rig.store()
    first = seconds(rig.attend)
    if first > TOO_LONG:
        return None
    times, limits = [], []
    for _ in range(min(MOST_ROUNDS, enough_rounds(first, rounds))):
        times.append(seconds(rig.attend))
        limits.append(device.read_limit(rig.kv.storage) if decode else device.multiply_limit(dtype))
        if sum(times) > TOO_LONG:
            break
    pages = HEADS * device.cache_bytes(dtype, HEAD_DIM) / 64
    work = length * pages if decode else 4 * HEADS * HEAD_DIM * shape.scores()
    return Point(device.isa, dtype_name, kind, "decode" if decode else "prefill", length, median(times),
                 work / median(times), max(limits), scratch_bytes(rig.plan))  # fmt: skip


def sweep(options: argparse.Namespace) -> Iterator[tuple[str, Point | None]]:
    for isa in options.isa:
        device = open_device("cpu", isa=isa, threads=options.threads)
        for dtype in options.kv_dtype:
            for test in ("prefill", "decode"):
                for length in options.lengths:
                    for kind in ATTENTION_KINDS:
                        name = f"| {device.isa} | {dtype} | {test} | {length} | {kind} |"  # type: ignore[attr-defined]
                        yield name, measure(device, dtype, kind, length, test == "decode", options.rounds)


def line(name: str, point: Point | None) -> str:
    if point is None:
        return f"{name} not run | | |"
    unit = "GB/s" if point.test == "decode" else "GFLOP/s"
    return f"{name} {point.seconds * 1e3:.3f} ms | {point.rate / 1e9:.1f} {unit} | {point.share:.0%} |"


def run(options: argparse.Namespace) -> int:
    points = []
    if options.output == "md":
        print("| ISA | cache | test | length | attention | time | rate | share of the limit |\n" + "|---" * 8 + "|")
    for name, point in sweep(options):
        points.append(point)
        if options.output == "md":
            print(line(name, point), flush=True)
    if options.output == "json":
        print(json.dumps([asdict(p) | {"share": p.share} for p in points if p], indent=1))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m demo.attention_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=lengths, default=[4, 8, 16, 64, 512, 2048, 8192])
    parser.add_argument("--isa", type=listed, default=available_isas())
    parser.add_argument("--kv-dtype", type=listed, default=["float32", "bfloat16"])
    parser.add_argument("-r", "--rounds", type=positive, default=5)
    parser.add_argument("-t", "--threads", type=positive)
    parser.add_argument("-o", "--output", choices=["md", "json"], default="md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program("demo.attention_sweep", lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
