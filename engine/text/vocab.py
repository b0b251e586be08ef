"""What a vocabulary does: a prompt's parts to ids, ids to text.

A prompt is a list of parts: plain text, in which nothing is special, and `Control` tokens. So a control
token's text that a user typed stays text, whatever a library would make of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from engine.text.detokenizer import TextStream

MARKUP = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")  # an added token that looks like this steers the model too


class Control(NamedTuple):
    """A control token in a prompt."""

    text: str
    id: int


Part = str | Control


class Vocab(Protocol):
    size: int  # highest id + 1
    controls: dict[str, int]  # tokens whose text must not act as the token when a user types it
    special_ids: frozenset[int]  # tokens without text of their own
    prefix_ids: list[int]  # what the tokenizer's own rules put before a text
    eos_ids: frozenset[int]

    def id_of(self, token: str) -> int | None: ...
    def encode(self, parts: Sequence[Part]) -> list[int]: ...
    def text_stream(self, after: Sequence[int], skip_special: bool) -> TextStream: ...


def token_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the tokens, the longest where several begin; never matches where there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
