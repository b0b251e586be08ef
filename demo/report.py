"""What `rill` says on standard error: what was chosen and why, how fast it went, what went wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from demo.options import OptionError, as_option

if TYPE_CHECKING:
    from engine import LLM, Completion, Timings
    from engine.sampler import ResolvedParams

MB = 1e6
NEUTRAL = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}


def choices(llm: LLM, params: ResolvedParams, options: argparse.Namespace, *, templated: bool) -> str:
    """Model, dtypes, device, context and sampling, each with where it came from."""
    runner = llm.runner
    kv_bytes = runner.pages_per_seq * runner.page_bytes
    parts = [
        f"{llm.name} ({'asked for' if options.model else 'bundled'})",
        f"weights {runner.dtype} ({_why(options, 'dtype', 'as stored')})",
        f"{llm.device.type} {llm.device.description}",
        f"attention {llm.attention} ({llm.attention_why})",
        f"KV {runner.kv_dtype} ({_why(options, 'kv_dtype')}) up to {kv_bytes / MB:.1f} MB",
        _context(llm, options),
        "chat template" if templated else "raw text",
        *_sampling(params),
    ]
    return "; ".join(parts)


def _context(llm: LLM, options: argparse.Namespace) -> str:
    if options.window is not None:
        return f"context without end, of which {options.window} positions and {options.sink or 0} sinks are seen"
    limited = llm.max_seq_len == llm.config.max_position_embeddings
    why = "the model's limit" if limited else _why(options, "max_seq_len")
    return f"context {llm.max_seq_len} ({why})"


def _why(options: argparse.Namespace, name: str, default: str = "default") -> str:
    return default if getattr(options, name) in (None, "auto") else "asked for"


def _sampling(params: ResolvedParams) -> list[str]:
    """The settings that do something: without draws there is nothing to choose from and no use for a seed."""
    idle = {"top_k", "top_p", "min_p", "seed"} if params.temperature == 0 else set()
    return [
        f"{name} {getattr(params, name)} ({source})"
        for name, source in params.sources.items()
        if name not in idle and getattr(params, name) != NEUTRAL.get(name)
    ]


def details(llm: LLM) -> str:
    """The model's shape, and what loading it took."""
    config, runner = llm.config, llm.runner
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads on {config.num_key_value_heads} of keys and values, "
        f"vocabulary {config.vocab_size}; {len(runner.plan.nodes)} nodes; "
        f"{_share(llm)}{runner.weight_bytes / MB:.1f} MB of weights loaded in {llm.load_seconds:.2f} s; "
        f"ends at tokens {', '.join(map(str, sorted(llm.eos_ids))) or 'none'}"
    )


def _share(llm: LLM) -> str:
    """Which part of the model rank 0 holds, where there are others."""
    runner = llm.runner
    if runner.comm is None:
        return ""
    layers = runner.model.layers
    return (f"tp {runner.split.ranks}, pp {runner.stage.count}: rank 0 has its part of layers {layers.start} to "
            f"{layers.stop - 1} and of the logits; ")  # fmt: skip


def reply_details(llm: LLM, completion: Completion) -> str:
    t = completion.timings
    return (
        f"{t.prompt_tokens} prompt tokens, {t.cached_tokens} of them in the cache already; "
        f"{t.generated_tokens} generated, ended by {completion.finish_reason}; first token after "
        f"{t.first_token_seconds:.3f} s; KV cache {llm.runner.cache_used_bytes / MB:.1f} MB"
    )


def full_context(llm: LLM, completion: Completion) -> str | None:
    """A hint where a reply ended because the context did."""
    used = len(completion.prompt_token_ids) + completion.timings.generated_tokens
    if completion.finish_reason != "length" or used < llm.max_seq_len:
        return None
    limit = llm.config.max_position_embeddings
    larger = f"; --ctx-size makes it larger, up to {limit}" if limit > llm.max_seq_len else ""
    return f"the context of {llm.max_seq_len} positions is full{larger}"


def summary(timings: Sequence[Timings]) -> str:
    """Rates over all replies, time to the first token of each on average, and peak memory."""
    from engine.machine import peak_memory

    read = sum(t.prompt_tokens - t.cached_tokens for t in timings if t.prompt_seconds)
    generated = sum(t.generated_tokens for t in timings)
    first = [t.first_token_seconds for t in timings if t.generated_tokens]
    parts = [
        f"{read} prompt tokens{_rate(read, sum(t.prompt_seconds for t in timings))}",
        f"{generated} generated{_rate(generated - len(first), sum(t.generate_seconds for t in timings))}",
        *([f"first token after {sum(first) / len(first):.3f} s"] if first else []),
        f"peak memory {peak_memory() / MB:.0f} MB",
    ]
    return "; ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else ""


# What went wrong.


def is_misuse(error: Exception) -> bool:
    return isinstance(error, OptionError | _engine_errors("UsageError"))


def explain(error: Exception) -> str:
    """An error as the users of `rill` can use it."""
    foreseen = isinstance(error, OptionError | _engine_errors("RillError"))
    return as_option(str(error)) if foreseen else describe(error)


def describe(error: Exception) -> str:
    """An error as people can use it. What no part of the engine foresaw says where it happened."""
    if isinstance(error, OptionError | _engine_errors("RillError")):
        return str(error)
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"{error}: is the engine installed with what it needs?"
    return f"unforeseen: {type(error).__name__}: {error}{_place(error)}"


def _engine_errors(name: str) -> type[Exception]:
    """A class of engine.errors, which is not imported here: that may be what failed."""
    found: type[Exception] = getattr(sys.modules.get("engine.errors"), name, OptionError)
    return found


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
