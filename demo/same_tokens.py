"""`demo.benchmark --verify`: every method and every kind of attention must give the tokens that NumPy gives."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache

import numpy as np

from demo.methods import Method, isa_of, open_model, threads_of
from engine import LLM, SamplingParams
from engine.verify import LOGIT_BOUND, bounds_of


def compare_tokens(options: argparse.Namespace, pairs: list[Method], token_ids: list[int], gen_len: int) -> int:
    """Prints the greedy tokens of each pair, and whether they pass. Returns how many fail."""
    failures = 0
    with ExitStack() as opened:

        @cache
        def reference(attention: str, dtype: str) -> Reference:
            """NumPy with the same window, for what a position sees decides what follows, and the same weights."""
            method = Method("numpy", attention, dtype=dtype)
            llm = opened.enter_context(open_model(options, method, len(token_ids) + gen_len))
            return Reference(llm, token_ids, gen_len)

        for pair in pairs:
            windowed = pair.attention == "streaming" and options.window is not None
            expected = reference("streaming" if windowed else "standard", pair.dtype)
            with open_model(options, pair, len(token_ids) + gen_len) as llm:
                tokens = greedy(llm, token_ids, gen_len)
                wrong = list(expected.objections(llm, tokens))
                stored = "" if pair.dtype == "auto" else f" {pair.dtype}"
                name = f"{isa_of(llm)}{stored} {llm.attention}, {threads_of(llm)} threads"
            print(f"{'FAIL' if wrong else 'PASS'} {name}: {tokens}{''.join(wrong[:1])}", flush=True)
            failures += bool(wrong)
    print(f"{'FAIL' if failures else 'PASS'}: {len(pairs) - failures} of {len(pairs)} give NumPy's tokens")
    return failures


def greedy(llm: LLM, token_ids: list[int], count: int) -> list[int]:
    return llm.generate(token_ids, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)).token_ids


class Reference:
    """The tokens of NumPy, and its word on those of others: they may differ where its own scores of the two are as
    close as rounding in the dtype at hand can bring them."""

    def __init__(self, llm: LLM, token_ids: list[int], count: int) -> None:
        self.llm, self.token_ids = llm, token_ids
        self.tokens = greedy(llm, token_ids, count)

    def objections(self, llm: LLM, tokens: list[int]) -> Iterator[str]:
        if tokens == self.tokens:
            return
        if len(tokens) != len(self.tokens):
            yield f"; {len(tokens)} tokens instead of {len(self.tokens)}"
            return
        scores = self.llm.logits([*self.token_ids, *tokens[:-1]])[len(self.token_ids) - 1 :]
        for position, (row, token) in enumerate(zip(scores, tokens, strict=True)):
            gap = float((row.max() - row[token]) / row.std())
            if not gap <= tolerance(llm):
                yield (f"; token {position} is {token}, NumPy's {np.argmax(row)} lies {gap:.2g} standard deviations of "
                       f"the logits above it, more than {tolerance(llm):g}")  # fmt: skip


def tolerance(llm: LLM) -> float:
    """How far apart two logits may be that rounding exchanges, in standard deviations of the logits."""
    return LOGIT_BOUND[bounds_of(llm.runner)]
