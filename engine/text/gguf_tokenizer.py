"""The tokenizer inside a GGUF file, from its metadata: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama")."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import RillError
from engine.files.json_file import Fields, brief
from engine.text.chat import MAX_TEMPLATE_BYTES, ChatTemplate
from engine.text.json_vocab import JsonVocab
from engine.text.sentencepiece_vocab import SentencePieceVocab
from engine.text.tiktoken import LLAMA3_SPLIT
from engine.text.tokenizer import Tokenizer
from engine.text.vocab import Vocab

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's numbers, and the format's
# Ends of text by their names: Qwen's and Llama's files name one id, but their chats end at any of these.
ENDS = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
NAMED = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """What a file's name for a pre-tokenizer stands for: how text is cut before merges, and what else goes with it."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a cut that is a token needs no merges
    nfc: bool = False
    adds_bos: bool = False  # where the file does not say


_QWEN2 = Splitting((LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True)
_LLAMA3 = Splitting((LLAMA3_SPLIT,), whole_words=True, adds_bos=True)
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting((_GPT2_SPLIT,)),
    "smollm": Splitting((r"\p{N}", _GPT2_SPLIT)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "tekken": Splitting((_TEKKEN_SPLIT,), whole_words=True, adds_bos=True),
}


def gguf_tokenizer(metadata: Mapping[str, Any], name: str) -> Tokenizer | None:
    """The tokenizer of a file's metadata, None where there is none. Raises RillError naming the file and the key."""
    fields = Fields(name, metadata)
    prefix = "tokenizer.ggml."
    kind = fields.text(f"{prefix}model", "none")
    if kind in ("none", "no_vocab"):
        return None
    own = Fields(name, {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}, prefix)
    if kind not in _VOCABS:
        raise own.error("model", f"{brief(kind)} is not supported ({', '.join(_VOCABS)} are); give a tokenizer")
    tokens, types = _tokens(own)
    ids = {named: own.integer(f"{key}_token_id", f"[0, {len(tokens) - 1}]")
           for named, key in NAMED.items() if own.has(f"{key}_token_id")}  # fmt: skip
    vocab, adds_bos = _VOCABS[kind](own, tokens, types, ids)
    vocab.eos_ids |= _ends(own, tokens, types)
    settings = Fields(name, {"add_bos_token": own.boolean("add_bos_token", adds_bos)})
    named_tokens = {named: tokens[i] for named, i in ids.items()}
    return Tokenizer(vocab, named_tokens, settings, _template(fields, name), name, "tokenizer.chat_template in it")


def _tokens(own: Fields) -> tuple[list[str], list[int]]:
    """Texts and types, without the unused ones at the end, which only fill the embedding up."""
    tokens = _list(own, "tokens", str)
    types = _list(own, "token_type", int, len(tokens)) if own.has("token_type") else [NORMAL] * len(tokens)
    if not set(types) <= set(range(NORMAL, BYTE + 1)):
        raise own.error("token_type", f"must be numbers from {NORMAL} to {BYTE}")
    while types and types[-1] == UNUSED:
        types.pop()
    tokens = tokens[: len(types)]
    if not tokens:
        raise own.error("tokens", "has none")
    last = {token: i for i, token in enumerate(tokens)}
    if len(last) != len(tokens):
        raise own.error("tokens", f"has {brief(next(t for i, t in enumerate(tokens) if last[t] != i))} twice")
    return tokens, types


def _list(own: Fields, name: str, kind: type, count: int | None = None) -> list[Any]:
    value = own.values.get(name)
    values = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(values, list) or not all(type(item) is kind for item in values[:1]):
        raise own.expected(name, f"an array of {kind.__name__}") if own.has(name) else own.error(name, "is missing")
    if count is not None and len(values) != count:
        raise own.error(name, f"has {len(values):,} entries for {count:,} tokens")
    return values


def _ends(own: Fields, tokens: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    keys = [f"{name}_token_id" for name in ("eos", "eot", "eom")]
    given = {own.integer(key, f"[0, {len(tokens) - 1}]") for key in keys if own.has(key)}
    named = {i for i, token in enumerate(tokens) if types[i] == CONTROL and token in ENDS}
    return frozenset(given | named)


def _template(fields: Fields, name: str) -> ChatTemplate | None:
    if not fields.has("tokenizer.chat_template"):
        return None
    source = fields.text("tokenizer.chat_template")
    if len(source) > MAX_TEMPLATE_BYTES:
        raise fields.error("tokenizer.chat_template", f"is longer than {MAX_TEMPLATE_BYTES:,} characters")
    return ChatTemplate(source, name)


def _byte_level(own: Fields, tokens: list[str], types: list[int], ids: Mapping[str, int]) -> tuple[Vocab, bool]:
    """GPT-2's kind: bytes as letters, merged by rank."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = own.text("pre")
    if pre not in SPLITTINGS:
        raise own.error("pre", f"{brief(pre)} is not known ({', '.join(SPLITTINGS)} are); give a tokenizer")
    splitting = SPLITTINGS[pre]
    added = {i: token for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    at_the_end = all(i >= len(tokens) - len(added) for i in added)
    plain = {token: i for i, token in enumerate(tokens) if not (at_the_end and i in added)}
    tokenizer = Tokenizer(models.BPE(vocab=plain, merges=_merges(own, plain), ignore_merges=splitting.whole_words))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    flags = {i: types[i] == CONTROL for i in added}
    tokenizer.add_tokens([AddedToken(t, special=flags[i], normalized=False) for i, t in added.items()])
    wrong = next((token for i, token in added.items() if tokenizer.token_to_id(token) != i), None)
    if wrong is not None:
        raise own.error("tokens", f"{brief(wrong)} cannot be a token of its own")
    return JsonVocab(tokenizer), splitting.adds_bos


def _merges(own: Fields, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a third. Checked here, since the library does not survive all that are not."""
    merges = []
    listed = _list(own, "merges", str) if own.has("merges") else []  # the format's writer leaves out empty lists
    for number, merge in enumerate(listed):
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise own.error("merges", f"entry {number} is not two tokens that make a third: {brief(merge)}")
        merges.append((left, right))
    return merges


def _sentencepiece(own: Fields, tokens: list[str], types: list[int], ids: Mapping[str, int]) -> tuple[Vocab, bool]:
    """Llama 2's kind, run by the library it comes from, as the model file that it reads."""
    scores = _list(own, "scores", float)
    if len(scores) < len(tokens) or not np.isfinite(scores).all():
        raise own.error("scores", f"must be {len(tokens):,} numbers, one a token")
    types = list(types)
    types[ids.get("unk_token", 0)] = UNKNOWN  # converters may have made it a control token
    name = f"{own.where}: {own.prefix}tokens"
    spec = _trainer({key: tokens[i] for key, i in ids.items()}, BYTE in types)
    prefix = own.boolean("add_space_prefix", True)
    try:
        model = b"".join(map(_piece, tokens, scores, types)) + spec + _normalizer(prefix)
        return SentencePieceVocab(model, name, {}), True
    except (RillError, struct.error, OverflowError):
        raise RillError(f"{name}: do not make a SentencePiece model") from None


_VOCABS = {"gpt2": _byte_level, "llama": _sentencepiece}


# SentencePiece's model file is a protocol buffer (sentencepiece_model.proto); these write the few fields needed.


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _piece(token: str, score: float, kind: int) -> bytes:
    return _field(1, _field(1, token.encode()) + _field(2, score) + _field(3, kind))


def _trainer(named: Mapping[str, str], bytes_too: bool) -> bytes:
    """BPE; whether bytes stand for what is no token; what the named tokens are called."""
    numbers = {"unk_token": 45, "bos_token": 46, "eos_token": 47, "pad_token": 48}
    names = b"".join(_field(numbers[key], text.encode()) for key, text in named.items())
    return _field(2, _field(3, 2) + _field(35, int(bytes_too)) + names)


def _normalizer(prefix: bool) -> bytes:
    """Text as it is, spaces as ▁, one before the text where `prefix` says so."""
    return _field(3, _field(1, b"identity") + _field(3, int(prefix)) + _field(4, 0) + _field(5, 1))
