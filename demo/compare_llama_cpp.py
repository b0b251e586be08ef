"""Rill and llama.cpp side by side: the same tests, the same number of threads, in turn.

    python -m demo.compare_llama_cpp LLAMA_BENCH BF16.gguf Q8_0.gguf Q8_0.gguf=int8 --model OUT -t 1,2 -r 5 -o PREFIX

LLAMA_BENCH is llama.cpp's own benchmark program. It gets each FILE.gguf; so does Rill, or the model of --model with a
dtype of its own where one stands after the equals sign. `ppP` is a prompt of P tokens, `tgN` are N steps that
generate, `@ D` has D tokens in the cache before the clock starts; nothing but that is timed. A round is one test of
both programs, each warmed up, and they take turns at going first. Rates are the mean of the rounds ± the standard
deviation; the share is that of Rill's limit (see demo.benchmark) in the median round; the ratio is Rill's rate over
llama.cpp's in the median round, with the least and the greatest, and of the fastest round of each, which other
programs disturbed least. The last column is how many CPUs those kept busy, on average.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from demo.artifacts import about_machine, write_json
from demo.llama_bench import LlamaBench
from demo.methods import Method
from demo.options import OptionError, Parser, counts, lengths, positive
from demo.peer_rows import HEAD, Pair, Round
from demo.program import check_output, run_program
from demo.timed_model import TimedModel, Trial, describe
from demo.timing import OthersUse, taking_turns
from engine import LLM

NAME = "demo.compare_llama_cpp"
SHOWN = ("threads", "isa", "model", "dtype", "kv_dtype")  # what a pair says of Rill


@dataclass(frozen=True)
class Weights:
    """What a pair runs: llama.cpp the file, Rill a model in a dtype, as stored if "auto"."""

    file: Path
    model: str
    dtype: str


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("llama_bench", type=Path, metavar="LLAMA_BENCH", help="the program llama-bench of llama.cpp")
    add("weights", nargs="+", metavar="FILE.gguf[=DTYPE]", help="with a dtype: Rill runs --model in it instead")
    add("--model", metavar="MODEL", help="as for rill")
    add("-p", "--prompt-len", type=counts, default=[512], metavar="LIST",
        help="tokens of prompts, by default 512; 0: none")
    add("-n", "--gen-len", type=counts, default=[32], metavar="LIST", help="steps; by default 32, 0: none")
    add("-d", "--depth", type=counts, default=[0], metavar="LIST",
        help="tokens in the cache before steps; by default 0")
    add("-t", "--threads", type=lengths, default=[1], metavar="LIST", help="of both; by default 1")
    add("-r", "--iters", type=positive, default=5, metavar="N", help="rounds; by default 5")
    add("--bench-options", default="", metavar="WORDS", help="more options of LLAMA_BENCH, in one word")
    add("-o", "--output", type=Path, metavar="PREFIX", help="PREFIX.json: every round, the machine and the versions")
    options = parser.parse_intermixed_args(arguments)
    options.weights = [weights(text, options.model) for text in options.weights]
    if not trials(options):
        raise OptionError("nothing to do: --prompt-len or --gen-len of more than 0")
    if options.output:
        check_output(options.output)
    return options


def weights(text: str, model: str | None) -> Weights:
    file, _, dtype = text.partition("=")
    if dtype and model is None:
        raise OptionError(f"{text}: which model in {dtype}? --model names it")
    if not Path(file).is_file():
        raise OptionError(f"{file}: no such file")
    return Weights(Path(file), str(model if dtype else file), dtype or "auto")


def trials(options: argparse.Namespace) -> list[Trial]:
    prompts = [Trial(0, 1, prompt_len=length) for length in options.prompt_len if length]
    return prompts + [Trial(depth, 1, gen_len=n) for depth, n in product(options.depth, options.gen_len) if n]


def compare(options: argparse.Namespace, bench: LlamaBench) -> Iterator[Pair]:
    """The models of one number of threads are open at once, so that no round has to load one."""
    wanted = trials(options)
    room = max(trial.room for trial in wanted)
    for threads in options.threads:
        with ExitStack() as opened:
            pairs = [(w, opened.enter_context(LLM(w.model, device="cpu", dtype=w.dtype, threads=threads, max_batch=1,
                                                  max_seq_len=room))) for w in options.weights]  # fmt: skip
            for trial, (which, llm) in product(wanted, pairs):
                yield compare_pair(bench, which, llm, trial, options.iters)


def compare_pair(bench: LlamaBench, which: Weights, llm: LLM, trial: Trial, rounds: int) -> Pair:
    """One line of the table. llama-bench warms up by itself, every time."""
    timed = TimedModel(llm, Method("cpu", "auto", dtype=which.dtype), trial)
    about = describe(llm, timed.method)
    timed.sample()
    bench_peer = partial(bench.sample, which.file, trial, about["threads"])
    others, kept = OthersUse(), []
    for peer, rill in taking_turns(bench_peer, timed.sample, rounds):
        kept.append(Round(rill.rate, rill.share, peer.tokens_per_second, others.since()))
    return Pair(test=trial.name, depth=trial.depth, **{name: about[name] for name in SHOWN}, rounds=kept,
                peer_weights=peer.weights, peer_kv_dtype=peer.kv_dtype, peer_build=peer.build)  # fmt: skip


def run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    bench = LlamaBench(options.llama_bench, shlex.split(options.bench_options))
    pairs = []
    print(f"{HEAD}\n{'|---' * HEAD.count(' | ')}|---|", flush=True)
    for pair in compare(options, bench):
        pairs.append(pair.content())
        print(pair.line(), flush=True)
        if options.output:  # every time: a long run that is stopped leaves what it has
            content = {**about_machine(), "bench_options": options.bench_options, "pairs": pairs}
            write_json(options.output.with_suffix(".json"), content)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
