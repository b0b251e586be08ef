"""Sinks and a window without end: time by position, and a long text.

    python -m demo.endless MODEL --sink 4 --window 252 --positions 1024,65536,1048576 --tokens 100000

First single rows at positions far apart, in interleaved rounds: positions are skipped ahead, what is computed for a
row is the same. Then one text of so many tokens, in tenths: the time of each piece of it, and what the cache and the
memory of the process had come to, in which the text itself is kept. Logits that are no numbers would end it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from statistics import median, quantiles

from demo.options import Parser, integer, lengths, positive
from demo.program import FAILED, run_program
from demo.timing import interleaved, seconds
from engine import LLM, SamplingParams
from engine.abi import LAST_POS
from engine.default_model import default_model
from engine.machine import peak_memory
from engine.step import Segment

NAME = "demo.endless"
FLAT = 0.05  # the most by which times may differ, as a share of the shortest
PARTS = 10
OPENING = "Once upon a time"
MB = 1e6


def open_model(options: argparse.Namespace) -> LLM:
    names = ("sink", "window", "device", "isa", "dtype", "kv_dtype", "threads")
    return LLM(options.model, attention="streaming", max_batch=1, **{name: getattr(options, name) for name in names})


def time_positions(llm: LLM, positions: Sequence[int], rounds: int) -> list[list[float]]:
    """Seconds of a step of one row at each of the positions, by round."""

    def step(position: int) -> None:
        llm.runner.run([Segment(0, position, [position % llm.config.vocab_size])], [])

    works = [partial(seconds, partial(step, position)) for position in positions]
    return interleaved(works, rounds)


def show_positions(llm: LLM, positions: Sequence[int], rounds: int) -> bool:
    """Prints the table; whether times are flat."""
    found = time_positions(llm, positions, rounds)
    shortest = min(median(times) for times in found)
    print("| position | median | middle half | above the shortest |\n|---|---|---|---|")
    for position, times in zip(positions, found, strict=True):
        low, middle, high = quantiles(times, n=4)
        print(f"| {position:,} | {middle * 1e6:.1f} µs | {low * 1e6:.1f} to {high * 1e6:.1f} | "
              f"{middle / shortest - 1:.1%} |")  # fmt: skip
    flat = all(median(times) <= (1 + FLAT) * shortest for times in found)
    print(f"\n{'PASS' if flat else 'FAIL'}: flat within {FLAT:.0%}, {rounds} interleaved rounds, one row each\n")
    return flat


def timed_parts(pieces: Iterable[str], size: int) -> Iterator[tuple[int, float]]:
    """After every `size` pieces and at the end: how many there have been, and seconds a piece since the last time."""
    count, before, then = 0, 0, time.perf_counter()
    for count, _ in enumerate(pieces, 1):
        if count % size == 0:
            now = time.perf_counter()
            yield count, (now - then) / size
            before, then = count, now
    if count > before:
        yield count, (time.perf_counter() - then) / (count - before)


def show_text(llm: LLM, count: int) -> None:
    """Writes one text of `count` tokens, and prints a row for each tenth of it. A piece of text is nearly always a
    token."""
    print("| pieces of text | each | cache | peak memory |\n|---|---|---|---|")
    pieces = llm.stream(OPENING, SamplingParams(max_tokens=count, ignore_eos=True, seed=0))
    for number, each in timed_parts(pieces, count // PARTS):
        used, peak = llm.runner.cache_used_bytes / MB, peak_memory() / MB
        print(f"| {number:,} | {each * 1e6:.0f} µs | {used:.2f} MB | {peak:.0f} MB |", flush=True)
    print(f"\n{count:,} tokens")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="by default the bundled one")
    add("--sink", type=integer, default=4, metavar="N", help="by default 4")
    add("--window", type=positive, default=252, metavar="N", help="by default 252")
    add("--positions", type=lengths, default=[1024, 16384, 131072, 1048576], metavar="LIST")
    add("--tokens", type=positive, default=1000, metavar="N", help="of the text; by default 1000, at least 10")
    add("-r", "--rounds", type=positive, default=200, metavar="N", help="by default 200, at least 2")
    for name in ("device", "isa", "dtype", "kv-dtype"):
        add(f"--{name}", default="auto", metavar="NAME")
    add("-t", "--threads", type=positive, metavar="N")
    options = parser.parse_args(arguments)
    if options.tokens < PARTS:
        parser.error(f"--tokens: expected {PARTS} or more, got {options.tokens}")
    if options.rounds < 2:
        parser.error(f"--rounds: expected 2 or more, got {options.rounds}")
    if any(position > LAST_POS for position in options.positions):
        parser.error(f"--positions: expected {LAST_POS} at most")
    return options


def run(options: argparse.Namespace) -> int:
    options.model = options.model or default_model()
    with open_model(options) as llm:
        print(f"{llm.name}, {options.sink} sinks and a window of {options.window}; {llm.device.type} "
              f"{llm.device.description}\n")  # fmt: skip
        flat = show_positions(llm, options.positions, options.rounds)
        show_text(llm, options.tokens)
    return 0 if flat else FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
