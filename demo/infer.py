"""The command `rill`: text from a model.

    python -m demo.infer [MODEL] [TOKENIZER] -p "What is rain?"

The engine, with NumPy and the native libraries, is imported only when there is work for it: --help is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from demo import report
from demo.console import (
    ProgressBar,
    drop_output,
    end_interrupted,
    enter_ranks,
    in_background,
    mutter,
    on_interrupt,
    open_streams,
    say,
    seen_together,
    show,
    write,
)
from demo.options import (
    LLM_OPTIONS,
    SAMPLING_OPTIONS,
    OptionError,
    given,
    parse,
    system_message,
    template_variables,
)
from demo.profile_report import check_trace, save_trace, show_profile

if TYPE_CHECKING:
    from engine import LLM, Completion, Timings
    from engine.sampler import ResolvedParams
    from engine.verify import Report

FAILED, MISUSED = 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # as a shell counts SIGINT and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. Whatever goes wrong is one line on standard error."""
    try:
        open_streams()
        enter_ranks()
        return run(parse(argv))
    except KeyboardInterrupt:
        return end_interrupted(INTERRUPTED)
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:
        say(f"error: {report.explain(error)}")
        return MISUSED if report.is_misuse(error) else FAILED
    finally:
        drop_output()


def run(options: argparse.Namespace) -> int:
    if options.verify is not None:
        return run_verify(options)
    if options.benchmark:
        return run_benchmark(options)
    if options.profile:
        check_trace(Path(options.profile))
    prompt, progress = read_prompt(options.prompt), ProgressBar()
    try:
        llm, params = in_background(lambda: load(options, progress))
    finally:
        progress.clear()
    with llm:
        if options.profile is None:
            status, timings = answer(llm, params, options, prompt)
        else:
            with llm.profile(keep_trace=bool(options.profile)) as profile:
                status, timings = answer(llm, params, options, prompt)
            show_profile(profile, llm.device)
            if options.profile:
                save_trace(profile, Path(options.profile))
    if timings:
        say(report.summary(timings))
    return status


def answer(
    llm: LLM, params: ResolvedParams, options: argparse.Namespace, prompt: str | None
) -> tuple[int, list[Timings]]:
    """The exit status of a prompt or a conversation, and the timings of each reply."""
    if options.chat:
        from demo.chat_loop import Chat

        talk = Chat(llm, params, options)
        return talk.run(prompt), talk.timings
    completion = complete(llm, params, options, prompt or "")
    return INTERRUPTED if completion.finish_reason == "cancelled" else 0, [completion.timings]


def run_verify(options: argparse.Namespace) -> int:
    def work() -> Report:
        from engine.verify import verify

        model, settings = find_model(options), given(options, LLM_OPTIONS)
        return verify(model, options.verify, options.gen_len or 0, **settings)

    comparison = in_background(work)
    write("".join(f"{line}\n" for line in comparison.lines))
    return 0 if comparison.passed else FAILED


def run_benchmark(options: argparse.Namespace) -> int:
    def work() -> None:
        from demo.prompt_lengths import table

        for line in table(options, find_model(options)):
            write(f"{line}\n")

    in_background(work)
    return 0


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


def find_model(options: argparse.Namespace) -> str:
    from engine.default_model import default_model

    return options.model or str(default_model())


def load(options: argparse.Namespace, progress: ProgressBar) -> tuple[LLM, ResolvedParams]:
    """The model and how to sample from it. Options are checked before anything is read."""
    from engine import LLM, SamplingParams

    params = SamplingParams(**{"max_tokens": None, **given(options, SAMPLING_OPTIONS)})
    llm = LLM(find_model(options), options.tokenizer, max_batch=1, progress=progress,
              **given(options, LLM_OPTIONS))  # fmt: skip
    for note in llm.device.notes + (llm.device.details if options.verbose else []):
        say(note)
    return llm, params.resolve(llm.generation_config)


def complete(llm: LLM, params: ResolvedParams, options: argparse.Namespace, prompt: str) -> Completion:
    """Answers or continues one prompt on standard output."""
    templated = uses_template(llm, options)
    messages = [*system_message(options), {"role": "user", "content": prompt}]
    if templated:
        stream = in_background(lambda: llm.stream_chat(messages, params, **template_variables(options)))
    else:
        stream = in_background(lambda: llm.stream(prompt, params))
    with on_interrupt(stream.close):
        say(report.choices(llm, params, options, templated=templated))
        if options.verbose:
            say(report.details(llm))
        if not templated and seen_together():  # then prompt and text read as one
            mutter(prompt)
        completion = show(stream)
    if options.verbose:
        say(report.reply_details(llm, completion))
    if hint := report.full_context(llm, completion):
        say(hint)
    return completion


def uses_template(llm: LLM, options: argparse.Namespace) -> bool:
    """A prompt without a template is raw text, unless an option asks for what only a template can do."""
    if options.raw or llm.tokenizer is None:
        return False
    return llm.tokenizer.has_chat_template or options.system is not None or options.think is not None


if __name__ == "__main__":
    sys.exit(main())
