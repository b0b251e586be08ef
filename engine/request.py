"""One prompt on its way through the engine."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from engine.errors import RillError
from engine.sampler import ResolvedParams
from engine.step import History, Sampled, Want


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability under the model's own distribution, before temperature and penalties, and those of
    the likeliest alternatives."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass
class Timings:
    """Seconds are wall-clock time. A request that waited for others has that in `first_token_seconds` alone."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    generated_tokens: int = 0  # the one that ended the text included
    prompt_seconds: float = 0.0  # from the first step to the first token
    generate_seconds: float = 0.0  # from the first token to the last
    first_token_seconds: float = 0.0  # from the call

    @property
    def prompt_tokens_per_second(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_tokens_per_second(self) -> float:
        return (self.generated_tokens - 1) / self.generate_seconds if self.generate_seconds else 0.0


@dataclass
class Completion:
    """What came of a prompt. `logprobs` where SamplingParams.logprobs asks for them, `prompt_logprobs` likewise (the
    first token of a prompt has none)."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" | "length" | "cancelled"
    prompt_token_ids: list[int]
    seed: int
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(eq=False)
class Request:
    """State of a prompt. The engine thread writes it; other threads read pieces, wait for `done`, or cancel."""

    prompt: list[int]
    params: ResolvedParams
    max_tokens: int
    stop_ids: frozenset[int]
    decoder: Any = None  # detokenizer.StreamDecoder, or None where there is no tokenizer
    want_logits: bool = False

    slot: int = -1
    history: History | None = None  # the step's, once there is a slot
    computed: int = 0  # tokens whose keys and values are in the cache
    cancelled: bool = False
    finish_reason: str | None = None
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    pieces: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.logits: list[np.ndarray] = []
        self.submitted = time.perf_counter()
        self.started = self.first_token = 0.0
        self.timings.prompt_tokens = len(self.prompt)

    @property
    def needs_every_row(self) -> bool:
        """Whether rows of the prompt are wanted too, so that a cached prefix does not do."""
        return self.want_logits or self.params.prompt_logprobs is not None

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def is_sound(self) -> bool:
        """Whether logits have shown that what this request put into the cache is finite."""
        return self.error is None and (self.first_token > 0 or self.want_logits)

    def wants(self, tokens: Sequence[int], first_row: int) -> Iterator[Want]:
        """What this request wants of its next tokens, which stand in the step from `first_row` on."""
        for row, position in enumerate(range(self.computed, self.computed + len(tokens)), first_row):
            if self.want_logits:
                yield Want(row, lambda entry: self._fill(entry, 0), partial(self._guard, self._accept_logits),
                           keep_logits=True)  # fmt: skip
            elif position + 1 == len(self.tokens):
                accept = partial(self._guard, self._accept_token)
                yield Want(row, self._fill, accept, keep_logprobs=self.params.logprobs is not None)
            elif self.needs_every_row and position + 1 < len(self.prompt):
                prepare = partial(self._fill, target=self.prompt[position + 1])
                accept = partial(self._guard, self._accept_prompt_logprob)
                yield Want(row, prepare, accept, keep_logprobs=True)

    def _guard(self, accept: Callable[[Sampled], None], sampled: Sampled) -> None:
        """Whatever goes wrong with one request's result is its own: the others in the step go on."""
        try:
            accept(sampled)
        except BaseException as error:
            self.fail(error)

    def _fill(self, entry: Any, target: int | None = None) -> None:
        assert self.history is not None
        length, prompt = len(self.tokens), len(self.prompt)
        start, seen = self.history.span(self.slot, length)
        self.params.fill(entry, index=length - prompt, history_start=start, history_length=seen,
                         prompt_length=max(0, prompt - (length - seen)), target=target)  # fmt: skip

    def _accept_logits(self, sampled: Sampled) -> None:
        assert sampled.logits is not None
        self.logits.append(sampled.logits)

    def _accept_prompt_logprob(self, sampled: Sampled) -> None:
        self.prompt_logprobs.append(alternatives(sampled))

    def _accept_token(self, sampled: Sampled) -> None:
        now = time.perf_counter()
        if not self.first_token:
            self.first_token = now
            self.timings.prompt_seconds = now - self.started
            self.timings.first_token_seconds = now - self.submitted
        self.timings.generate_seconds = now - self.first_token
        self.tokens.append(sampled.token)
        self.timings.generated_tokens += 1
        if self.params.logprobs is not None:
            self.logprobs.append(alternatives(sampled))
        self._say(sampled.token)

    def _say(self, token: int) -> None:
        """Turns a new token into text, and decides whether it was the last."""
        if token in self.stop_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif self.decoder is not None:
            self.put(self.decoder.push(token))
            if self.decoder.finished:
                self.finish_reason = "stop"
        if self.finish_reason is None and self.timings.generated_tokens >= self.max_tokens:
            self.finish_reason = "length"

    def put(self, text: str) -> None:
        if text:
            self.text.append(text)
            self.pieces.put(text)

    def fail(self, error: BaseException) -> None:
        """Notes what went wrong; the first error stays."""
        if self.error is None:
            self.error = error if isinstance(error, Exception) else RillError(f"{type(error).__name__}: {error}")
        self.finish_reason = "cancelled"

    def finish(self) -> None:
        """Wakes those who wait. Text that was held back comes out."""
        try:
            if self.decoder is not None and not self.decoder.finished and self.error is None:
                self.put(self.decoder.flush())
        except BaseException as error:
            self.fail(error)
        finally:
            self.done.set()
            self.pieces.put(None)

    def completion(self) -> Completion:
        """The result. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        ids = self.generated
        if ids and ids[-1] in self.stop_ids and not self.params.ignore_eos:
            ids = ids[:-1]
        return Completion(
            "".join(self.text), ids, self.finish_reason or "cancelled", self.prompt, self.params.seed, self.timings,
            self.logprobs[: len(ids)] if self.params.logprobs is not None else None,
            self.prompt_logprobs if self.params.prompt_logprobs is not None else None,
        )  # fmt: skip


def alternatives(sampled: Sampled) -> TokenLogprob:
    kept = sampled.logprobs
    assert kept is not None
    pairs = zip(kept.top_token.tolist(), kept.top_logprob.tolist(), strict=True)
    return TokenLogprob(sampled.token, kept.own, {token: logprob for token, logprob in pairs if token >= 0})
