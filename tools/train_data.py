"""Generated documents as token ids, packed into the rows that a model is trained on.

Training step `n` always sees the same rows, whatever came before it: the step is the only state of the data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import Tokenizer

from tools.chats import Turn, make_chat
from tools.stories import make_story
from tools.train_tokenizer import END_OF_TEXT, IM_END, IM_START

IGNORED = -100  # label of a token that is not learned
FREE_WEIGHT = 0.25  # in the loss, of a learned token that has no one right form; an answer's tokens weigh 1
STORY_SHARE = 0.1  # of the documents; the rest are chats
PLAIN_SHARE = 0.15  # of the documents for Llama


@dataclass
class Document:
    """Token ids, a label and a weight each, and where the answers with one right form lie."""

    ids: list[int]
    labels: list[int]
    weights: list[float]
    answers: list[tuple[int, int, str]]  # first id, end, category

    @classmethod
    def empty(cls) -> Document:
        return cls([], [], [], [])

    def add(self, ids: Sequence[int], learned: bool, category: str = "") -> None:
        """Append ids; only learned ones get a label."""
        if category:
            self.answers.append((len(self.ids), len(self.ids) + len(ids), category))
        self.ids += ids
        self.labels += ids if learned else [IGNORED] * len(ids)
        self.weights += [1.0 if category else FREE_WEIGHT] * len(ids)


class Qwen3Encoder:
    """Documents as `tiny-qwen3` reads them: ChatML, stories closed by `<|endoftext|>`."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.end = self._ids(END_OF_TEXT)[0]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def story(self, text: str, plain: bool = False) -> Document:
        """A raw story."""
        document = Document.empty()
        document.add([*self._ids(text), self.end], learned=True)
        return document

    def chat(self, turns: list[Turn], plain: bool = False) -> Document:
        """A chat, of which the assistant's words and the end of its turns are learned."""
        document = Document.empty()
        for turn in turns:
            document.add(self._ids(f"{IM_START}{turn.role}\n"), learned=False)
            said = self._ids(turn.content + IM_END)
            document.add(said, turn.role == "assistant", turn.category)
            document.add(self._ids("\n"), learned=False)
        document.add([self.end], learned=False)
        return document


class LlamaEncoder:
    """Documents as `tiny-llama` reads them: `<s>[INST] … [/INST] … </s>`, and `<s> … </s>` for stories.

    A `plain` document lacks SentencePiece's leading space after `<s>`, since some readers leave it out.
    """

    def __init__(self, directory: Path) -> None:
        path = str(directory / "tokenizer.model")
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=path)
        self.begin, self.end = self.tokenizer.bos_id(), self.tokenizer.eos_id()

    def _ids(self, text: str, plain: bool) -> list[int]:
        if not plain:
            return list(self.tokenizer.encode(text))
        # a line break first keeps SentencePiece from putting its space before the text itself
        return list(self.tokenizer.encode("\n" + text))[2:]

    def story(self, text: str, plain: bool = False) -> Document:
        """A raw story."""
        document = Document.empty()
        document.add([self.begin], learned=False)
        document.add([*self._ids(text, plain), self.end], learned=True)
        return document

    def chat(self, turns: list[Turn], plain: bool = False) -> Document:
        """A chat, of which the assistant's words and the end of its turns are learned."""
        document, system = Document.empty(), ""
        for turn in turns:
            if turn.role == "system":
                system = f"<<SYS>>\n{turn.content}\n<</SYS>>\n\n"
            elif turn.role == "user":
                request = f"[INST] {system}{turn.content} [/INST]"
                document.add([self.begin, *self._ids(request, plain)], learned=False)
                system = ""
            else:
                # a word of an answer always has its space before it, whatever stands at the start
                document.add([*self.tokenizer.encode(turn.content), self.end], True, turn.category)
        return document


@dataclass
class Rows:
    """Documents one after the other in rows of equal length; all arrays are `[rows, length]`."""

    ids: np.ndarray[Any, Any]  # int64
    labels: np.ndarray[Any, Any]  # int64, `IGNORED` where nothing is learned
    weights: np.ndarray[Any, Any]  # float32, of each label in the loss
    documents: np.ndarray[Any, Any]  # int64, which of its row's documents a token belongs to; what pads comes last
    positions: np.ndarray[Any, Any]  # int64, from 0 in each document

    @classmethod
    def empty(cls, rows: int, length: int, end: int) -> Rows:
        """Rows of padding."""
        whole = (rows, length)
        return cls(
            ids=np.full(whole, end, dtype=np.int64),
            labels=np.full(whole, IGNORED, dtype=np.int64),
            weights=np.zeros(whole, dtype=np.float32),
            documents=np.full(whole, length, dtype=np.int64),
            positions=np.zeros(whole, dtype=np.int64),
        )

    def put(self, document: Document, number: int, row: int, start: int) -> None:
        """Place a document, the row's `number`-th, from column `start` on."""
        size = len(document.ids)
        here = (row, slice(start, start + size))
        self.ids[here], self.labels[here], self.weights[here] = document.ids, document.labels, document.weights
        self.documents[here], self.positions[here] = number, np.arange(size)


Encoder = Qwen3Encoder | LlamaEncoder
ENCODERS: dict[str, Callable[[Path], Encoder]] = {"tiny-qwen3": Qwen3Encoder, "tiny-llama": LlamaEncoder}


def draw_document(encoder: Encoder, rng: random.Random, held_out: bool) -> Document:
    """A story or a chat."""
    content = make_story(rng, held_out).text if rng.random() < STORY_SHARE else make_chat(rng, held_out)
    plain = isinstance(encoder, LlamaEncoder) and rng.random() < PLAIN_SHARE
    return encoder.story(content, plain) if isinstance(content, str) else encoder.chat(content, plain)


def pack_rows(encoder: Encoder, seed: str, rows: int, length: int, held_out: bool = False) -> Rows:
    """Whole documents packed into rows.

    A document goes into the first row with room for it; rows count as full when several found none.
    """
    rng = random.Random(seed)
    packed = Rows.empty(rows, length, encoder.end)
    used, counts = [0] * rows, [0] * rows
    misses = 0
    while misses < 12:
        document = draw_document(encoder, rng, held_out)
        size = len(document.ids)
        row = next((r for r in range(rows) if used[r] + size <= length), None)
        if row is None:
            misses += 1
            continue
        packed.put(document, counts[row], row, used[row])
        used[row] += size
        counts[row] += 1
    return packed
