"""Long texts to read: a file's, or stories and chats as the bundled models are trained on."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from demo.options import OptionError
from engine.config import load_config
from engine.files.model_files import local_path
from engine.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Text:
    """Token ids, and which of them count: a model is not to know what a user says next."""

    name: str
    tokens: list[int]
    scored: list[bool]

    def cut(self, length: int | None) -> Text:
        return Text(self.name, self.tokens[:length], self.scored[:length])

    def sample(self, every: int) -> list[int]:
        """The positions of every so many of the tokens that count. The first of all follows nothing."""
        return [p for p in range(1, len(self.tokens)) if self.scored[p]][::every]


def directory_of(model: str) -> Path:
    path = local_path(model)
    return path if path.is_dir() else path.parent


def read_text(model: str, path: str) -> Text:
    """A file, or standard input where the path is `-`, as the model's tokens, all of which count."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 (byte {error.start})") from None
    tokens = load_tokenizer(directory_of(model)).encode(text, bos=True)
    return Text(Path(path).name, tokens, [True] * len(tokens))


def stories(model: str, count: int, seed: int) -> Text:
    """Stories and chats about worlds that are kept out of the training data, one after the other as in training. What
    the models learn there counts: the stories, and the assistant's words."""
    from tools.train_data import ENCODERS, IGNORED, draw_document

    directory = directory_of(model)
    model_type = load_config(directory / "config.json").model_type
    make_encoder = ENCODERS.get(f"tiny-{model_type}")
    if make_encoder is None:
        raise OptionError(f"--stories: no bundled model is a {model_type}, so there are no stories for it")
    encoder, rng = make_encoder(directory), random.Random(seed)
    documents = [draw_document(encoder, rng, held_out=True) for _ in range(count)]
    return Text(f"{count} stories and chats", [i for d in documents for i in d.ids],
                [label != IGNORED for d in documents for label in d.labels])  # fmt: skip
