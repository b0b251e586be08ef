"""Times prompts and generation, with the share of the machine's limit beside every figure.

    python -m demo.benchmark MODEL -p 512 -n 64 -r 5 --isa avx512_bf16,avx2 -o json

A prompt of P tokens is row `ppP`, N generated tokens are row `tgN`; text is not timed. The limit of generation, reading
all weights once a token, is measured in the same run, round by round beside the figures: each share is the median over
the rounds, so that a machine whose speed drifts does not bend it. `--load` adds a row for loading, in bytes a second:
its limit is reading the same file with as many threads into memory that is as fresh.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import LLM, RillError, SamplingParams
from engine.device.cpu import reserve
from engine.plan import nbytes


@dataclass
class Row:
    """One line of the table. Rates are in tokens a second, of loading and of limits in bytes a second."""

    model: str
    dtype: str
    isa: str
    attention: str
    threads: int
    test: str
    rate: float
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
    return measure_limit() if measure_limit else 0.0


def bytes_per_token(llm: LLM, length: float) -> float:
    """What a generated token has to read: every matrix, once where tied, and the keys and values of `length`
    positions. An untied embedding gives up one row only."""
    table = llm.runner.model.embedding.table
    weights = sum(nbytes(w) for w in llm.runner.weights if w.layout == "matrix")
    if not llm.config.tie_word_embeddings:
        weights -= nbytes(table)
    position = 2 * llm.config.num_key_value_heads * llm.config.head_dim * llm.runner.layers[0].dtype.itemsize
    return weights + length * position * llm.config.num_hidden_layers


def measure_load(options: argparse.Namespace, isa: str) -> Row:
    """Loads the model and reads its files in turn."""
    rates, limits = [], []
    for _ in range(options.rounds + 1):
        with open_model(options, isa) as llm:
            rates.append(llm.runner.weight_bytes / llm.weights_seconds)
            size, threads = llm.runner.weight_bytes, getattr(llm.device, "threads", 1)
            files = {source.file for w in llm.runner.weights for source in w.sources if hasattr(source, "file")}
        limits.append(read_files(sorted(files), threads))
    shares = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
    return row(llm, f"load {size / 1e6:.0f} MB", rates[1:], limits[1:], shares[1:])


def read_files(files: list[Path], threads: int) -> float:
    """Bytes a second of plain reads into fresh memory, each thread its part of every file."""

    def read(file: Path, memory: np.ndarray, part: int) -> None:
        begin, end = memory.nbytes * part // threads, memory.nbytes * (part + 1) // threads
        with open(file, "rb", buffering=0) as stream:
            stream.seek(begin)
            while begin < end:
                begin += stream.readinto(memory[begin : min(end, begin + (1 << 20))].data) or end

    started = time.perf_counter()
    fresh = [reserve(file.stat().st_size) for file in files]
    with ThreadPoolExecutor(threads) as pool:
        for file, memory in zip(files, fresh, strict=True):
            list(pool.map(lambda part, f=file, m=memory: read(f, m, part), range(threads)))
    return sum(memory.nbytes for memory in fresh) / (time.perf_counter() - started)


def row(llm: LLM, test: str, rates: list[float], limits: Any = None, shares: Any = None) -> Row:
    device: Any = llm.device
    return Row(
        llm.directory.name, llm.runner.model.embedding.table.dtype.name, getattr(device, "isa", device.type),
        llm.attention, getattr(device, "threads", 1), test, statistics.median(rates),
        statistics.stdev(rates) if len(rates) > 1 else 0.0,
        statistics.median(limits) if limits else None, statistics.median(shares) if shares else None,
    )  # fmt: skip


HEAD = "| model | dtype | isa | threads | test | rate | limit | share |\n" + "|---" * 8 + "|"


def line(r: Row) -> str:
    limit = f"{r.limit / 1e9:.2f} GB/s" if r.limit else ""
    share = f"{r.limit_share:.1%}" if r.limit_share else ""
    scale, unit = (1e9, "GB/s") if r.test.startswith("load") else (1, "tokens/s")
    rate = f"{r.rate / scale:.2f} ± {r.stddev / scale:.2f} {unit}"
    return f"| {r.model} | {r.dtype} | {r.isa} | {r.threads} | {r.test} | {rate} | {limit} | {share} |"


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
    parser.add_argument("--load", action="store_true", help="time loading too")
    parser.add_argument("-o", "--output", choices=["md", "json"], default="md")
    options = parser.parse_args(arguments)
    if min(options.prompt_len, options.gen_len, options.rounds) < 1:
        parser.error("lengths and rounds must be at least 1")
    return options


def open_model(options: argparse.Namespace, isa: str) -> LLM:
    return LLM(options.model, device=options.device, isa=isa, dtype=options.dtype, kv_dtype=options.kv_dtype,
               threads=options.threads, max_batch=1,
               max_seq_len=options.prompt_len + options.gen_len + 1)  # fmt: skip


def run(options: argparse.Namespace) -> Iterator[Row]:
    for isa in options.isa.split(","):
        if options.load:
            yield measure_load(options, isa)
        with open_model(options, isa) as llm:
            print(llm.device.description, file=sys.stderr)
            yield from measure(llm, options.prompt_len, options.gen_len, options.rounds)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows: list[Row] = []
    try:
        if options.output == "md":
            print(HEAD)
        for r in run(options):
            rows.append(r)
            if options.output == "md":
                print(line(r), flush=True)
    except RillError as error:
        print(f"demo.benchmark: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.output == "json":
        print(json.dumps([asdict(r) for r in rows], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
