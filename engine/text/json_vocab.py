"""tokenizer.json: the vocabulary of the `tokenizers` library."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.text.detokenizer import ByteStream, TextStream, WindowStream
from engine.text.vocab import MARKUP, Control, Part

if TYPE_CHECKING:
    import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CONTEXT_TOKENS = 8  # of a prompt, as the window's beginning, when text continues it
LONG_TEXT = 20_000  # characters: from here on encoding takes tens of milliseconds


class JsonVocab:
    """A `tokenizers.Tokenizer`; it knows about normalisation, digits, merges and the rest."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        unknown = getattr(tokenizer.model, "unk_token", None)
        self.size = max([*tokenizer.get_vocab(with_added_tokens=True).values(), -1]) + 1
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.controls = {
            token.content: i
            for i, token in self._added.items()
            if (token.special or MARKUP.fullmatch(token.content)) and token.content not in ("", unknown)
        }
        self._control_ids = frozenset(self.controls.values())
        self.prefix_ids = self._prefix()
        self.eos_ids: frozenset[int] = frozenset()
        self._decoding = _fixed_bytes(tokenizer.decoder)

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(self, parts: Sequence[Part]) -> list[int]:
        ids = self._ids(self._tokenizer, "".join(p if isinstance(p, str) else p.text for p in parts))
        wanted = [p.id for p in parts if isinstance(p, Control)]
        if [i for i in ids if i in self._control_ids] == wanted:
            return ids
        tokenizer, names = self._strict
        return self._ids(tokenizer, "".join(p if isinstance(p, str) else names[p.text] for p in parts))

    def text_stream(self, after: Sequence[int], skip_special: bool) -> TextStream:
        hidden = self.special_ids if skip_special else frozenset()
        seen = [i for i in after if i not in hidden]
        if self._decoding is None:
            return WindowStream(self.size, hidden, self._decode, seen[-CONTEXT_TOKENS:])
        continues = any(self.token_bytes(i) for i in seen)
        return ByteStream(self.size, hidden, self.token_bytes, 0 if continues else self._decoding.strip)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, b"" for an id without a token; only where tokens are fixed strings of bytes."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added or self._decoding is None:
            return str(token).encode()
        return self._decoding.bytes_of(token)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    @staticmethod
    def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        if len(text) > LONG_TEXT:  # a batch lets other threads run meanwhile, Ctrl-C's among them
            return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def _prefix(self) -> list[int]:
        """What the post-processor puts before a text (Llama: BOS; Qwen: nothing)."""
        bare = self._ids(self._tokenizer, "a")
        full = list(self._tokenizer.encode("a", add_special_tokens=True).ids)
        starts = (n for n in range(len(full)) if full[n : n + len(bare)] == bare)
        return full[: next(starts, 0)] if bare else []

    @cached_property
    def _strict(self) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
        """The same tokenizer with its control tokens under unguessable names, and these names.

        Only made when a text holds what looks like a control token. All ids stay the same.
        """
        names = {text: f"<{secrets.token_hex(16)}>" for text in self.controls}
        return self._sharing_model(names) or self._with_own_model(names), names

    def _sharing_model(self, names: Mapping[str, str]) -> tokenizers.Tokenizer | None:
        """At no cost, where the model's own vocabulary holds no control token (Qwen, Llama 3)."""
        from tokenizers import AddedToken, Tokenizer

        if any(self._tokenizer.model.token_to_id(text) is not None for text in names):
            return None
        strict = Tokenizer(self._tokenizer.model)
        strict.normalizer = self._tokenizer.normalizer
        strict.pre_tokenizer = self._tokenizer.pre_tokenizer
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        added = {i: names.get(t.content, t.content) for i, t in sorted(self._added.items())}
        strict.add_tokens(
            [AddedToken(text, **{f: getattr(self._added[i], f) for f in flags}) for i, text in added.items()]
        )
        return strict if all(strict.token_to_id(text) == i for i, text in added.items()) else None

    def _with_own_model(self, names: Mapping[str, str]) -> tokenizers.Tokenizer:
        """With the names in the vocabulary too, and without the merges that make them (Llama 2)."""
        from tokenizers import Tokenizer

        spec = json.loads(self._tokenizer.to_str())
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_in_model(spec["model"], names)
        spec["post_processor"] = None
        return Tokenizer.from_str(json.dumps(spec))


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens of a tokenizer.json's model, and drop the merges that make them out of plain text."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
    else:  # Unigram: [token, score] pairs
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [m for m in pairs if not names.keys() & {*m, "".join(m)}]


@dataclass(frozen=True)
class _FixedBytes:
    """How a token's text becomes bytes: GPT-2's alphabet, or SentencePiece's replacements and byte tokens."""

    alphabet: Mapping[str, int] | None = None
    replace: tuple[str, str] = ("", "")
    strip: int = 0  # spaces to drop at the beginning of a text

    def bytes_of(self, token: str) -> bytes:
        if self.alphabet is not None:
            known = [self.alphabet.get(char) for char in token]
            return bytes(b for b in known if b is not None) if None not in known else token.encode()
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(*self.replace).encode()


def _fixed_bytes(decoder: Any) -> _FixedBytes | None:
    """The rule of a `tokenizers` decoder, or None where a token's text depends on its neighbours."""
    spec: dict[str, Any] = {"type": None} if decoder is None else json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _FixedBytes(alphabet=byte_alphabet())
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    pattern = steps[0]["pattern"].get("String")
    strip: dict[str, Any] = steps[3] if kinds[3:] else {"content": " ", "start": 0, "stop": 0}
    if not pattern or strip["content"] != " " or strip["stop"]:
        return None
    return _FixedBytes(replace=(pattern, steps[0]["content"]), strip=strip["start"])


def byte_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins for the 256 bytes: a byte that Latin-1 prints is itself, the others U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
