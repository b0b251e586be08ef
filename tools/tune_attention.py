"""Measures which blocks of keys and which kinds of attention are fastest here, and writes them down.

    make tune        (python -m tools.tune_attention > SWEEP.md)

The table, engine/attention_table.json, decides the bits of a row, so it is committed and changes on purpose only.
For each ISA of this machine, each dtype of the cache and some head_dims it holds the block of keys of flash and of
streaming attention, and the kind that "auto" takes from which position on. Rows of ISAs that this machine lacks stay.
Stdout gets what was compared, a row of Markdown for each comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

from demo.attention_rig import AttentionRig, AttentionShape
from demo.timing import medians
from engine.attention_table import KV_BLOCKS, TABLE
from engine.device import Device, open_device
from engine.device.cpu import available_isas
from engine.runner import KV_DTYPES

HEAD_DIMS = (64, 128)
POSITIONS = (128, 1024, 8192)  # at which kinds are compared
PROMPT_ROWS = 512
Sweep = tuple[str, dict[str, float]]  # what was compared, seconds of each
CLOSE = 1.03  # a kind that is so little slower is as good: the table stays short


def work_at(device: Device, kind: str, dtype: np.dtype, head_dim: int, position: int, kv_block: int | None) -> list:
    """What is timed: the last rows of a prompt that ends at a position, and the last one alone."""
    shape = AttentionShape(heads=16, kv_heads=8, head_dim=head_dim, lengths=(position,))
    rows = min(PROMPT_ROWS, position)
    prompt = AttentionRig(device, shape, kind, dtype, rows=rows, kv_block=kv_block)
    single = AttentionRig(device, shape, kind, dtype, rows=1, kv_block=kv_block)
    for rig in (prompt, single):
        rig.store()
    return [prompt.attend, single.attend]


def compare(device: Device, dtype: np.dtype, head_dim: int, position: int, candidates: list[tuple[str, int | None]],
            rounds: int) -> dict[tuple[str, int | None], float]:  # fmt: skip
    """Geometric mean of the seconds of a prompt's rows and of a single row, for each (kind, block of keys)."""
    pairs = [work_at(device, kind, dtype, head_dim, position, block) for kind, block in candidates]
    prompts = medians([pair[0] for pair in pairs], rounds)
    singles = medians([pair[1] for pair in pairs], rounds)
    return {c: math.sqrt(p * s) for c, p, s in zip(candidates, prompts, singles, strict=True)}


def tune(device: Device, dtype: np.dtype, head_dim: int, rounds: int) -> tuple[dict, list[Sweep]]:
    """One entry of the table, and what it was chosen from."""
    blocks, sweeps = {}, []
    for kind in ("flash", "streaming"):
        tried = compare(device, dtype, head_dim, POSITIONS[-1], [(kind, block) for block in KV_BLOCKS], rounds)
        blocks[kind] = min(tried, key=lambda c: tried[c])[1]
        sweeps.append((f"{kind}, {POSITIONS[-1]}", {str(block): time for (_, block), time in tried.items()}))
    auto: list[list] = []
    for start, position in zip((0, *POSITIONS), POSITIONS, strict=False):
        kinds = [("standard", None), *blocks.items()]
        times = compare(device, dtype, head_dim, position, kinds, rounds)
        seconds = {kind: time for (kind, _), time in times.items()}
        best = min(seconds, key=lambda kind: seconds[kind])
        if not auto or seconds[auto[-1][1]] > CLOSE * seconds[best]:
            auto.append([start, best])
        sweeps.append((f"kinds, {position}", seconds))
    return {"kv_block": blocks, "auto": auto}, sweeps


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=",".join(available_isas()), help="with commas; by default all of this machine")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, default=TABLE)
    options = parser.parse_args()
    table = json.loads(TABLE.read_text("utf-8"))
    print("| ISA, cache, head_dim | compared | the fastest, and how much longer the others take |\n|---|---|---|")
    for isa in options.isa.split(","):
        device = open_device("cpu", isa=isa, threads=options.threads)
        for name, dtype in KV_DTYPES.items():
            for head_dim in HEAD_DIMS:
                print(f"{isa} {name} head_dim {head_dim}", file=sys.stderr)
                entry, sweeps = tune(device, dtype, head_dim, options.rounds)
                report(f"{isa}, {name}, {head_dim}", sweeps)
                table["choices"].setdefault(isa, {}).setdefault(name, {})[str(head_dim)] = entry
                options.output.write_text(dump(table), "utf-8")


def report(what: str, sweeps: list[Sweep]) -> None:
    """Lines of Markdown: the fastest choice of each comparison in microseconds, the others as how many times that."""
    for compared, seconds in sweeps:
        best = min(seconds.values())
        cells = [f"{k}: {s * 1e6:.0f} µs" if s == best else f"{k}: {s / best:.2f} ×" for k, s in seconds.items()]
        print(f"| {what} | {compared} | {', '.join(cells)} |", flush=True)


def dump(table: dict) -> str:
    """JSON with one entry a line."""
    lines = []
    for isa, dtypes in table["choices"].items():
        entries = [f'      "{size}": {json.dumps(entry)}' for sizes in dtypes.values() for size, entry in sizes.items()]
        parts, i = [], 0
        for name, sizes in dtypes.items():
            parts.append(f'    "{name}": {{\n' + ",\n".join(entries[i : i + len(sizes)]) + "\n    }")
            i += len(sizes)
        lines.append(f'  "{isa}": {{\n' + ",\n".join(parts) + "\n  }")
    return '{"choices": {\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    main()
