"""One trial of `demo.benchmark` on one model: prompts or generation, of one or several sequences at once."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from demo.benchmark_rows import Row
from demo.methods import Method, isa_of, ranks_of, threads_of
from engine import LLM, SamplingParams, Timings
from engine.work import Limits, PlanWork, Work, measure_limits


@dataclass(frozen=True)
class Trial:
    """`batch` sequences at once, each with `depth` tokens in the cache: a prompt of prompt_len more tokens each, or
    gen_len steps that generate."""

    depth: int
    batch: int
    prompt_len: int | None = None
    gen_len: int | None = None

    @property
    def name(self) -> str:
        return f"tg{self.gen_len}" if self.gen_len else f"pp{self.prompt_len}"

    @property
    def room(self) -> int:
        """Positions that a sequence comes to have, one more at the end included."""
        return self.depth + (self.prompt_len or 1) + (self.gen_len or 1)


@dataclass(frozen=True)
class Sample:
    """One round: tokens a second of all sequences; the limit there was, and the least time's share of the time."""

    rate: float
    limit: float
    share: float


class TimedModel:
    """A model under a trial."""

    def __init__(self, llm: LLM, method: Method, trial: Trial) -> None:
        self.llm, self.method, self.trial = llm, method, trial
        self.rng = np.random.default_rng(0)
        self.cached = [self._draw(trial.depth) for _ in range(trial.batch)]
        self.work = work_of_trial(llm, trial)

    def _draw(self, count: int) -> list[int]:
        return self.rng.integers(0, self.llm.config.vocab_size, count).tolist()

    def sample(self) -> Sample:
        if self.trial.depth:
            self._generate(self.cached, 1)  # most often found in the cache
        limits = measure_limits(self.llm.device, self.work.operations, reading=bool(self.trial.gen_len))
        # A new prompt each time, or the cache would know it.
        prompts = [tokens + self._draw(self.trial.prompt_len or 1) for tokens in self.cached]
        timings = self._generate(prompts, self.trial.gen_len or 1)
        seconds = max(t.prompt_seconds + t.generate_seconds for t in timings)
        return Sample(self._tokens(timings) / seconds, *self._share(limits, seconds))

    def _generate(self, prompts: list[list[int]], count: int) -> list[Timings]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return [completion.timings for completion in self.llm.generate(prompts, params)]

    def _tokens(self, timings: list[Timings]) -> int:
        if self.trial.gen_len:
            return sum(t.generated_tokens for t in timings)
        return sum(t.prompt_tokens - t.cached_tokens for t in timings)

    def _share(self, limits: Limits | None, seconds: float) -> tuple[float, float]:
        """The limit at hand and the share of it that was reached, 0 where it is not known."""
        if limits is None:
            return 0.0, 0.0
        if self.trial.gen_len:
            return limits.read, limits.reading(self.work.memory) / seconds
        least = limits.multiplying(self.work)
        return self.work.flops / least, least / seconds

    def row(self, samples: list[Sample]) -> Row:
        rates, limit = [s.rate for s in samples], median(s.limit for s in samples)
        trial = self.trial
        return Row(**describe(self.llm, self.method), batch=trial.batch, depth=trial.depth, test=trial.name,
                   tokens_per_second=mean(rates), stddev=spread(rates), limit=limit or None,
                   limit_share=median(s.share for s in samples) or None,
                   limit_unit="byte/s" if trial.gen_len else "flop/s", prompt_len=trial.prompt_len,
                   gen_len=trial.gen_len)  # fmt: skip


def work_of_trial(llm: LLM, trial: Trial) -> Work:
    """What the timed part of a trial has to do: the operations of its prompts, or the reading of its steps. How a
    prompt is cut into steps decides how often weights are read, so that their bytes say nothing there."""
    kinds = PlanWork(llm.runner.plan, llm.runner.step)
    if trial.prompt_len:
        return kinds.total([range(trial.depth, trial.depth + trial.prompt_len)] * trial.batch, trial.batch)
    positions = range(trial.depth, trial.depth + (trial.gen_len or 0))
    return sum((kinds.total([range(p, p + 1)] * trial.batch, trial.batch) for p in positions), Work())


def describe(llm: LLM, method: Method) -> dict[str, Any]:
    """What ran: the first fields of its rows."""
    stored = llm.runner.dtype
    return {"model": llm.name, "dtype": stored if method.dtype == "auto" else method.dtype,
            "isa": isa_of(llm), "attention": llm.attention, "threads": threads_of(llm),
            "kv_dtype": llm.runner.kv_dtype, "ranks": ranks_of(llm)}  # fmt: skip


def spread(rates: list[float]) -> float:
    """The standard deviation of the rounds."""
    return stdev(rates) if len(rates) > 1 else 0.0
