"""Times prompts and generation, with the share of the machine's limit beside every figure.

    python -m demo.benchmark MODEL -p 512 -n 64 -r 5 --isa avx512_bf16,avx2 -o json

A prompt of P tokens is row `ppP`, N generated tokens are row `tgN`. Loading and text are not timed. The limit of
generation, reading all weights once a token, is measured in the same run, round by round beside the figures: each
share is the median over the rounds, so that a machine whose speed drifts does not bend it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine import LLM, RillError, SamplingParams
from engine.plan import nbytes


@dataclass
class Row:
    """One line of the table; rates in tokens a second, the limit in bytes a second."""

    model: str
    dtype: str
    isa: str
    attention: str
    threads: int
    test: str
    tokens_per_second: float
    stddev: float
    limit: float | None = None
    limit_share: float | None = None


def measure(llm: LLM, prompt_len: int, gen_len: int, rounds: int) -> list[Row]:
    """A pp and a tg row, of `rounds` rounds after one to warm up."""
    prompts = np.random.default_rng(0).integers(0, llm.config.vocab_size, (rounds + 1, prompt_len)).tolist()
    params = SamplingParams(temperature=0, max_tokens=gen_len + 1, ignore_eos=True)
    prompt_rates, rates, limits = [], [], []
    for prompt in prompts:
        limits.append(read_limit(llm))
        timings = llm.generate(prompt, params).timings
        prompt_rates.append(timings.prompt_tokens_per_second)
        rates.append(timings.generated_tokens_per_second)
    moved = bytes_per_token(llm, prompt_len + gen_len / 2)
    shares = [rate * moved / limit for rate, limit in zip(rates, limits, strict=True)] if all(limits) else []
    return [
        row(llm, f"pp{prompt_len}", prompt_rates[1:]),
        row(llm, f"tg{gen_len}", rates[1:], limits[1:] if shares else None, shares[1:]),
    ]


def read_limit(llm: LLM) -> float:
    measure_limit = getattr(llm.device, "read_limit", None)
    return measure_limit(llm.runner.weights) if measure_limit else 0.0


def bytes_per_token(llm: LLM, length: float) -> float:
    """What a generated token has to read: every matrix, once where tied, and the keys and values of `length`
    positions. An untied embedding gives up one row only."""
    table = llm.runner.model.embedding.table
    weights = sum(nbytes(w) for w in llm.runner.weights if w.layout == "matrix")
    if not llm.config.tie_word_embeddings:
        weights -= nbytes(table)
    position = 2 * llm.config.num_key_value_heads * llm.config.head_dim * llm.runner.layers[0].dtype.itemsize
    return weights + length * position * llm.config.num_hidden_layers


def row(llm: LLM, test: str, rates: list[float], limits: Any = None, shares: Any = None) -> Row:
    device: Any = llm.device
    return Row(
        llm.directory.name, llm.runner.model.embedding.table.dtype.name, getattr(device, "isa", device.type),
        llm.attention, getattr(device, "threads", 1), test, statistics.median(rates),
        statistics.stdev(rates) if len(rates) > 1 else 0.0,
        statistics.median(limits) if limits else None, statistics.median(shares) if shares else None,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    lines = ["| model | dtype | isa | threads | test | tokens/s | read limit | share |", "|---" * 8 + "|"]
    for r in rows:
        limit = f"{r.limit / 1e9:.1f} GB/s" if r.limit else ""
        share = f"{r.limit_share:.1%}" if r.limit_share else ""
        rate = f"{r.tokens_per_second:.2f} ± {r.stddev:.2f}"
        lines.append(f"| {r.model} | {r.dtype} | {r.isa} | {r.threads} | {r.test} | {rate} | {limit} | {share} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-p", "--prompt-len", type=int, default=512)
    parser.add_argument("-n", "--gen-len", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--isa", default="auto", help="one or several, with commas")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("-o", "--output", choices=["md", "json"], default="md")
    options = parser.parse_args(arguments)
    if min(options.prompt_len, options.gen_len, options.rounds) < 1:
        parser.error("lengths and rounds must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows: list[Row] = []
    try:
        for isa in options.isa.split(","):
            with LLM(options.model, device=options.device, isa=isa, dtype=options.dtype, kv_dtype=options.kv_dtype,
                     threads=options.threads, max_batch=1,
                     max_seq_len=options.prompt_len + options.gen_len + 1) as llm:  # fmt: skip
                print(f"{llm.device.description}; loaded in {llm.load_seconds:.1f} s", file=sys.stderr)
                rows += measure(llm, options.prompt_len, options.gen_len, options.rounds)
    except RillError as error:
        print(f"demo.benchmark: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps([asdict(r) for r in rows], indent=2) if options.output == "json" else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
