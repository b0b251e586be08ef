"""The engine as its users see it: load a model, generate, stream, chat, logits."""

from __future__ import annotations

import queue
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np

from engine.abi import LAST_POS
from engine.device import Progress
from engine.errors import UsageError
from engine.loading import Options, load, open_runner
from engine.profile import Profile
from engine.quantised import format_of
from engine.ranks.followers import enter, lead
from engine.request import Completion, Request
from engine.runner import check_kv_dtype
from engine.sampler import SamplingParams
from engine.scheduler import Scheduler
from engine.text.detokenizer import StreamDecoder
from engine.text.tokenizer import Tokenizer

DTYPES = ("auto", "float32", "int8", "int4")
PARALLEL = ("tensor", "allgather")
PATIENCE = 0.1  # seconds: an unbounded wait would miss a Ctrl-C that comes just before it
Prompt = str | Sequence[int]


class LLM:
    """A model, ready to generate.

    model: a directory in Hugging Face format, a hub name, a `.safetensors` file or an index with its config beside it,
    or a `.gguf` file. tokenizer: a directory or file, by default the model's. device: "auto", "cpu", "cuda" or "numpy".
    isa: "auto" or one that this machine has. dtype: "auto" keeps weights as stored, GGUF's blocks included,
    "float32" widens them once, "int8" and "int4" quantise them in groups of 64 and 32 inputs ("int4-128" and the like:
    of so many). cache: quantised weights are kept in the user's cache directory and taken from there. kv_dtype: "auto"
    is float32 for float32 weights, else bfloat16. max_seq_len: positions of a sequence, at most the model's own limit.
    max_batch: sequences that run together; more prompts queue. threads: by default one a core, and fewer in short
    steps. attention: "auto", "standard", "flash" or "streaming". q_block, kv_block: queries and keys to a block of the
    last two.

    With attention="streaming", a `window` and perhaps a `sink`, a token sees the last `window` positions and the first
    `sink` only (StreamingLLM: Xiao et al., 2023). Prompts and texts then have no end, memory and time per token stay
    constant, and of max_seq_len remains how many of the last tokens penalties look at.

    Under mpiexec, the ranks share the model (docs/distributed.md), and on all but rank 0 this does not return: they
    follow rank 0 and end with it. pp: stages, each of which holds some of the layers; by default 1. tp: ranks that
    share the layers of a stage, by default all that there are for it. There have to be tp · pp ranks; with tp=1 and one
    stage, rank 0 is alone, and the others have no part in this model. parallel: "tensor" splits every layer,
    "allgather" the heads alone.

    Raises UsageError for options that cannot be, RillError for files that cannot be used or too little memory.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        device: str = "auto",
        isa: str = "auto",
        attention: str = "auto",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        max_seq_len: int = 4096,
        max_batch: int = 8,
        threads: int | None = None,
        progress: Progress | None = None,
        cache: bool = True,
        *,
        sink: int | None = None,
        window: int | None = None,
        q_block: int | None = None,
        kv_block: int | None = None,
        tp: int | None = None,
        pp: int | None = None,
        parallel: str = "tensor",
    ) -> None:
        _choice("dtype", dtype, DTYPES if format_of(dtype) is None else (dtype,))
        _choice("parallel", parallel, PARALLEL)
        check_kv_dtype(kv_dtype)
        _positive("max_seq_len", max_seq_len)
        _positive("max_batch", max_batch)
        for name, count in (("tp", tp), ("pp", pp)):
            if count is not None:
                _positive(name, count)
        started = time.perf_counter()
        options = Options(str(model), None if tokenizer is None else str(tokenizer), device, isa, attention, dtype,
                          kv_dtype, max_seq_len, max_batch, threads, sink, window, q_block, kv_block, tp,
                          pp, parallel, cache)  # fmt: skip
        comm = enter()
        if tp == 1 and pp in (None, 1):
            comm = None  # rank 0 alone
        with lead(comm, options):
            opened = open_runner(options, comm)
            self.device, choice, files, self.runner = opened.device, opened.choice, opened.files, opened.runner
            started_reading = time.perf_counter()
            load(opened, comm, progress, cache)
            self.weights_seconds = time.perf_counter() - started_reading
        checkpoint, self.config, self.generation_config = files.checkpoint, files.config, files.generation_config
        self.name, self.directory = files.name, checkpoint.directory
        self.tokenizer, self._no_tokenizer = files.tokenizer, files.no_tokenizer
        max_seq_len = min(max_seq_len, self.config.max_position_embeddings)
        self.max_seq_len = LAST_POS if choice.is_endless else max_seq_len
        self.eos_ids = self._eos_ids()
        self.attention = choice.name(self.device, self.runner.layers[0].dtype, self.config.head_dim)
        self.attention_why = choice.why
        self._scheduler = Scheduler(self.runner, max_batch)
        # Dropping the last reference ends the engine thread; so does leaving the interpreter, before memory goes.
        self._finalizer = weakref.finalize(self, self._scheduler.close)
        self.load_seconds = time.perf_counter() - started

    def _eos_ids(self) -> frozenset[int]:
        """All ids that end a text. No single file names them all: a Qwen3 chat ends at <|im_end|> or <|endoftext|>."""
        tokenizer = self.tokenizer.eos_ids if self.tokenizer else frozenset()
        return tokenizer | self.config.eos_token_ids | self.generation_config.get("eos_token_id", frozenset())

    # Generating.

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None
    ) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """Completes a prompt (text, or token ids as they are), or each of a list of prompts.

        Raises UsageError for a prompt that cannot be, RillError when the model's logits are not finite. Interrupting
        the call cancels its requests.
        """
        single = _is_one_prompt(prompts)
        requests = [self._request(prompt, params) for prompt in ([prompts] if single else prompts)]  # type: ignore
        completions = self._run(requests)
        return completions[0] if single else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """An iterator of pieces of text as they come. Closing it cancels the request."""
        if self.tokenizer is None:
            raise UsageError(f"text cannot be streamed without a tokenizer: {self._no_tokenizer}")
        return Stream(self, self._scheduler, self._request(prompt, params))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **template: Any
    ) -> Completion:
        """The model's reply to a conversation, [{"role": …, "content": …}], put through its own chat template;
        `template` are the template's own switches, such as enable_thinking."""
        return self._run([self._request(self.encode_chat(messages, **template), params, reply=True)])[0]

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **template: Any
    ) -> Stream:
        """`chat`, as `stream` gives it."""
        return Stream(self, self._scheduler, self._request(self.encode_chat(messages, **template), params, reply=True))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        """The token ids of a conversation, up to where the reply begins."""
        return self._need_tokenizer().encode_chat(_messages(messages), **template)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [len(token_ids), vocab_size]: the scores of what follows each token."""
        request = self._request(list(token_ids), SamplingParams(temperature=0), want_logits=True)
        self._run([request])
        return np.stack(request.logits)

    @contextmanager
    def profile(self, keep_trace: bool = False) -> Iterator[Profile]:
        """Times every node of the steps that are begun meanwhile; keep_trace: for Profile.write_trace, too. With ranks,
        Profile.cost is there at the end."""
        if self.runner.comm:
            from engine.ranks.rank_profile import profile_ranks

            with profile_ranks(self.runner, keep_trace) as shared:
                yield shared
            return
        outer, profile = self.runner.plan.profile, Profile(self.runner, keep_trace)
        self.runner.plan.profile = profile
        try:
            yield profile
        finally:
            self.runner.plan.profile = outer

    def close(self) -> None:
        """Cancels what is running and ends the engine thread."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Requests.

    def _run(self, requests: list[Request]) -> list[Completion]:
        try:
            self._scheduler.submit(requests)
            for request in requests:
                while not request.done.wait(PATIENCE):
                    pass
        except BaseException:
            self._scheduler.cancel(requests)
            raise
        return [request.completion() for request in requests]

    def _request(
        self, prompt: Prompt, params: SamplingParams | None, want_logits: bool = False, reply: bool = False
    ) -> Request:
        """A request for what continues a prompt, or for a reply, which begins a text of its own."""
        if not isinstance(params, SamplingParams | None):
            raise UsageError(f"params: expected SamplingParams, found {type(params).__name__}")
        resolved = (params or SamplingParams()).resolve(self.generation_config)
        ids = self._encode(prompt)
        room = self.max_seq_len - len(ids)
        if room < (0 if want_logits else 1):
            raise UsageError(f"the prompt has {len(ids)} tokens, the context {self.max_seq_len}, and generating "
                             "needs room for one more")  # fmt: skip
        decoder = None
        if self.tokenizer is not None:
            decoder = StreamDecoder(self.tokenizer, stop=resolved.stop, prompt_ids=() if reply else ids)
        elif resolved.stop:
            raise UsageError(f"stop strings need a tokenizer: {self._no_tokenizer}")
        return Request(ids, resolved, min(room, resolved.max_tokens or room), self.eos_ids, decoder, want_logits)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer()
            ids = tokenizer.encode(prompt, bos=True)
            if not ids and tokenizer.bos_id is not None:
                ids = [tokenizer.bos_id]
        else:
            ids = _token_ids(prompt)
        if not ids:
            raise UsageError("the prompt is empty, and the model has no token to begin a text with")
        return [self.check_token(token) for token in ids]

    def check_token(self, token: int) -> int:
        """The id itself. Raises UsageError where the embedding has no such row."""
        if not 0 <= token < self.config.vocab_size:
            raise UsageError(f"token id {token}: the vocabulary has 0 to {self.config.vocab_size - 1}")
        return token

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(f"text needs a tokenizer: {self._no_tokenizer}")
        return self.tokenizer


class Stream(Iterator[str]):
    """Pieces of text as they are generated; `completion()` afterwards."""

    def __init__(self, llm: LLM, scheduler: Scheduler, request: Request) -> None:
        self._llm = llm  # lives as long as somebody reads from it
        self._scheduler, self._request = scheduler, request
        scheduler.submit([request])

    def __next__(self) -> str:
        piece = self._next_piece()
        if piece is None:
            self._raise_error()
            raise StopIteration
        return piece

    def _next_piece(self) -> str | None:
        while not (self._request.done.is_set() and self._request.pieces.empty()):
            try:
                return self._request.pieces.get(timeout=PATIENCE)
            except queue.Empty:
                continue
        return None

    def _raise_error(self) -> None:
        if self._request.error is not None:
            raise self._request.error

    def close(self) -> None:
        """Cancels the request if it is still running, and waits until it has left the batch."""
        if not self._request.done.is_set():
            self._scheduler.cancel([self._request])
            self._request.done.wait()

    def __del__(self) -> None:
        if not self._request.done.is_set():
            self._scheduler.cancel([self._request])

    def completion(self) -> Completion:
        """The result so far; whole once the iterator has ended or been closed."""
        return self._request.completion()


def _is_one_prompt(prompts: object) -> bool:
    """A text or ids, as against a list of prompts."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, bytes) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise UsageError(f"prompts: expected a text, token ids or a list of them, found {type(prompts).__name__}")
    return len(prompts) > 0 and isinstance(prompts[0], (int, float, np.number))


def _token_ids(prompt: object) -> list[int]:
    """Plain integers of any sequence of integers."""
    if isinstance(prompt, bytes) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise UsageError(f"a prompt is a text or a list of token ids, found {type(prompt).__name__}")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise UsageError(f"a prompt is a text or a list of token ids, found {type(token).__name__} in it")
    return [int(token) for token in prompt]


def _messages(messages: object) -> list[dict[str, Any]]:
    """A conversation as plain dictionaries."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise UsageError(f"messages: expected a list, found {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise UsageError(f"messages: expected mappings with role and content, found {type(message).__name__}")
    return [dict(message) for message in messages]


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} {value!r}: expected one of {', '.join(allowed)}")


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise UsageError(f"{name} {value!r}: expected a positive number")
