"""`rill --benchmark`: prompts of several lengths with each kind of attention, their time and attention's memory."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from demo.attention_rig import scratch_bytes
from demo.options import given
from demo.program import attention_arguments, check_kinds, listed
from demo.timing import interleaved
from engine import LLM, SamplingParams
from engine.attention_choice import ATTENTION_KINDS

LENGTHS = [512, 1024, 2048, 4096]
ROUNDS = 3
HEAD = ("| prompt | attention | time | speed | scratch a thread | KV cache |", "|---|---|---|---|---|---|")
DEVICE_OPTIONS = ("device", "isa", "dtype", "kv_dtype", "threads")
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@dataclass
class Reader:
    """A model that reads prompts of one length, none of them twice: the cache would know it."""

    llm: LLM
    length: int

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def read(self) -> float:
        """Seconds of a prompt."""
        prompt = self.rng.integers(0, self.llm.config.vocab_size, self.length).tolist()
        return self.llm.generate(prompt, ONE_TOKEN).timings.prompt_seconds

    def line(self, times: list[float]) -> str:
        time, scratch = median(times), scratch_bytes(self.llm.runner.plan)
        memory = "" if scratch is None else f"{scratch / 1e3:.1f} kB"
        return (f"| {self.length} | {self.llm.attention} | {time * 1e3:.1f} ms | {self.length / time:.0f} tokens/s | "
                f"{memory} | {self.llm.runner.cache_used_bytes / 1e6:.2f} MB |")  # fmt: skip


def table(options: argparse.Namespace, model: str) -> Iterator[str]:
    """Lines: medians of rounds that go through all kinds. Scratch is what a thread needs for scores and for what else
    attention keeps of a tile; the KV cache is what the prompt has filled."""
    kinds = listed(options.attention) if options.attention else list(ATTENTION_KINDS)
    check_kinds(kinds)
    yield from HEAD
    for length in options.seq_lengths or LENGTHS:
        yield from rows(options, model, kinds, length)


def rows(options: argparse.Namespace, model: str, kinds: list[str], length: int) -> Iterator[str]:
    with ExitStack() as opened:
        readers = []
        for kind in kinds:
            llm = opened.enter_context(open_model(options, model, kind, length))
            if length < llm.max_seq_len:
                readers.append(Reader(llm, length))
            else:
                yield f"| {length} | {llm.attention} | not run: the context has {llm.max_seq_len} positions | | | |"
        for reader, times in zip(readers, interleaved([r.read for r in readers], ROUNDS), strict=True):
            yield reader.line(times)


def open_model(options: argparse.Namespace, model: str, kind: str, length: int) -> LLM:
    chosen: dict[str, Any] = {**given(options, DEVICE_OPTIONS), **attention_arguments(options, kind)}
    return LLM(model, options.tokenizer, max_batch=1, max_seq_len=length + 1, **chosen)
