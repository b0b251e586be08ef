"""The tokenizer that comes with a model: prompts to ids, chats to ids, ids to text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import RillError, UsageError
from engine.files.json_file import Fields, parse_object, read_bytes
from engine.text.chat import ChatTemplate, Mask, check_messages, read_chat_template
from engine.text.detokenizer import TextStream
from engine.text.json_vocab import JsonVocab
from engine.text.sentencepiece_vocab import SentencePieceVocab
from engine.text.tiktoken import is_tiktoken, llama3_vocab
from engine.text.vocab import Control, Part, Vocab, token_pattern

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
TEMPLATE_PLACES = "chat_template.jinja, chat_template.json and chat_template in tokenizer_config.json beside it"
MAX_TOKENIZER_BYTES = 500_000_000
MAX_CONFIG_BYTES = 50_000_000


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a model directory, or from its tokenizer.json or tokenizer.model file.

    What kind of file it is, its content says. tokenizer_config.json, special_tokens_map.json and the chat
    template's file are read where they lie beside it. Raises RillError naming the file, or the files looked
    for.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES if (path / name).exists()]
        if not found:
            raise RillError(f"{path}: has no tokenizer; looked for {' and '.join(TOKENIZER_FILES)}")
        path = found[0]
    config = _read_optional(path.parent / "tokenizer_config.json")
    names = {**_read_optional(path.parent / "special_tokens_map.json").values, **config.values}
    tokens = {name: text for name in NAMED_TOKENS if (text := _token_text(config, names, name))}
    template = read_chat_template(path.parent, config.values)
    return Tokenizer(_load_vocab(path, config), tokens, config, template, str(path))


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`.

    vocab_size       highest id + 1; the model's embedding may have more rows, which are never text
    bos_id           what a raw prompt begins with, None where the tokenizer has no such token
    eos_ids          the tokenizer's own ends of text; the model's files may name more
    """

    def __init__(
        self,
        vocab: Vocab,
        tokens: Mapping[str, str],
        config: Fields,
        template: ChatTemplate | None,
        name: str,
        template_places: str = TEMPLATE_PLACES,
    ) -> None:
        self.name = name
        self._template_places = template_places
        self.vocab_size = vocab.size
        self._vocab = vocab
        self._template = template
        self._tokens = dict(tokens)
        self._controls = token_pattern(list(vocab.controls))
        self._unflagged = frozenset(t for t, i in vocab.controls.items() if i not in vocab.special_ids)
        self.bos_id = self._find("bos_token", vocab.prefix_ids[:1] if len(vocab.prefix_ids) == 1 else [])
        eos_id = self._find("eos_token", sorted(vocab.eos_ids)[:1])
        self.eos_ids: frozenset[int] = vocab.eos_ids if eos_id is None else vocab.eos_ids | {eos_id}
        own_rule = self.bos_id is not None and vocab.prefix_ids[:1] == [self.bos_id]
        self.adds_bos = config.boolean("add_bos_token", own_rule) and self.bos_id is not None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of a text.

        `special`: control tokens written out in the text are taken as such; otherwise they are plain text.
        `bos`: begin with BOS if this tokenizer's prompts do (Llama's do, Qwen's do not), never twice.
        """
        _check_text(text)
        ids = self._vocab.encode(self._split(text) if special else [text])
        if bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, after: Sequence[int] = ()) -> str:
        """Text of ids; bytes that are no character become U+FFFD.

        `after`: ids that the text continues: SentencePiece's leading space is then kept. Raises UsageError
        for an id that is not in the vocabulary (a padded row of the embedding).
        """
        stream = self.text_stream(after=after, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def text_stream(self, *, after: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """What turns ids into text one by one; `engine.text.detokenizer.StreamDecoder` adds stop strings to it."""
        return self._vocab.text_stream(after, skip_special)

    def render_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt's text for a chat, by the model's own template; it gets `kwargs` too (enable_thinking).

        Raises UsageError where there is no template, RillError for what the template says or does.
        """
        variables = {**self._tokens, "add_generation_prompt": add_generation_prompt, **kwargs}
        return self._chat_template().render(messages, variables)

    def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Ids of the prompt for a chat. Control tokens are the template's; in a message they are text.

        What an assistant said may hold markup such as <think>, which its template takes apart or repeats.
        """
        check_messages(messages)
        template = self._chat_template()
        mask = Mask(self._controls, [messages, kwargs], template.source)
        masked = [mask.put(m, self._unflagged if m["role"] == "assistant" else frozenset()) for m in messages]
        rendered = self.render_chat(masked, add_generation_prompt=add_generation_prompt, **mask.put(kwargs))
        _check_text(rendered)
        parts = [mask.lift(p) if isinstance(p, str) else p for p in self._split(rendered)]
        return self._vocab.encode(parts)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise UsageError(
                f"{self.name}: has no chat template (looked for {self._template_places}); "
                "give the prompt as raw text"
            )
        return self._template

    def _split(self, text: str) -> list[Part]:
        """The text cut at the control tokens in it."""
        parts: list[Part] = []
        start = 0
        for match in self._controls.finditer(text):
            parts += [text[start : match.start()], Control(match[0], self._vocab.controls[match[0]])]
            start = match.end()
        return [p for p in [*parts, text[start:]] if p]

    def _find(self, name: str, otherwise: list[int]) -> int | None:
        """The id of a named token; `otherwise` where no file names it, whose text the template then gets."""
        if name in self._tokens:
            return self._vocab.id_of(self._tokens[name])
        if otherwise:
            self._tokens[name] = next((t for t, i in self._vocab.controls.items() if i == otherwise[0]), "")
        return otherwise[0] if otherwise else None


def _load_vocab(path: Path, config: Fields) -> Vocab:
    data = read_bytes(path, MAX_TOKENIZER_BYTES)
    if path.suffix == ".json" or data.lstrip()[:1] == b"{":
        return _load_json(data, path)
    if not data:
        raise RillError(f"{path}: is empty")
    added = _added_tokens(config)
    if is_tiktoken(data):
        return llama3_vocab(data, str(path), added)
    return SentencePieceVocab(data, str(path), added, legacy=config.boolean("legacy", True))


def _load_json(data: bytes, path: Path) -> JsonVocab:
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RillError(f"{path}: is not UTF-8 (byte {error.start})") from None
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's own panics are no Exception
        raise RillError(f"{path}: is not a tokenizer: {' '.join(str(error).split())[:200]}") from None
    return JsonVocab(library)


def _read_optional(path: Path) -> Fields:
    values = parse_object(read_bytes(path, MAX_CONFIG_BYTES), str(path)) if path.exists() else {}
    return Fields(str(path), values)


def _token_text(config: Fields, names: Mapping[str, Any], name: str) -> str | None:
    value = names.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise config.error(name, "must be a token's text, or an object with its content")
    return value


def _added_tokens(config: Fields) -> dict[int, tuple[str, bool]]:
    """Id to text and whether it is special, from tokenizer_config.json's added_tokens_decoder."""
    entries = config.inner("added_tokens_decoder")
    added = {}
    for key in entries.values:
        entry = entries.inner(key)
        if not re.fullmatch(r"\d{1,7}", key):
            raise entries.error(key, "is not a token id")
        added[int(key)] = (entry.text("content"), entry.boolean("special", False))
    return added


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise UsageError(f"text must be a str, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"text has half a surrogate pair at character {error.start}") from None
