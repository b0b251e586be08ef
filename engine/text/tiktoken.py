"""Llama 3's own `tokenizer.model`: tiktoken ranks, one line `base64(token) rank` each.

The `tokenizers` library runs it: byte-level BPE with the ranks as vocabulary and merges made from the ranks.
The split pattern and the special tokens are not in the file; they are those of Llama 3's published code.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.errors import RillError
from engine.text.json_vocab import JsonVocab, byte_alphabet

if TYPE_CHECKING:
    import tokenizers

LLAMA3_RANKS = 128_000
LLAMA3_SPECIALS = 256
# contractions; words with one leading mark; up to three digits; marks with newlines; newlines; spaces
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
LLAMA3_EOS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+\s*")


def is_tiktoken(data: bytes) -> bool:
    """Whether a file's first line is a token in base64 and its rank."""
    return _LINE.fullmatch(data[:4096].split(b"\n", 1)[0]) is not None


def llama3_vocab(data: bytes, name: str, added: Mapping[int, tuple[str, bool]]) -> JsonVocab:
    """Llama 3's vocabulary from its tokenizer.model; `added` (id to text, special) renames special tokens."""
    ranks = read_ranks(data, name)
    if len(ranks) != LLAMA3_RANKS:
        raise RillError(
            f"{name}: a tiktoken file with {len(ranks):,} tokens; only Llama 3's, with {LLAMA3_RANKS:,}, "
            "is known: use the tokenizer.json of the model's Hugging Face version"
        )
    vocab = JsonVocab(build(ranks, {**_specials(), **{i: t for i, (t, _) in added.items()}}))
    eos = [vocab.id_of(token) for token in LLAMA3_EOS]
    vocab.eos_ids = frozenset(i for i in eos if i is not None)
    bos = vocab.id_of(LLAMA3_NAMED[0])
    vocab.prefix_ids = [] if bos is None else [bos]
    return vocab


def _specials() -> dict[int, str]:
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(LLAMA3_SPECIALS))
    return {
        LLAMA3_RANKS + n: LLAMA3_NAMED[n] if n in LLAMA3_NAMED else next(reserved)
        for n in range(LLAMA3_SPECIALS)
    }


def read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Token to rank. Ranks must be 0, 1, 2, … and every byte a token; RillError names the wrong line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            decoded = base64.b64decode(token, validate=True)
            if int(rank) != len(ranks) or not decoded or decoded in ranks:
                raise ValueError
        except (ValueError, binascii.Error):
            raise RillError(f"{name}: line {number} is not the next token in base64 and its rank") from None
        ranks[decoded] = len(ranks)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise RillError(f"{name}: has no token for byte {missing[0]}")
    return ranks


def build(ranks: Mapping[bytes, int], specials: Mapping[int, str]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that encodes as tiktoken does: the pair of lowest rank merges first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    spelled = {token: "".join(alphabet[b] for b in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(specials[i], special=True, normalized=False) for i in sorted(specials)]
    )
    return tokenizer
