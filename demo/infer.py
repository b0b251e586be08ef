"""The command `rill`: text from a model.

    python -m demo.infer [MODEL] [TOKENIZER] -p "What is rain?"

Only the option parser is imported at once: the engine, with NumPy and the native libraries, when there is work for it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.console import (
    ProgressBar,
    drop_output,
    end_interrupted,
    in_background,
    on_interrupt,
    open_streams,
    say,
    write,
)
from demo.options import LLM_OPTIONS, SAMPLING_OPTIONS, OptionError, as_option, given, parse

if TYPE_CHECKING:
    from engine import LLM, Completion, SamplingParams, Stream, Timings

FAILED, MISUSED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141  # the last two as a shell counts SIGINT and SIGPIPE
GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. Whatever goes wrong is one line on standard error."""
    try:
        open_streams()
        return run(parse(argv))
    except KeyboardInterrupt:
        drop_output()
        return end_interrupted(INTERRUPTED)
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE
    except Exception as error:
        return complain(error)


def complain(error: Exception) -> int:
    """Says in one line what went wrong. Returns the exit status."""
    try:
        say(f"error: {explain(error)}")
    except OSError:
        pass  # nobody listens
    drop_output()
    return MISUSED if is_misuse(error) else FAILED


def is_misuse(error: Exception) -> bool:
    errors = sys.modules.get("engine.errors")  # not imported here: that may be what failed
    return isinstance(error, OptionError) or (errors is not None and isinstance(error, errors.UsageError))


def explain(error: Exception) -> str:
    errors = sys.modules.get("engine.errors")
    if isinstance(error, OptionError) or (errors is not None and isinstance(error, errors.RillError)):
        return as_option(str(error), os.environ)
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"{error} (run `pip install .` or `make demo`)"
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})" if frame else ""
    return f"this should not happen: {type(error).__name__}: {error}{where}"


def run(options: argparse.Namespace) -> int:
    if options.verify is not None:
        return run_verify(options)
    prompt = read_prompt(options.prompt)
    params = sampling_params(options)
    with load(options) as llm:
        if options.chat:
            from demo.chat_loop import chat

            status, timings = chat(llm, params, options, prompt)
        else:
            completion = complete(llm, params, options, prompt or "")
            status = INTERRUPTED if completion.finish_reason == "cancelled" else 0
            timings = [completion.timings]
    if timings:
        say(summary(timings))
    return status


def run_verify(options: argparse.Namespace) -> int:
    from engine.verify import verify

    model, gen_len = find_model(options), options.gen_len or 0
    report = in_background(lambda: verify(model, options.verify, gen_len, **given(options, LLM_OPTIONS)))
    write("".join(f"{line}\n" for line in report.lines))
    return 0 if report.passed else FAILED


def read_prompt(prompt: str | None) -> str | None:
    """The prompt; `-` is standard input, less the end of its last line."""
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise OptionError("--prompt -: standard input is closed")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise OptionError(f"--prompt -: standard input is not UTF-8 (byte {error.start})") from None


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    from engine import SamplingParams

    return SamplingParams(**{"max_tokens": None, **given(options, SAMPLING_OPTIONS)})


def find_model(options: argparse.Namespace) -> str:
    from engine.default_model import default_model

    return options.model or str(default_model())


def load(options: argparse.Namespace) -> LLM:
    from engine import LLM

    model, progress = find_model(options), ProgressBar()
    try:
        return in_background(lambda: LLM(model, options.tokenizer, max_batch=1, progress=progress,
                                         **given(options, LLM_OPTIONS)))  # fmt: skip
    finally:
        progress.clear()


def complete(llm: LLM, params: SamplingParams, options: argparse.Namespace, prompt: str) -> Completion:
    """Answers or continues one prompt on standard output."""
    templated = uses_template(llm, options)
    messages = [*system_message(options), {"role": "user", "content": prompt}]
    if templated:
        stream = in_background(lambda: llm.stream_chat(messages, params, **template_options(options)))
    else:
        stream = in_background(lambda: llm.stream(prompt, params))
    say(choices(llm, params, options))
    if not templated and os.path.sameopenfile(1, 2):  # so that prompt and text read as one where both are seen
        print(prompt, end="", file=sys.stderr, flush=True)
    completion = show(stream)
    if options.verbose:
        say(details(completion))
    say_if_cut(llm, completion)
    return completion


def uses_template(llm: LLM, options: argparse.Namespace) -> bool:
    if options.raw or llm.tokenizer is None:
        return False
    asked = options.chat or options.system is not None or options.think is not None
    return asked or llm.tokenizer.has_chat_template


def system_message(options: argparse.Namespace) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def template_options(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.think is None else {"enable_thinking": options.think}


def show(stream: Stream) -> Completion:
    """Writes the text as it comes, and a newline after it. Ctrl-C ends it; what there is so far is kept."""
    with on_interrupt(stream.close):
        try:
            for piece in stream:
                write(piece)
        finally:
            write("\n")
    return stream.completion()


def say_if_cut(llm: LLM, completion: Completion) -> None:
    used = len(completion.prompt_token_ids) + completion.timings.generated_tokens
    if completion.finish_reason == "length" and used >= llm.max_seq_len:
        say(f"the context of {llm.max_seq_len} positions is full; --ctx-size makes it larger, up to "
            f"{llm.config.max_position_embeddings}")  # fmt: skip


# What standard error says about a run.


def choices(llm: LLM, params: SamplingParams, options: argparse.Namespace) -> str:
    """What was chosen and why, in one line; with --verbose a second one about the model."""
    runner = llm.runner
    asked: Callable[[str], str] = lambda name: "asked for" if getattr(options, name) is not None else "default"  # noqa: E731
    parts = [
        f"{llm.directory.name} ({'asked for' if options.model else 'bundled'})",
        f"weights {runner.model.embedding.table.dtype} ({'as stored' if options.dtype in (None, 'auto') else 'asked for'})",
        f"{llm.device.type} {llm.device.description}",
        f"attention {llm.attention} ({asked('attention')})",
        f"KV {runner.kv_dtype} ({asked('kv_dtype')}), at most {runner.cache_capacity_bytes / 1e6:.1f} MB",
        f"context {llm.max_seq_len} ({asked('max_seq_len')})",
        f"prompt {'through the chat template' if uses_template(llm, options) else 'as raw text'}",
        sampling(params.resolve(llm.generation_config)),
    ]
    return "; ".join(parts)
