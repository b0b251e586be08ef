"""Flash attention beside PyTorch's `scaled_dot_product_attention`, causal, all rows of a prompt in one step.

    python -m tools.compare_sdpa --lengths 1024,2048,4096,8192 --kv-dtype float32,bfloat16

Needs PyTorch (`pip install '.[bench]'`). 16 heads of 128. Both take turns, with as many threads; PyTorch's
queries, keys and values are all in the dtype of the cache, Rill's queries and outputs in float32. The limit is what the
ISA multiplies and adds in registers, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from demo.attention_rig import AttentionRig, AttentionShape
from demo.options import Parser, lengths, positive
from demo.program import listed, run_program
from demo.timing import interleaved, seconds
from engine import RillError
from engine.device import Device, open_device
from engine.runner import KV_DTYPES

NAME = "tools.compare_sdpa"
HEADS, HEAD_DIM = 16, 128


def import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RillError(f"there is no PyTorch to compare with: {error}; pip install 'rill-engine[bench]'") from None
    return torch


def compare(device: Any, torch: Any, dtype: str, length: int, rounds: int) -> str:
    """The cells of one row."""
    shape = AttentionShape(HEADS, HEADS, HEAD_DIM, (length,))
    rig = AttentionRig(device, shape, "flash", KV_DTYPES[dtype])
    rig.store()
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, dtype=getattr(torch, dtype)) for _ in range(3)]
    attend = partial(torch.nn.functional.scaled_dot_product_attention, *inputs, is_causal=True)
    limit = partial(device.multiply_limit, KV_DTYPES[dtype])
    works = [partial(seconds, rig.attend), partial(seconds, attend), limit]
    with torch.inference_mode():
        mine, theirs, limits = map(median, interleaved(works, rounds))
    rate = 4 * HEADS * HEAD_DIM * shape.scores() / mine
    return (f"{dtype} | {length} | {mine * 1e3:.2f} ms | {theirs * 1e3:.2f} ms | {theirs / mine:.2f} | "
            f"{rate / 1e9:.0f} GFLOP/s | {rate / limits:.0%}")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    torch = import_torch()
    device: Device = open_device("cpu", isa=options.isa, threads=options.threads)
    torch.set_num_threads(device.threads)  # type: ignore[attr-defined]
    print(f"{device.description}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads; medians of "
          f"{options.rounds} rounds\n")  # fmt: skip
    print("| dtype | T | Rill | PyTorch | PyTorch ÷ Rill | Rill | share of the limit |\n" + "|---" * 7 + "|")
    for dtype in options.kv_dtype:
        for length in options.lengths:
            print(f"| {compare(device, torch, dtype, length, options.rounds)} |", flush=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lengths", type=lengths, default=[1024, 2048, 4096, 8192])
    add("--kv-dtype", type=listed, default=["float32", "bfloat16"])
    add("--isa", default="auto", metavar="NAME")
    add("-r", "--rounds", type=positive, default=5)
    add("-t", "--threads", type=positive)
    options = parser.parse_args(arguments)
    if wrong := [name for name in options.kv_dtype if name not in ("float32", "bfloat16", "float16")]:
        parser.error(f"--kv-dtype: expected float32, bfloat16 or float16, got {wrong[0]!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
