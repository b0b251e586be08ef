"""Perplexity by position: what a model loses where it sees a window only, and what sinks give back.

    python -m demo.perplexity MODEL TEXT --window 508 --sink 4
    python -m demo.perplexity MODEL --stories 100 --every 8 -o PREFIX

One long text is read four ways: `full` attention, as far as the context reaches; the last `window` tokens only; those
and the first `sink` tokens (StreamingLLM: Xiao et al., 2023); and, as the measure of both, the last `window` tokens run
anew for each token. `--every N` does the last of these for every N-th token only, and compares the same tokens of all.

TEXT is a file, or - for standard input. `--stories N` takes N stories and chats instead that no bundled model was
trained on, one after the other as in training, and scores what the models have learned to say. The table goes to
standard output, progress to standard error, the rest to PREFIX.png and PREFIX.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.artifacts import about_machine, new_figure, save_figure, write_json
from demo.options import OptionError, Parser, integer, positive
from demo.program import check_kinds, check_output, run_program, tell
from demo.texts import Text, read_text, stories
from engine import LLM, SamplingParams

NAME = "demo.perplexity"
FIRST_EDGE = 64  # positions of the first bucket; each of the others is as long as all before it
WHOLE = 0.98  # of a bucket's tokens, so that the last one that a context cannot score does not hide all others
BATCH = 32  # windows run anew between two lines of progress
SCORE = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


@dataclass
class Reading:
    """One way to read the text: the log probability of each token that it scored, by position."""

    name: str
    logprobs: dict[int, float] = field(default_factory=dict)

    def perplexity(self, positions: Sequence[int]) -> float | None:
        """Of these tokens; None where some of them have no score."""
        known = [self.logprobs[p] for p in positions if p in self.logprobs]
        if not known or len(known) < WHOLE * len(positions):
            return None
        return math.exp(-math.fsum(known) / len(known))


def open_model(options: argparse.Namespace, max_seq_len: int, **attention: Any) -> LLM:
    names = ("device", "isa", "dtype", "kv_dtype", "threads")
    return LLM(options.model, max_seq_len=max_seq_len, **{name: getattr(options, name) for name in names}, **attention)


def score_prompt(llm: LLM, tokens: Sequence[int]) -> dict[int, float]:
    """Log probabilities of all tokens but the first, each after all before it, or what the model sees of them."""
    scored = llm.generate(list(tokens), SCORE).prompt_logprobs or []
    return {position: entry.logprob for position, entry in enumerate(scored) if entry is not None}


def score_windows(llm: LLM, tokens: Sequence[int], positions: Sequence[int], window: int) -> dict[int, float]:
    """Log probabilities of the tokens at these positions, each after the `window` tokens before it and nothing else."""
    scored = score_prompt(llm, tokens[: window + 1])
    rest = [p for p in positions if p > window]
    for start in range(0, len(rest), BATCH):
        part = rest[start : start + BATCH]
        completions = llm.generate([list(tokens[p - window : p + 1]) for p in part], SCORE)
        for position, completion in zip(part, completions, strict=True):
            last = (completion.prompt_logprobs or [None])[-1]
            assert last is not None
            scored[position] = last.logprob
        if start // BATCH % 16 == 0:
            tell(NAME, f"recomputed: {start + len(part)} of {len(rest)} tokens")
    return {p: scored[p] for p in positions if p in scored}


def read_all_ways(options: argparse.Namespace, text: Text) -> tuple[list[Reading], Any]:
    """The readings, and the device that they ran on."""
    tokens = text.tokens
    exact, streaming = {"attention": options.attention}, {"attention": "streaming", "window": options.window}
    with open_model(options, len(tokens) + 1, **exact) as llm:
        if options.window > (most := llm.config.max_position_embeddings - 2):
            raise OptionError(f"--window {options.window}: to run it anew the model has {most} positions at most")
        tell(NAME, f"{llm.device.type} {llm.device.description}, attention {llm.attention}; {len(tokens)} tokens")
        readings = [Reading("full", score_prompt(llm, tokens[: llm.max_seq_len - 1]))]
        device = llm.device
    ways = {f"window {options.window}": 0}
    if options.sink:
        ways[f"sinks {options.sink} + window {options.window}"] = options.sink
    for name, sink in ways.items():
        with open_model(options, options.window, **streaming, sink=sink) as llm:
            tell(NAME, f"{name}: {llm.attention}")
            readings.append(Reading(name, score_prompt(llm, tokens)))
    with open_model(options, options.window + 2, **exact) as llm:
        readings.append(Reading("recomputed", score_windows(llm, tokens, text.sample(options.every), options.window)))
    return readings, device


# Tables.


def buckets(end: int) -> Iterator[tuple[int, int]]:
    """[1, 64), [64, 128), [128, 256), … up to `end`."""
    start, stop = 1, FIRST_EDGE
    while start < end:
        yield start, min(stop, end)
        start, stop = stop, 2 * stop


def rows(readings: Sequence[Reading], text: Text, window: int, every: int) -> Iterator[dict[str, Any]]:
    """A row a bucket, and one of all tokens that lie beyond the window: the perplexity of each reading over the tokens
    that count, and over every N-th of them, for which the recomputed one is known."""
    end = len(text.tokens)
    for start, stop in [*buckets(end), (window + 1, end)]:
        counted, sampled = ([p for p in text.sample(n) if start <= p < stop] for n in (1, every))
        yield {
            "start": start, "stop": stop, "tokens": len(counted), "sampled": len(sampled),
            "perplexity": {r.name: r.perplexity(counted) for r in readings if r.name != "recomputed"},
            "at_sampled": {r.name: r.perplexity(sampled) for r in readings},
        }  # fmt: skip


def table(rows: Sequence[dict[str, Any]], readings: Sequence[Reading], every: int) -> Iterator[str]:
    """Lines. Where not every token was recomputed, the others stand a second time, at the same positions."""
    whole = [r.name for r in readings if r.name != "recomputed"] if every > 1 else []
    sampled = [r.name for r in readings]
    note = f" (every {every})" if every > 1 else ""
    names = [*whole, *(name + note for name in sampled)]
    yield "| positions | tokens | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 2) + "|"
    for row in rows:
        cells = [row["perplexity"][name] for name in whole] + [row["at_sampled"][name] for name in sampled]
        shown = " | ".join("not run" if cell is None else f"{cell:.4f}" for cell in cells)
        yield f"| {row['start']}–{row['stop'] - 1} | {row['tokens']} | {shown} |"


def verdict(beyond: dict[str, Any]) -> Iterator[str]:
    """What stands beyond the window, each beside the recomputed one at the same positions."""
    values = dict(beyond["at_sampled"])
    measure = values.pop("recomputed")
    for name, value in values.items():
        if value is not None and measure is not None:
            yield f"beyond the window, {name}: {value / measure - 1:+.2%} against recomputation"


def plot(rows: Sequence[dict[str, Any]], readings: Sequence[Reading], title: str, path: Path) -> None:
    figure, [axes] = new_figure(1)
    for reading in readings:
        kind = "at_sampled" if reading.name == "recomputed" else "perplexity"
        known = [(row["stop"] - 1, row[kind][reading.name]) for row in rows if row[kind][reading.name] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=reading.name)
    axes.set(xscale="log", yscale="log", xlabel="end of the bucket of positions", ylabel="perplexity", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


# The program.


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL")
    add("text", nargs="?", metavar="TEXT")
    add("--stories", type=positive, metavar="N", help="stories and chats instead of TEXT")
    add("--seed", type=integer, default=0, metavar="N", help="of the stories; by default 0")
    add("--attention", default="auto", metavar="NAME", help="of the full and the recomputed reading; by default auto")
    add("--window", type=positive, default=252, metavar="W", help="by default 252")
    add("--sink", type=integer, default=4, metavar="K", help="by default 4")
    add("--every", type=positive, default=1, metavar="N", help="recompute every N-th token only; by default 1")
    add("--max-tokens", type=positive, metavar="N", help="of the text; by default all")
    for name in ("device", "isa", "dtype", "kv_dtype"):
        add(f"--{name.replace('_', '-')}", default="auto", metavar="NAME")
    add("-t", "--threads", type=positive, metavar="N")
    add("-o", "--output", type=Path, default=Path("perplexity"), metavar="PREFIX")
    options = parser.parse_intermixed_args(arguments)
    if (options.text is None) == (options.stories is None):
        parser.error("give one of TEXT and --stories")
    if options.sink < 0:
        parser.error(f"--sink: expected 0 or more, got {options.sink}")
    check_kinds([options.attention])
    check_output(options.output)
    return options


def run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    if options.stories:
        text = stories(options.model, options.stories, options.seed)
    else:
        text = read_text(options.model, options.text)
    text = text.cut(options.max_tokens)
    if text.sample(options.every)[-1:] <= [options.window]:
        raise OptionError(f"--window {options.window}: the text has {len(text.tokens)} tokens, too few to leave it")
    readings, device = read_all_ways(options, text)
    result = list(rows(readings, text, options.window, options.every))
    for line in [*table(result, readings, options.every), "", *verdict(result[-1])]:
        print(line)
    sys.stdout.flush()
    names = ("model", "text", "stories", "seed", "attention", "window", "sink", "every", "dtype", "kv_dtype")
    settings = {name: getattr(options, name) for name in names}
    content = {**about_machine(device), "settings": settings, "tokens": len(text.tokens), "scored": sum(text.scored),
               "rows": result[:-1], "beyond_the_window": result[-1]}  # fmt: skip
    write_json(options.output.with_name(f"{options.output.name}.json"), content)
    plot(result[:-1], readings, f"{Path(options.model).name}, {len(text.tokens)} tokens of {text.name}",
         options.output.with_name(f"{options.output.name}.png"))  # fmt: skip
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
