"""Times prompts and generation, with the share of the machine's limit beside the figures.

    python -m demo.benchmark MODEL -p 512,2048 -n 128 -d 0,4096 -b 1,8 -t 1,2 --dtype auto,float32 -r 5 -o md
    python -m demo.benchmark MODEL -p 512 --method avx512,avx2 --attention flash,streaming -o json
    mpiexec -n 2 python -m mpi4py -m demo.benchmark MODEL -p 512 --method avx512,mpi+avx512
    python -m demo.benchmark MODEL --verify 151644,872,198 --gen-len 3 --method baseline,avx2,avx512,numpy

Row `ppP` is a prompt of P tokens, `tgN` are N steps that generate. Each of `batch` sequences has `depth` tokens in the
cache before the clock starts, and tokens a second count all of them; text is not timed. Every method, dtype, kind of
attention and number of threads runs once a round, so that a machine whose speed drifts bends none against another.
Rates are the mean of the rounds ± the standard deviation. The limit is measured in the same rounds: of generation,
reading all weights and the keys and values once a step; of prompts, the multiply-adds of all products with everything
in registers. `--load` adds rows for loading, in bytes a second: their limit is reading the same file with as many
threads into memory that is as fresh. `--verify` compares tokens with NumPy's instead of timing anything.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, product

from demo.benchmark_rows import Row, print_rows
from demo.methods import Method, methods, open_model
from demo.options import OptionError, Parser, add_attention, counts, lengths, misfit_window, positive, token_ids
from demo.program import FAILED, check_kinds, listed, run_program, tell
from demo.timed_model import TimedModel, Trial, describe, spread
from demo.timing import interleaved

NAME = "demo.benchmark"


def trials(options: argparse.Namespace) -> list[Trial]:
    """One row each, for every model."""
    found = []
    for depth, batch in product(options.depth, options.batch):
        if "prefill" in options.phase:
            found += [Trial(depth, batch, prompt_len=length) for length in options.prompt_len]
        if "decode" in options.phase:
            found.append(Trial(depth, batch, gen_len=options.gen_len or 64))
    return found


def time_models(options: argparse.Namespace, pairs: list[Method]) -> Iterator[Row]:
    """All models stay open, so that their rounds can be interleaved."""
    wanted = trials(options)
    room = max(trial.room for trial in wanted)
    with ExitStack() as opened:
        llms = [opened.enter_context(open_model(options, pair, room, max(options.batch))) for pair in pairs]
        for llm in llms:
            tell(NAME, f"{llm.device.type} {llm.device.description}, attention {llm.attention}")
            if room > llm.max_seq_len:
                raise OptionError(f"this needs {room} positions, {llm.name} has {llm.max_seq_len}: lower "
                                  "--depth, --prompt-len or --gen-len")  # fmt: skip
        for trial in wanted:
            timed = [TimedModel(llm, pair, trial) for llm, pair in zip(llms, pairs, strict=True)]
            for one, samples in zip(timed, interleaved([t.sample for t in timed], options.iters), strict=True):
                yield one.row(samples)


def time_loading(options: argparse.Namespace, pairs: list[Method]) -> Iterator[Row]:
    """One row a method: attention has no part in loading."""
    from demo.loading import load_rates

    for pair in {(pair.name, pair.threads, pair.dtype): pair for pair in pairs}.values():
        llm, rates, limits = load_rates(partial(open_model, options, pair, 1), options.iters)
        shares = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
        yield Row(**describe(llm, pair), batch=None, depth=None, test=f"load {llm.runner.weight_bytes / 1e6:.0f} MB",
                  tokens_per_second=None, stddev=spread(rates), limit=statistics.median(limits),
                  limit_share=statistics.median(shares), bytes_per_second=statistics.mean(rates))  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="as for rill; without one, the bundled model")
    add("--model", dest="named_model", metavar="MODEL", help="the same")
    add("--phase", choices=["prefill", "decode"], help="by default both")
    add("--method", type=listed, default=["auto"], metavar="LIST", help="baseline, avx2, avx512 (the best of its "
        "family), another ISA by its name, numpy, cuda; mpi, mpi+avx2, ...: on all ranks; by default what rill "
        "takes")  # fmt: skip
    add_attention(parser)
    add("-p", "--prompt-len", type=lengths, default=[512], metavar="LIST", help="tokens of prompts; by default 512")
    add("-n", "--gen-len", type=positive, metavar="N", help="by default 64, with --verify 3")
    add("-d", "--depth", type=counts, default=[0], metavar="LIST", help="tokens in the cache before; by default 0")
    add("-b", "--batch", type=lengths, default=[1], metavar="LIST", help="sequences at once; by default 1")
    add("-r", "--iters", type=positive, default=5, metavar="N", help="rounds, after one to warm up; by default 5")
    add("-t", "--threads", type=lengths, metavar="LIST")
    add("--rank-threads", type=positive, metavar="N", help="of each rank; one process gets as many as all ranks")
    add("--dtype", type=listed, default=["auto"], metavar="LIST", help="of the weights, as rill takes it")
    add("--kv-dtype", default="auto")
    add("--pp", type=positive, metavar="N", help="stages of ranks, for the methods on ranks")
    add("--parallel", metavar="NAME", help="what ranks share, as rill takes it")
    add("--load", action="store_true", help="time loading too")
    add("--verify", type=token_ids, metavar="IDS", help="compare the greedy tokens after these ids with NumPy's")
    add("-o", "--output", choices=["md", "csv", "json"], default="md")
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
    timings = [time_loading] * options.load + [time_models]
    print_rows(chain.from_iterable(times(options, pairs) for times in timings), options.output)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
