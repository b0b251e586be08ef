"""Times prompts and generation, with the share of the machine's limit beside the figures.

    python -m demo.benchmark MODEL -p 512,2048 -n 64 -r 5 --method avx512,avx2 --attention flash,streaming -o json
    python -m demo.benchmark MODEL --verify 151644,872,198 --gen-len 3 --method baseline,avx2,avx512,numpy

A prompt of P tokens is row `ppP`, N tokens generated after it are row `tgN`; text is not timed. Every method, kind of
attention and number of threads runs once a round, so that a machine whose speed drifts bends none against another, and
figures are medians over the rounds. The limit of generation, reading all weights and the keys and values once a token,
is measured in the same rounds. `--load` adds rows for loading, in bytes a second: their limit is reading the same file
with as many threads into memory that is as fresh. `--verify` compares tokens with NumPy's instead of timing anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from demo.attention_rig import attention_nodes
from demo.methods import Method, isa_of, methods, open_model, threads_of
from demo.options import OptionError, Parser, add_attention, lengths, misfit_window, positive, token_ids
from demo.program import FAILED, check_kinds, listed, run_program, tell
from demo.timing import interleaved
from engine import LLM, SamplingParams
from engine.kvcache import PAGE
from engine.plan import Tensor, nbytes

NAME = "demo.benchmark"


@dataclass
class Row:
    """One line of the table. `stddev` is in the unit of the rate, `limit` in bytes a second."""

    model: str
    dtype: str
    isa: str
    attention: str
    threads: int
    test: str
    prompt_len: int | None
    gen_len: int | None
    tokens_per_second: float | None
    stddev: float
    limit: float | None = None
    limit_share: float | None = None
    bytes_per_second: float | None = None


@dataclass
class Sample:
    """One round of one model: tokens a second of each phase, and the bytes a second that its threads can read."""

    prefill: float
    decode: float
    limit: float


class Timed:
    """A model to be timed with prompts of one length. A prompt is never the last round's, or the cache would know it;
    where only generation counts it always is."""

    def __init__(self, llm: LLM, prompt_len: int, gen_len: int, phases: Sequence[str]) -> None:
        self.llm, self.prompt_len, self.gen_len, self.phases = llm, prompt_len, gen_len, phases
        self.rng = np.random.default_rng(0)
        self.prompt = self._draw()

    def _draw(self) -> list[int]:
        return self.rng.integers(0, self.llm.config.vocab_size, self.prompt_len).tolist()

    def sample(self) -> Sample:
        decode = "decode" in self.phases
        if "prefill" in self.phases:
            self.prompt = self._draw()
        limit = read_limit(self.llm) if decode else 0.0
        params = SamplingParams(temperature=0, max_tokens=self.gen_len + 1 if decode else 1, ignore_eos=True)
        timings = self.llm.generate(self.prompt, params).timings
        return Sample(timings.prompt_tokens_per_second, timings.generated_tokens_per_second, limit)

    def rows(self, samples: list[Sample]) -> Iterator[Row]:
        if "prefill" in self.phases:
            rates = [s.prefill for s in samples]
            yield self._row(f"pp{self.prompt_len}", rates, None)
        if "decode" in self.phases:
            rates, limits = [s.decode for s in samples], [s.limit for s in samples]
            row = self._row(f"tg{self.gen_len}", rates, self.gen_len)
            if all(limits):
                moved = bytes_per_token(self.llm, self.prompt_len + self.gen_len / 2)
                row.limit = statistics.median(limits)
                shares = (rate * moved / limit for rate, limit in zip(rates, limits, strict=True))
                row.limit_share = statistics.median(shares)
            yield row

    def _row(self, test: str, rates: list[float], gen_len: int | None) -> Row:
        return Row(**describe(self.llm), test=test, prompt_len=self.prompt_len, gen_len=gen_len,
                   tokens_per_second=statistics.median(rates), stddev=spread(rates))  # fmt: skip


def describe(llm: LLM) -> dict[str, Any]:
    """What ran: the first fields of its rows."""
    return {"model": llm.directory.name, "dtype": llm.runner.model.embedding.table.dtype.name, "isa": isa_of(llm),
            "attention": llm.attention, "threads": threads_of(llm)}  # fmt: skip


def spread(rates: list[float]) -> float:
    return statistics.stdev(rates) if len(rates) > 1 else 0.0


def read_limit(llm: LLM) -> float:
    measure = getattr(llm.device, "read_limit", None)
    return measure() if measure else 0.0


def bytes_per_token(llm: LLM, length: float) -> float:
    """What a generated token has to read: every matrix, once where tied, and the keys and values that it sees of
    `length` positions. An untied embedding gives up one row only."""
    weights = sum(nbytes(w) for w in llm.runner.weights if w.layout == "matrix")
    if not llm.config.tie_word_embeddings:
        weights -= nbytes(llm.runner.model.embedding.table)
    nodes = {node.tensors["kv"]: node.scalars for node in attention_nodes(llm.runner.plan)}
    seen = {kv: min(length, n["window"] + n["sink"]) if n["window"] else length for kv, n in nodes.items()}
    return weights + sum(count * position_bytes(llm, kv) for kv, count in seen.items())


def position_bytes(llm: LLM, layer: Tensor) -> float:
    """Of the keys and values of one position in a layer's cache."""
    return layer.shape[2] * llm.device.cache_bytes(layer.dtype, layer.shape[4]) / PAGE


def time_models(options: argparse.Namespace, pairs: list[Method]) -> Iterator[Row]:
    """All models stay open, so that their rounds can be interleaved."""
    gen_len = options.gen_len or 64
    room = max(options.prompt_len) + (gen_len if "decode" in options.phase else 0) + 1
    with ExitStack() as opened:
        llms = [opened.enter_context(open_model(options, pair, room)) for pair in pairs]
        for llm in llms:
            tell(NAME, f"{llm.device.type} {llm.device.description}, attention {llm.attention}")
        for prompt_len in options.prompt_len:
            timed = [Timed(llm, prompt_len, gen_len, options.phase) for llm in llms]
            for one, samples in zip(timed, interleaved([t.sample for t in timed], options.iters), strict=True):
                yield from one.rows(samples)


def time_loading(options: argparse.Namespace, pairs: list[Method]) -> Iterator[Row]:
    """One row a method: attention has no part in loading."""
    from demo.loading import load_rates

    for pair in {(pair.name, pair.threads): pair for pair in pairs}.values():
        llm, rates, limits = load_rates(partial(open_model, options, pair, 1), options.iters)
        shares = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
        yield Row(**describe(llm), test=f"load {llm.runner.weight_bytes / 1e6:.0f} MB", prompt_len=None, gen_len=None,
                  tokens_per_second=None, stddev=spread(rates), limit=statistics.median(limits),
                  limit_share=statistics.median(shares), bytes_per_second=statistics.median(rates))  # fmt: skip


HEAD = "| model | dtype | isa | attention | threads | prompt | test | rate | limit | share |\n" + "|---" * 10 + "|"


def line(r: Row) -> str:
    limit = f"{r.limit / 1e9:.2f} GB/s" if r.limit else ""
    share = f"{r.limit_share:.1%}" if r.limit_share else ""
    if r.bytes_per_second is not None:
        rate = f"{r.bytes_per_second / 1e9:.2f} ± {r.stddev / 1e9:.2f} GB/s"
    else:
        rate = f"{r.tokens_per_second:.2f} ± {r.stddev:.2f} tokens/s"
    what = f"{r.model} | {r.dtype} | {r.isa} | {r.attention} | {r.threads} | {r.prompt_len or ''} | {r.test}"
    return f"| {what} | {rate} | {limit} | {share} |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="as for rill; without one, the bundled model")
    add("--model", dest="named_model", metavar="MODEL", help="the same")
    add("--phase", choices=["prefill", "decode"], help="by default both")
    add("--method", type=listed, default=["auto"], metavar="LIST", help="baseline, avx2, avx512 (the best of its "
        "family), another ISA by its name, numpy; by default what rill takes")  # fmt: skip
    add_attention(parser)
    add("-p", "--prompt-len", type=lengths, default=[512], metavar="LIST")
    add("-n", "--gen-len", type=positive, metavar="N", help="by default 64, with --verify 3")
    add("-r", "--iters", type=positive, default=5, metavar="N", help="rounds, after one to warm up; by default 5")
    add("-t", "--threads", type=lengths, metavar="LIST")
    add("--dtype", default="auto")
    add("--kv-dtype", default="auto")
    add("--load", action="store_true", help="time loading too")
    add("--verify", type=token_ids, metavar="IDS", help="compare the greedy tokens after these ids with NumPy's")
    add("-o", "--output", choices=["md", "json"], default="md")
    return settle(parser.parse_intermixed_args(arguments))


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Checks what is asked for and fills in what is left open."""
    if options.model and options.named_model:
        raise OptionError("--model: the model is named already")
    from engine.default_model import default_model

    options.model = options.model or options.named_model or str(default_model())
    options.phase = [options.phase] if options.phase else ["prefill", "decode"]
    options.attention = listed(options.attention) if options.attention else ["auto"]
    check_kinds(options.attention)
    if problem := misfit_window(options, options.attention):
        raise OptionError(problem)
    return options


def run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    pairs = methods(options)
    if options.verify:
        from demo.same_tokens import compare_tokens

        return FAILED if compare_tokens(options, pairs, options.verify, options.gen_len or 3) else 0
    rows: list[Row] = []
    for times in [time_loading] * options.load + [time_models]:
        for r in times(options, pairs):
            if options.output == "md":
                print(line(r) if rows else f"{HEAD}\n{line(r)}", flush=True)
            rows.append(r)
    if options.output == "json":
        print(json.dumps([asdict(r) for r in rows], indent=2))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
