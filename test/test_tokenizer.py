"""Text to ids as the field's libraries have it, special tokens in a user's text, broken files."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from small_tokenizers import (
    JSON_KINDS,
    LLAMA3_SPLIT,
    llama2,
    llama3,
    qwen,
    sentencepiece,
    word_ends,
    words,
    write,
)
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from engine.errors import RillError, UsageError
from engine.text import tiktoken
from engine.text.json_vocab import LONG_TEXT, byte_alphabet
from engine.text.tokenizer import load_tokenizer

TEXTS = ["Once upon a time, 1234567 stones.", "don't \n\n  stop", "你好 👩\u200d👧 Cafe\u0301", " a", ""]


@pytest.mark.parametrize("kind", JSON_KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_encode_is_the_library_s(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, JSON_KINDS[kind]()))
    library = Library.from_str(JSON_KINDS[kind]())
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocab_size == max(library.get_vocab().values()) + 1


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_encode_is_the_library_s(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, sentencepiece()))
    library = SentencePieceProcessor(model_proto=sentencepiece())
    assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.vocab_size == library.get_piece_size()


def tokens_of(kind: str, text: str, directory: Path) -> list[str]:
    tokenizer = load_tokenizer(write(directory, JSON_KINDS[kind]()))
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_digits_stand_alone_in_qwen_and_by_three_in_llama(tmp_path: Path) -> None:
    assert tokens_of("qwen", "2024", tmp_path) == ["2", "0", "2", "4"]
    assert max(map(len, tokens_of("llama3", "678967896789", tmp_path))) <= 3
    assert "678" in tokens_of("llama3", "6789", tmp_path)


def test_nfc_is_the_tokenizer_s_own_choice(tmp_path: Path) -> None:
    for kind, same in (("qwen", True), ("llama3", False)):
        tokenizer = load_tokenizer(write(tmp_path, JSON_KINDS[kind]()))
        assert (tokenizer.encode("cafe\u0301") == tokenizer.encode("café")) is same


def test_ignore_merges_takes_a_word_whole(tmp_path: Path) -> None:
    spec = json.loads(llama3())
    merges = spec["model"]["merges"]
    word = next(m for m in reversed(merges) if "".join(m).isascii())
    merges.remove(word)  # the word can no longer be merged, only looked up
    text, whole = "".join(word), spec["model"]["vocab"]["".join(word)]
    assert load_tokenizer(write(tmp_path, json.dumps(spec))).encode(text) == [whole]
    spec["model"]["ignore_merges"] = False
    assert len(load_tokenizer(write(tmp_path, json.dumps(spec))).encode(text)) > 1


def test_merges_may_be_strings_or_pairs(tmp_path: Path) -> None:
    spec = json.loads(qwen())
    assert isinstance(spec["model"]["merges"][0], list)
    pairs = load_tokenizer(write(tmp_path, json.dumps(spec)))
    spec["model"]["merges"] = [" ".join(m) for m in spec["model"]["merges"]]
    strings = load_tokenizer(write(tmp_path, json.dumps(spec)))
    for text in [*TEXTS, "a <|im_end|> b"]:
        assert strings.encode(text) == pairs.encode(text)


def test_a_tokenizer_that_was_saved_truncating_or_padding_does_neither(tmp_path: Path) -> None:
    library = Library.from_str(qwen())
    library.enable_truncation(4)
    library.enable_padding(length=50)
    tokenizer = load_tokenizer(write(tmp_path, library.to_str()))
    text = "Once upon a time there was"
    assert tokenizer.encode(text) == Library.from_str(qwen()).encode(text).ids
    assert len(tokenizer.encode(text)) not in (4, 50)


# --- special tokens in the user's text ---


@pytest.mark.parametrize("kind", JSON_KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_control_token_that_a_user_writes_stays_text(kind: str, data: st.DataObject) -> None:
    library = Library.from_str(JSON_KINDS[kind]())
    controls = {t.content: i for i, t in library.get_added_tokens_decoder().items() if t.content != "<unk>"}
    controls.pop("[UNK]", None)
    bits = st.sampled_from([*controls, "fox ", " ", "<", "|>", "é"])
    text = "".join(data.draw(st.lists(bits, max_size=6)))
    tokenizer = loaded(kind)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(controls.values())
    assert max(ids, default=0) < tokenizer.vocab_size
    if kind in ("qwen", "llama3", "llama2"):
        assert tokenizer.decode(ids) == text


_loaded: dict[str, Any] = {}


def loaded(kind: str) -> Any:
    if kind not in _loaded:
        with TemporaryDirectory() as name:
            _loaded[kind] = load_tokenizer(write(Path(name), JSON_KINDS[kind]()))
    return _loaded[kind]


def test_plain_text_around_a_written_control_token_merges_as_usual() -> None:
    without = Library.from_str(qwen())  # the same vocabulary without any added token
    spec = json.loads(without.to_str())
    spec["added_tokens"] = []
    text = "the fox<|im_end|> said<think>the moon"
    assert loaded("qwen").encode(text) == Library.from_str(json.dumps(spec)).encode(text).ids


@pytest.mark.parametrize(("kind", "token"), [("qwen", "<|im_end|>"), ("qwen", "<think>"), ("llama2", "</s>")])
def test_special_recognises_control_tokens(kind: str, token: str) -> None:
    library = Library.from_str(JSON_KINDS[kind]())
    text = f"fox{token} owl"
    ids = loaded(kind).encode(text, special=True)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert library.token_to_id(token) in ids


def test_control_tokens_that_plain_text_could_spell_stay_out(tmp_path: Path) -> None:
    """Their text may be in the vocabulary itself: made by merges, or a Unigram piece."""
    spec = json.loads(qwen())
    spec["added_tokens"] = []
    spec["model"]["vocab"]["<b"] = len(spec["model"]["vocab"])
    spec["model"]["merges"].append(["<", "b"])
    pieces = [("?", 0.0), ("<b", -1.0), ("a", -2.0), ("<", -3.0), ("b", -3.0)]
    unigram = Library(models.Unigram(pieces, unk_id=0))
    for library in (Library.from_str(json.dumps(spec)), unigram):
        assert library.encode("a<b").tokens == ["a", "<b"]
        library.add_special_tokens(["<b"])
        tokenizer = load_tokenizer(write(tmp_path, library.to_str()))
        assert tokenizer.encode("a<b", special=True)[1] == library.token_to_id("<b")
        assert [library.id_to_token(i) for i in tokenizer.encode("a<b")] == ["a", "<", "b"]


def test_sentencepiece_control_tokens_and_symbols(tmp_path: Path) -> None:
    data = sentencepiece(control_symbols="<|user|>", user_defined_symbols="<think>,[INST]")
    tokenizer = load_tokenizer(write(tmp_path, data))
    library = SentencePieceProcessor(model_proto=data)
    user, think, inst = (library.piece_to_id(t) for t in ("<|user|>", "<think>", "[INST]"))
    text = "<|user|>fox<think> owl</s>[INST]"
    special = tokenizer.encode(text, special=True)
    assert [i for i in special if i in (user, think, inst, 2)] == [user, think, 2, inst]
    plain = tokenizer.encode(text)
    assert not {user, think, inst, 1, 2} & set(plain)
    assert tokenizer.decode(plain) == text
    assert think in library.encode(text)  # so it is the engine that keeps it out


def test_sentencepiece_dummy_prefix_after_a_control_token(tmp_path: Path) -> None:
    data = sentencepiece(control_symbols="<|user|>")
    library = SentencePieceProcessor(model_proto=data)
    user, fox = library.piece_to_id("<|user|>"), library.encode("fox")
    legacy = load_tokenizer(write(tmp_path, data)).encode("<|user|>fox", special=True)
    assert legacy == [user, *fox]
    modern = load_tokenizer(write(tmp_path, data, tokenizer_config={"legacy": False}))
    assert modern.encode("fox<|user|>", special=True) == [*fox, user]
    inner = modern.encode("<|user|>fox", special=True)
    assert inner != legacy and modern.decode(inner) == "fox"
    assert not str(library.id_to_piece(inner[1])).startswith("\u2581")


def test_tokens_added_to_sentencepiece_by_the_config(tmp_path: Path) -> None:
    added = {
        "420": {"content": "<|im_end|>", "special": True},
        "421": {"content": "<tool>", "special": False},
    }
    config = {"added_tokens_decoder": added, "eos_token": {"content": "<|im_end|>"}}
    tokenizer = load_tokenizer(write(tmp_path, sentencepiece(), tokenizer_config=config))
    assert tokenizer.vocab_size == 422
    assert tokenizer.eos_ids == {2, 420}
    assert tokenizer.encode("<tool><|im_end|>", special=True) == [421, 420]
    assert tokenizer.decode([421, 420]) == "<tool>"
    assert not {420, 421} & set(tokenizer.encode("<tool><|im_end|>"))


# --- BOS and EOS ---


@pytest.mark.parametrize(
    ("data", "config", "bos"),
    [
        (qwen, {"bos_token": None, "add_bos_token": False}, []),
        (qwen, {}, []),
        (llama3, {}, ["<|begin_of_text|>"]),
        (llama3, {"bos_token": "<|begin_of_text|>"}, ["<|begin_of_text|>"]),
        (llama3, {"bos_token": "<|begin_of_text|>", "add_bos_token": False}, []),
        (llama2, {"bos_token": {"content": "<s>"}}, ["<s>"]),
        (qwen, {"bos_token": "<|endoftext|>"}, []),
        (qwen, {"bos_token": "<|endoftext|>", "add_bos_token": True}, ["<|endoftext|>"]),
        (sentencepiece, {}, ["<s>"]),
        (sentencepiece, {"add_bos_token": False}, []),
    ],
)
def test_bos_is_put_where_the_tokenizer_wants_it(
    data: Any, config: Any, bos: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write(tmp_path, data(), tokenizer_config=config))
    wanted = [i for token in bos for i in tokenizer.encode(token, special=True)]
    assert tokenizer.encode("fox", bos=True) == [*wanted, *tokenizer.encode("fox")]
    assert tokenizer.encode("", bos=True) == wanted
    for token in bos:  # written out already: not twice
        assert tokenizer.encode(f"{token}fox", special=True, bos=True).count(wanted[0]) == 1


def test_a_template_s_end_of_text_is_no_bos(tmp_path: Path) -> None:
    spec = json.loads(llama3())
    template = spec["post_processor"]["processors"][1]
    template["single"] = [*reversed(template["single"])]  # "$A <token>": behind, not before
    tokenizer = load_tokenizer(write(tmp_path, json.dumps(spec)))
    assert tokenizer.bos_id is None and tokenizer.encode("", bos=True) == []


def test_eos_is_what_the_tokenizer_s_own_files_say(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, qwen(), tokenizer_config={"eos_token": "<|im_end|>"}))
    assert tokenizer.eos_ids == {Library.from_str(qwen()).token_to_id("<|im_end|>")}


def test_special_tokens_map_is_read_where_the_config_is_silent(tmp_path: Path) -> None:
    tokens = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>"}
    tokenizer = load_tokenizer(write(tmp_path, qwen(), special_tokens_map=tokens))
    library = Library.from_str(qwen())
    assert tokenizer.eos_ids == {library.token_to_id("<|endoftext|>")}
    assert tokenizer.bos_id == library.token_to_id("<|im_start|>")


# --- tiktoken ---


def ranks_text(ranks: Mapping[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def learned_ranks() -> dict[bytes, int]:
    """The small Llama 3 tokenizer's vocabulary as ranks: bytes first, then the merges in their order."""
    alphabet = byte_alphabet()
    merged = ["".join(m) for m in json.loads(llama3())["model"]["merges"]]
    tokens = [bytes([b]) for b in range(256)] + [bytes(alphabet[c] for c in m) for m in merged]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def tiktoken_encode(ranks: Mapping[bytes, int], text: str) -> list[int]:
    """tiktoken's rule, written out: in each piece, join the neighbours whose union has the lowest rank."""
    ids = []
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    for piece, _ in split.pre_tokenize_str(text):
        parts = [bytes([b]) for b in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(parts[i] + parts[i + 1], 10**9), i) for i in range(len(parts) - 1))
            if rank == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[p] for p in parts]
    return ids


@given(text=st.text(st.sampled_from("Once upon time the fox 's 12345\n你é,.")) | st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_tiktoken_ranks_encode_as_tiktoken_does(text: str) -> None:
    ranks = _loaded.setdefault("ranks", learned_ranks())
    library = _loaded.setdefault("tiktoken", tiktoken.build(ranks, {}))
    assert library.encode(text).ids == tiktoken_encode(ranks, text)


def test_llama_3_s_own_tokenizer_model(tmp_path: Path) -> None:
    ranks = learned_ranks()
    filler = (bytes([a, b, c]) for a in range(256) for b in range(256) for c in range(8))
    ranks[b"zqxj"] = len(ranks)  # no two tokens make it: only the whole word is looked up
    while len(ranks) < 128_000:
        ranks.setdefault(next(filler), len(ranks))
    tokenizer = load_tokenizer(write(tmp_path, ranks_text(ranks)))
    assert tokenizer.vocab_size == 128_256
    assert tokenizer.bos_id == 128_000
    assert tokenizer.eos_ids == {128_001, 128_008, 128_009}
    text = "Once upon a time there were 6789 foxes"
    assert tokenizer.encode(text, bos=True) == [128_000, *tiktoken_encode(ranks, text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("zqxj") == [ranks[b"zqxj"]]
    assert tokenizer.encode("<|start_header_id|>", special=True) == [128_006]
    assert 128_009 not in tokenizer.encode("<|eot_id|>")
    for name, wanted in (
        ("<|reserved_special_token_2|>", 128_005),
        ("<|reserved_special_token_247|>", 128_255),
    ):
        assert tokenizer.encode(name, special=True) == [wanted]


def test_other_tiktoken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RillError, match=r"tokenizer\.model: .*tokens; only Llama 3's"):
        load_tokenizer(write(tmp_path, ranks_text(learned_ranks())))
    broken = ranks_text(learned_ranks()).replace(b" 300\n", b" 3000\n")
    with pytest.raises(RillError, match=r"tokenizer\.model: line 301 "):
        load_tokenizer(write(tmp_path, broken))
    with pytest.raises(RillError, match=r"tokenizer\.model: has no token for byte 1"):
        load_tokenizer(write(tmp_path, b"AA== 0\n"))


# --- what is missing or broken ---


def test_a_directory_without_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RillError, match=r"looked for tokenizer\.json and tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RillError, match=r"nowhere/tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere" / "tokenizer.json")


def test_a_file_is_loaded_as_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, sentencepiece())
    (tmp_path / "tokenizer.json").write_text(qwen())
    assert load_tokenizer(tmp_path).vocab_size == loaded("qwen").vocab_size  # tokenizer.json comes first
    assert load_tokenizer(tmp_path / "tokenizer.model").vocab_size == 420
    (tmp_path / "tokenizer.model").write_text(qwen())
    assert load_tokenizer(tmp_path / "tokenizer.model").encode("fox") == loaded("qwen").encode("fox")


BAD_JSON = [
    "",
    "{",
    "[]",
    "null",
    "{}",
    '"text"',
    qwen()[:-40],
    qwen()[:1000],
    qwen().replace('"BPE"', '"Magic"'),
]


@pytest.mark.parametrize("text", BAD_JSON)
def test_a_broken_tokenizer_json_is_one_line_that_names_it(text: str, tmp_path: Path) -> None:
    with pytest.raises(RillError, match=r"tokenizer\.json: is not a tokenizer") as error:
        load_tokenizer(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\0" * 100, bytes(range(256)), sentencepiece()[:500]])
def test_a_broken_tokenizer_model_is_one_line_that_names_it(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(RillError, match=r"tokenizer\.model: is ") as error:
        load_tokenizer(write(tmp_path, data))
    assert "\n" not in str(error.value)


def test_a_tokenizer_json_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff"}')
    with pytest.raises(RillError, match=r"tokenizer\.json: is not UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"bos_token": 3}',
        '{"eos_token": {"content": 3}}',
        '{"add_bos_token": "yes"}',
        '{"chat_template": 3}',
        '{"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]}',
        '{"chat_template": [{"name": "default"}]}',
        "\udcff",
    ],
)
def test_a_broken_tokenizer_config_is_named(config: str, tmp_path: Path) -> None:
    write(tmp_path, qwen())
    (tmp_path / "tokenizer_config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(RillError, match=r"tokenizer_config\.json: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "added", [3, {"x": {"content": "a"}}, {"1": "a"}, {"1": {}}, {"99999999": {"content": "a"}}]
)
def test_broken_added_tokens_are_named(added: Any, tmp_path: Path) -> None:
    write(tmp_path, sentencepiece(), tokenizer_config={"added_tokens_decoder": added})
    with pytest.raises(RillError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        load_tokenizer(tmp_path)


def test_text_must_be_text() -> None:
    with pytest.raises(UsageError, match="surrogate"):
        loaded("qwen").encode("a\ud83d")
    with pytest.raises(UsageError, match="must be a str"):
        loaded("qwen").encode(b"a")


def test_unknown_words_do_not_count_as_control_tokens() -> None:
    for data, token in ((words, "<unk>"), (word_ends, "<unk>")):
        library = Library.from_str(data())
        assert loaded(data.__wrapped__.__name__).encode("zebra\u0416") == library.encode("zebra\u0416").ids
        assert library.token_to_id(token) in library.encode("zebra\u0416").ids


def test_a_long_text_is_encoded_as_a_short_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, qwen()))
    text = "a stone, " * 3000
    assert len(text) > LONG_TEXT
    assert tokenizer.encode(text) == Library.from_str(qwen()).encode(text, add_special_tokens=False).ids
