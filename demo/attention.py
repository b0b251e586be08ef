"""Dense attention beside streaming attention with sinks and a window, on one shape.

    python -m demo.attention [T] [WINDOW] [SINK]

T positions of 16 heads of 128, all rows in one step, then the last row alone, as when a token is generated. Dense is
`flash`, where every row sees all before it; streaming sees the last WINDOW positions and the first SINK. The work ratio
is how many times as many scores dense attention has to make. Both are checked against NumPy's word on the same cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from demo.attention_rig import AttentionRig, AttentionShape
from demo.options import Parser, integer, positive
from demo.program import FAILED, run_program
from demo.timing import medians
from engine.device import Device, open_device

NAME = "demo.attention"
LARGEST_ERROR = 1e-5  # of float32 attention over normally distributed values
CHECKED = 128  # rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("length", nargs="?", type=positive, default=1024, metavar="T", help="positions; by default 1024")
    add("window", nargs="?", type=positive, default=64, metavar="WINDOW", help="by default 64")
    add("sink", nargs="?", type=integer, default=16, metavar="SINK", help="by default 16")
    add_shape(parser)
    add("-r", "--iters", type=positive, default=5, metavar="N", help="rounds, more where they are short; by default 5")
    options = parser.parse_intermixed_args(arguments)
    if options.sink < 0:
        parser.error(f"SINK: expected 0 or more, got {options.sink}")
    return check_shape(options, parser)


def add_shape(parser: Parser) -> None:
    """Options that the programs over one attention node share."""
    add = parser.add_argument
    add("--heads", type=positive, default=16, metavar="N", help="of queries; by default 16")
    add("--kv-heads", type=positive, metavar="N", help="of keys and values; by default as many")
    add("--head-dim", type=positive, default=128, metavar="N", help="by default 128")
    add("--device", default="auto", metavar="NAME")
    add("--isa", default="auto", metavar="NAME")
    add("-t", "--threads", type=positive, metavar="N")


def check_shape(options: argparse.Namespace, parser: Parser) -> argparse.Namespace:
    options.kv_heads = options.kv_heads or options.heads
    if options.heads % options.kv_heads:
        parser.error(f"--kv-heads: {options.heads} heads do not divide by {options.kv_heads}")
    return options


def shape_of(options: argparse.Namespace, length: int) -> AttentionShape:
    return AttentionShape(options.heads, options.kv_heads, options.head_dim, (length,))


def rigs(device: Device, dense: AttentionShape, window: int, sink: int) -> tuple[AttentionRig, AttentionRig]:
    """Dense and streaming attention over the same keys and values, stored."""
    windowed = replace(dense, window=window, sink=sink)
    pair = AttentionRig(device, dense, "flash"), AttentionRig(device, windowed, "streaming")
    for rig in pair:
        rig.store()
    return pair


def run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    device = open_device(options.device, isa=options.isa, threads=options.threads)
    pair = rigs(device, shape_of(options, options.length), options.window, options.sink)
    print(f"{options.heads} heads of {options.head_dim} on {options.kv_heads}, {options.length} positions, window "
          f"{options.window}, sinks {options.sink}; {device.type} {device.description}; float32 cache, median of "
          f"at least {options.iters} rounds\n")  # fmt: skip
    print("| | dense | streaming+window | speed-up | work ratio |\n|---|---|---|---|---|")
    errors = [[rig.error(CHECKED) for rig in pair]]
    for rows, what in ((options.length, f"{options.length} rows in one step"), (1, "the last row alone")):
        for rig in pair:
            rig.select(rows)
        print(f"| {what} | {compare(pair, rows, options.iters)} |", flush=True)
    errors.append([rig.error() for rig in pair])
    worst = [max(found) for found in zip(*errors, strict=True)]
    passed = max(worst) <= LARGEST_ERROR
    verdict = "PASS" if passed else "FAIL"
    checked = min(CHECKED, options.length)
    print(f"\n{verdict}: largest difference from NumPy over {checked} rows and the last one alone: "
          f"dense {worst[0]:.1e}, streaming {worst[1]:.1e}; allowed {LARGEST_ERROR:.0e}")  # fmt: skip
    return 0 if passed else FAILED


def compare(pair: tuple[AttentionRig, AttentionRig], rows: int, rounds: int) -> str:
    """Milliseconds of both, speed-up and work ratio, as cells of a table."""
    dense, streaming = medians([rig.attend for rig in pair], rounds)
    work = pair[0].shape.scores(rows) / pair[1].shape.scores(rows)
    return f"{dense * 1e3:.3f} ms | {streaming * 1e3:.3f} ms | {dense / streaming:.1f}× | {work:.1f}×"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
