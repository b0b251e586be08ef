"""From token ids to text as they come: characters stay whole, stop strings are never shown in part."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.errors import UsageError

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_WAIT = 6  # tokens that may wait for their character to become whole: UTF-8 takes at most 4 bytes


class TextStream:
    """Text of a growing list of ids. `size`: ids below it exist; `hidden`: ids that show no text."""

    def __init__(self, size: int, hidden: frozenset[int]) -> None:
        self._size = size
        self._hidden = hidden

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, "" while a character is incomplete."""
        if not 0 <= token_id < self._size:
            raise UsageError(f"token id {token_id} is not one of the tokenizer's, 0 to {self._size - 1}")
        return "" if token_id in self._hidden else self._add(token_id)

    def flush(self) -> str:
        """The end: bytes that never became a character, as U+FFFD."""
        raise NotImplementedError

    def _add(self, token_id: int) -> str:
        raise NotImplementedError


class ByteStream(TextStream):
    """Where every token is a fixed string of bytes: byte-level BPE, SentencePiece.

    `strip`: how many spaces to drop at the beginning of the whole text (SentencePiece's dummy prefix).
    """

    def __init__(
        self, size: int, hidden: frozenset[int], token_bytes: Callable[[int], bytes], strip: int
    ) -> None:
        super().__init__(size, hidden)
        self._token_bytes = token_bytes
        self._strip = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _add(self, token_id: int) -> str:
        data = self._token_bytes(token_id)
        while self._strip and data:
            if not data.startswith(b" "):
                self._strip = 0
                break
            data, self._strip = data[1:], self._strip - 1
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStream(TextStream):
    """Where a token's text depends on its neighbours (WordPiece, Metaspace, …).

    The last tokens are decoded with and without the new one; the difference is the new text. The window
    slides whenever text comes out, so a token costs the same wherever it stands. `before`: the tokens just
    before the first.
    """

    def __init__(
        self, size: int, hidden: frozenset[int], decode: Callable[[list[int]], str], before: Sequence[int]
    ) -> None:
        super().__init__(size, hidden)
        self._decode = decode
        self._window = list(before)
        self._shown = len(self._window)  # ids of the window whose text is out already

    def _add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._fresh()
        waiting = len(self._window) - self._shown
        if not text or (text.endswith(REPLACEMENT) and waiting < MAX_WAIT):
            return ""
        del self._window[: self._shown]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        text, self._shown = self._fresh(), len(self._window)
        return text

    def _fresh(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]


class StopMatcher:
    """Passes text on until a stop string is complete; holds back what could be the beginning of one.

    Of several stop strings the one that is complete first ends the text, however the text was cut.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            stop = [stop]
        if not all(isinstance(s, str) and s for s in stop):
            raise UsageError("stop strings must be non-empty text")
        self._stop = tuple(stop)
        self._held = ""
        self.finished = False

    def push(self, text: str) -> str:
        """Text that is now safe to show."""
        if self.finished:
            return ""
        text = self._held + text
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.finished, self._held = True, ""
            return text[: min(ends)[1]]
        hold = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class StreamDecoder:
    """Streaming text of one sequence.

    All push()es and the flush() together are `tokenizer.decode(ids, after=prompt_ids)`, up to the first stop
    string. `prompt_ids`: of a raw prompt that the text continues, so that a leading space is kept; a chat's
    answer is a text of its own and has none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        prompt_ids: Sequence[int] = (),
        skip_special: bool = True,
    ) -> None:
        self._text = tokenizer.text_stream(after=prompt_ids, skip_special=skip_special)
        self._stop = StopMatcher(stop)

    @property
    def finished(self) -> bool:
        """A stop string was found; the text before it has been returned, nothing else will be."""
        return self._stop.finished

    def push(self, token_id: int) -> str:
        """Text that is safe to show after this token. Raises UsageError for an id that has no text."""
        return "" if self.finished else self._stop.push(self._text.push(token_id))

    def flush(self) -> str:
        """The end of the sequence: all that was held back, incomplete bytes as U+FFFD."""
        if self.finished:
            return ""
        text = self._stop.push(self._text.flush())
        return text + self._stop.flush()
