"""Requests that arrive at different times: how much is generated in shared steps, and how long each request waits.

    python -m demo.arrivals MODEL --requests 32 --rate 1,4,all -b 1,8 -p 128 -n 64

Requests come at random times, `rate` of them a second on average (a Poisson process), or `all` at once. Prompts have
between half of P and P random tokens, and half of N to N tokens are generated for each; times and lengths are the same
for every row. Up to `batch` of them share steps, the others queue: with 1, each has the model to itself. Columns:
tokens a second from the first arrival to the last token; the time from a request's arrival to its first token; and
the time of each token after that, as a mean of the request. Medians, and the 95th percentile, over the requests.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demo.options import OptionError, Parser, lengths, positive
from demo.program import run_program, tell
from engine import LLM, Completion, SamplingParams
from engine.default_model import default_model

NAME = "demo.arrivals"
AT_ONCE = "all"
HEADER = """\
| batch | requests a second | all done in | generated tokens/s | first token | each token after it |
|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Arrival:
    """seconds: after the start."""

    seconds: float
    prompt: list[int]
    generate: int


def rates(text: str) -> list[float]:
    """Requests a second, or `all`, with commas between them."""
    try:
        found = [np.inf if part == AT_ONCE else float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(rate > 0 for rate in found) or found.count(np.inf) != text.split(",").count(AT_ONCE):
        raise argparse.ArgumentTypeError(f"expected positive numbers or {AT_ONCE}, like 1,2.5,all, got {text[:40]!r}")
    return found


def arrivals(options: argparse.Namespace, rate: float, vocab_size: int) -> list[Arrival]:
    rng, tokens = np.random.default_rng(0), np.random.default_rng()  # no prompt comes twice: it would be in the cache
    sizes, counts = (some(rng, most, options.requests) for most in (options.prompt_len, options.gen_len))
    at = np.cumsum(rng.exponential(1.0, options.requests)) / rate
    prompts = [tokens.integers(0, vocab_size, size).tolist() for size in sizes]
    return [Arrival(float(s - at[0]), p, int(n)) for s, p, n in zip(at, prompts, counts, strict=True)]


def some(rng: np.random.Generator, most: int, count: int) -> np.ndarray:
    """Numbers from half of the most to the most."""
    return rng.integers((most + 1) // 2, most + 1, count)


def serve(llm: LLM, asked: Sequence[Arrival]) -> tuple[float, list[Completion]]:
    """Hands in each request at its time. Returns the seconds until all are done, and what came of them."""
    outcomes: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()
    start = time.perf_counter()

    def ask(number: int, arrival: Arrival) -> None:
        try:
            time.sleep(max(0.0, start + arrival.seconds - time.perf_counter()))
            params = SamplingParams(temperature=0, max_tokens=arrival.generate, ignore_eos=True)
            outcomes.put((number, llm.generate(arrival.prompt, params)))
        except Exception as error:
            outcomes.put((number, error))

    for pair in enumerate(asked):
        threading.Thread(target=ask, args=pair, daemon=True).start()
    completions: dict[int, Completion] = {}
    while len(completions) < len(asked):
        number, outcome = outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome  # at once: nobody waits for those that are still to come
        completions[number] = outcome
    return time.perf_counter() - start, [completions[number] for number in range(len(asked))]


def row(batch: int, rate: float, seconds: float, completions: Sequence[Completion]) -> str:
    timings = [completion.timings for completion in completions]
    first = [t.first_token_seconds for t in timings]
    each = [t.generate_seconds / (t.generated_tokens - 1) for t in timings if t.generated_tokens > 1]
    cells = [
        str(batch), AT_ONCE if rate == np.inf else f"{rate:g}", f"{seconds:.1f} s",
        f"{sum(t.generated_tokens for t in timings) / seconds:.1f}",
        *(milliseconds(times) for times in (first, each)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def milliseconds(times: Sequence[float]) -> str:
    return f"{np.median(times) * 1e3:.3g} ms ({np.percentile(times, 95) * 1e3:.3g})" if times else "–"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="by default the bundled one")
    add("--requests", type=positive, default=32, metavar="N", help="by default 32")
    add("--rate", type=rates, default=[1.0, np.inf], metavar="LIST", help="requests a second; by default 1,all")
    add("-b", "--batch", type=lengths, default=[1, 8], metavar="LIST", help="requests in a step; by default 1,8")
    add("-p", "--prompt-len", type=positive, default=128, metavar="P", help="by default 128")
    add("-n", "--gen-len", type=positive, default=64, metavar="N", help="by default 64")
    for name in ("device", "isa", "dtype", "kv-dtype"):
        add(f"--{name}", default="auto", metavar="NAME")
    add("-t", "--threads", type=positive, metavar="N")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    names = ("device", "isa", "dtype", "kv_dtype", "threads")
    settings = {name: getattr(options, name) for name in names}
    room = options.prompt_len + options.gen_len + 1
    for batch in options.batch:
        with LLM(options.model or default_model(), max_batch=batch, max_seq_len=room, **settings) as llm:
            if room > llm.max_seq_len:
                raise OptionError(f"this needs {room} positions, {llm.name} has {llm.max_seq_len}: lower --prompt-len "
                                  "or --gen-len")  # fmt: skip
            tell(NAME, f"{llm.name}, {llm.device.type} {llm.device.description}")
            if batch == options.batch[0]:
                print(HEADER, flush=True)
            for rate in options.rate:
                llm.generate([[1, 2, 3]] * batch, SamplingParams(max_tokens=2))  # to warm up
                print(row(batch, rate, *serve(llm, arrivals(options, rate, llm.config.vocab_size))), flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
