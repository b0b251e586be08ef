"""Streaming text is whole text: on every kind of tokenizer, at every cut, with stop strings."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from small_tokenizers import JSON_KINDS, sentencepiece, write
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Library

from engine.errors import UsageError
from engine.text.detokenizer import StopMatcher, StreamDecoder
from engine.text.tokenizer import Tokenizer, load_tokenizer

FAMILY = "👩\u200d👩\u200d👧"  # three emoji, two joiners, one picture
TEXTS = [
    "Once upon a time there was a fox.",
    f"你好，世界 {FAMILY} 🏳️‍🌈 naïve e\u0301 \u202b\u05e9",
    "  two leading spaces,\n\n\ttabs and 1234567 digits ",
    "'It's late,' said the owl. don't stop .",
    "",
]
BYTE_KINDS = ["qwen", "llama3", "llama2", "sentencepiece"]
ALL_KINDS = [*JSON_KINDS, "sentencepiece"]


@cache
def tokenizer(kind: str) -> Tokenizer:
    with TemporaryDirectory() as name:
        data = sentencepiece() if kind == "sentencepiece" else JSON_KINDS[kind]()
        return load_tokenizer(write(Path(name), data))


def library_decode(kind: str, ids: Sequence[int]) -> str:
    if kind == "sentencepiece":
        return str(SentencePieceProcessor(model_proto=sentencepiece()).decode(list(ids)))
    return str(Library.from_str(JSON_KINDS[kind]()).decode(list(ids)))


def stream(decoder: StreamDecoder, ids: Sequence[int]) -> list[str]:
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_the_library_s_whole_text(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text)
    assert "".join(stream(StreamDecoder(tokenizer(kind)), ids)) == library_decode(kind, ids)
    assert tokenizer(kind).decode(ids) == library_decode(kind, ids)


@pytest.mark.parametrize("kind", BYTE_KINDS)
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back_without_a_broken_character(kind: str, text: str) -> None:
    if kind == "qwen":
        text = unicodedata.normalize("NFC", text)
    if kind in ("llama2", "sentencepiece"):
        text = text.replace("\u2581", "").replace("\0", "")  # their own space character
    pieces = stream(StreamDecoder(tokenizer(kind)), tokenizer(kind).encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


@pytest.mark.parametrize("kind", BYTE_KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_ids_stream_to_their_whole_text(kind: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer(kind).vocab_size - 1), max_size=30))
    whole = tokenizer(kind).decode(ids)
    assert "".join(stream(StreamDecoder(tokenizer(kind)), ids)) == whole
    if kind in ("qwen", "llama3"):
        assert whole == library_decode(kind, ids)


@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if k not in BYTE_KINDS])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_decoders_with_context_stream_to_the_library_s_text(kind: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer(kind).vocab_size - 1), max_size=30))
    assert "".join(stream(StreamDecoder(tokenizer(kind)), ids)) == library_decode(kind, ids)


def test_an_emoji_of_many_tokens_waits_until_it_is_whole() -> None:
    ids = tokenizer("qwen").encode("🦊")
    assert len(ids) == 4  # one a byte, or the test shows nothing
    assert stream(StreamDecoder(tokenizer("qwen")), ids) == ["", "", "", "🦊", ""]


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_flush_gives_up_on_an_incomplete_character(kind: str) -> None:
    ids = tokenizer(kind).encode("a🦊")[:-1]
    pieces = stream(StreamDecoder(tokenizer(kind)), ids)
    assert pieces[-1] == "\ufffd" and "".join(pieces) == "a\ufffd"


def test_a_broken_character_does_not_hold_up_what_follows() -> None:
    ids = [*tokenizer("qwen").encode("🦊")[:2], *tokenizer("qwen").encode("the")]
    pieces = stream(StreamDecoder(tokenizer("qwen")), ids)
    assert "".join(pieces) == "\ufffdthe" and pieces[-1] == ""


def test_a_decoder_with_context_waits_for_whole_characters_too(tmp_path: Path) -> None:
    library = Library.from_str(JSON_KINDS["llama2"]())
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    unusual = load_tokenizer(write(tmp_path, library.to_str()))
    ids = unusual.encode("fox 🦊狐 fox")
    pieces = stream(StreamDecoder(unusual), ids)
    assert "".join(pieces) == "fox 🦊狐 fox" and pieces.count("🦊") == 1
    broken = [i for i in ids if i != ids[-2]][: ids.index(unusual.encode("🦊")[-4]) + 2]
    assert "\ufffd" in "".join(stream(StreamDecoder(unusual), broken))


def test_added_tokens_show_as_they_are_written(tmp_path: Path) -> None:
    """Even where their characters mean something else in the vocabulary's own spelling."""
    for kind, token in (("qwen", "<|é|>"), ("llama2", "<a▁b>"), ("llama2", "<0x41>é")):
        library = Library.from_str(JSON_KINDS[kind]())
        library.add_tokens([AddedToken(token, special=False, normalized=False)])
        added = load_tokenizer(write(tmp_path, library.to_str()))
        ids = added.encode(f"fox{token}", special=True)
        assert library.token_to_id(token) in ids
        assert added.decode(ids) == f"fox{token}"


@pytest.mark.parametrize("kind", ["llama2", "sentencepiece"])
def test_leading_space_is_stripped_once_not_per_token(kind: str) -> None:
    ids = tokenizer(kind).encode("the the the")
    assert len(ids) == 3
    assert stream(StreamDecoder(tokenizer(kind)), ids) == ["the", " the", " the", ""]
    bos = tokenizer(kind).bos_id
    assert bos is not None
    assert tokenizer(kind).decode([bos, *ids]) == "the the the"


@pytest.mark.parametrize("kind", ["llama2", "sentencepiece", "metaspace"])
def test_text_that_continues_a_prompt_keeps_its_space(kind: str) -> None:
    prompt, ids = (tokenizer(kind).encode(t) for t in ("Once upon", "a time"))
    full = tokenizer(kind).encode("Once upon a time")
    assert full[: len(prompt)] == prompt
    rest = full[len(prompt) :]
    assert "".join(stream(StreamDecoder(tokenizer(kind), prompt_ids=prompt), rest)) == " a time"
    assert tokenizer(kind).decode(rest, after=prompt) == " a time"
    assert tokenizer(kind).decode(ids) == "a time"


def test_special_tokens_are_hidden_or_shown() -> None:
    qwen = tokenizer("qwen")
    ids = qwen.encode("<think>a</think><|im_end|>", special=True)
    assert qwen.decode(ids) == "<think>a</think>"
    assert qwen.decode(ids, skip_special=False) == "<think>a</think><|im_end|>"
    assert "".join(stream(StreamDecoder(qwen, skip_special=False), ids)) == "<think>a</think><|im_end|>"
    llama = tokenizer("sentencepiece")
    assert llama.decode([1, *llama.encode("a")], skip_special=False) == "<s> a"


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_id_beyond_the_vocabulary_is_never_text(kind: str) -> None:
    for wrong in (-1, tokenizer(kind).vocab_size, 10**6):
        with pytest.raises(UsageError, match=f"token id {wrong} "):
            tokenizer(kind).decode([wrong])
        with pytest.raises(UsageError, match=f"token id {wrong} "):
            StreamDecoder(tokenizer(kind)).push(wrong)


def test_the_window_does_not_grow() -> None:
    """A token late in a long text costs what an early one costs: the same few ids are decoded."""
    sizes: list[int] = []
    words = tokenizer("wordpiece")
    decoder = StreamDecoder(words)
    window: Any = decoder._text
    decode = window._decode

    def counted(ids: list[int]) -> str:
        sizes.append(len(ids))
        return str(decode(ids))

    window._decode = counted
    for token_id in words.encode("the fox said the moon " * 200):
        decoder.push(token_id)
    assert max(sizes) <= 4


# --- stop strings ---


def run_stop(pieces: Sequence[str], stop: Sequence[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stop)
    shown = [matcher.push(p) for p in pieces]
    return [*shown, matcher.flush()], matcher.finished


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "finished"),
    [
        (["one ", "two ", "three"], ["two"], ["one ", "", "", ""], True),
        (["one t", "w", "o three"], ["two"], ["one ", "", "", ""], True),
        (["one t", "w", "in"], ["two"], ["one ", "", "twin", ""], False),
        (["one tw"], ["two"], ["one ", "tw"], False),
        (["aab"], ["aab"], ["", ""], True),
        (["aa", "ab"], ["aab"], ["", "a", ""], True),  # the match begins inside what was held
        (["ab", "cd"], ["abcd", "bc"], ["", "a", ""], True),  # what is complete first
        (["x", "\n\n", "User:"], ["\nUser:"], ["x", "\n", "", ""], True),
        (["free"], [], ["free", ""], False),
        (["two"], ["two", "two"], ["", ""], True),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], shown: list[str], finished: bool) -> None:
    assert run_stop(pieces, stop) == (shown, finished)


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_stop_does_not_depend_on_how_the_text_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    shown, finished = run_stop(pieces, stop)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    assert finished == bool(ends)
    if ends:
        longest = max(len(s) for s in stop if text[: ends[0]].endswith(s))
        assert "".join(shown) == text[: ends[0] - longest]
    else:
        assert "".join(shown) == text


def test_a_stop_string_over_several_tokens_ends_the_text() -> None:
    qwen = tokenizer("qwen")
    decoder = StreamDecoder(qwen, stop=["🦊!"])
    ids = qwen.encode("the river 🦊! and more")
    assert "".join(stream(decoder, ids)) == "the river "
    assert decoder.finished
    assert decoder.push(ids[0]) == "" and decoder.flush() == ""


def test_what_could_begin_a_stop_string_is_not_lost() -> None:
    decoder = StreamDecoder(tokenizer("qwen"), stop=["the end."])
    assert "".join(stream(decoder, tokenizer("qwen").encode("this is the end"))) == "this is the end"
    assert not decoder.finished


@pytest.mark.parametrize("stop", [[""], ["a", ""], [1]])
def test_bad_stop_strings_are_refused(stop: list[str]) -> None:
    with pytest.raises(UsageError, match="stop strings"):
        StreamDecoder(tokenizer("qwen"), stop=stop)
