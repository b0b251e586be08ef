"""`rill --chat`: a conversation, one line a turn."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from demo import report
from demo.console import in_background, mutter, on_interrupt, say, show
from demo.options import system_message, template_variables
from engine import LLM, Timings, UsageError
from engine.sampler import ResolvedParams

INTERRUPTED = 130
PROMPT = "> "


class Chat:
    """The history grows turn by turn; the engine finds in its cache what it has read already.

    On a terminal, Ctrl-C stops a reply or drops a line; once more, or Ctrl-D, ends the conversation.
    Elsewhere the turns are the lines of standard input, and Ctrl-C ends it.
    """

    def __init__(self, llm: LLM, params: ResolvedParams, options: argparse.Namespace) -> None:
        self.llm, self.params, self.options = llm, params, options
        self.messages: list[dict[str, Any]] = system_message(options)
        self.timings: list[Timings] = []
        self.interactive = sys.stdin is not None and sys.stdin.isatty()

    def run(self, first: str | None) -> int:
        """Talks until the other side ends it. Returns the exit status."""
        self.encode("Hello")  # a model that cannot chat says so before the first question
        say(report.choices(self.llm, self.params, self.options, templated=True))
        if self.options.verbose:
            say(report.details(self.llm))
        interrupted = False
        while True:
            try:
                line = first or self.read_line()
            except KeyboardInterrupt:
                mutter("\n")
                if interrupted or not self.interactive:
                    return INTERRUPTED
                interrupted = True
                say("Ctrl-C again or Ctrl-D ends the chat")
                continue
            if line is None:
                return 0
            first = None
            interrupted = bool(line.strip()) and not self.turn(line)
            if interrupted and not self.interactive:
                return INTERRUPTED

    def read_line(self) -> str | None:
        """The next turn, None at the end."""
        if not self.interactive or not sys.stdout.isatty():
            if self.interactive:
                mutter(PROMPT)
            line = sys.stdin.readline() if sys.stdin else ""
            return line.rstrip("\r\n") if line else None
        try:
            import readline  # noqa: F401 -- input() then edits lines and remembers them
        except ImportError:
            pass
        try:
            return input(PROMPT)
        except EOFError:
            mutter("\n")
            return None

    def turn(self, line: str) -> bool:
        """One message and its reply, of which all there is counts. Returns whether it came to its end."""
        try:
            stream = self.llm.stream(self.encode(line), self.params)
            with on_interrupt(stream.close):
                completion = show(stream)
        except KeyboardInterrupt:
            return False
        except UsageError as error:
            if not self.interactive:
                raise
            say(f"error: {report.explain(error)}")  # perhaps a shorter message does
            return True
        self.timings.append(completion.timings)
        if self.options.verbose:
            say(report.reply_details(self.llm, completion))
        if hint := report.full_context(self.llm, completion):
            say(hint)
        stopped = completion.finish_reason == "cancelled"
        if completion.text or not stopped:
            reply = {"role": "assistant", "content": completion.text}
            self.messages += [{"role": "user", "content": line}, reply]
        return not stopped

    def encode(self, line: str) -> list[int]:
        """The token ids of the conversation with one more message."""
        messages = [*self.messages, {"role": "user", "content": line}]
        return in_background(lambda: self.llm.encode_chat(messages, **template_variables(self.options)))
