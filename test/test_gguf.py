"""GGUF files that the format's own package and llama.cpp's quantiser have written: values, models, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from safetensors.numpy import save_file
from small_checkpoints import equal, refusal
from small_tokenizers import CHATML, LLAMA2_CHAT, llama3, qwen, sentencepiece, write

from engine import LLM, SamplingParams
from engine.config import load_config
from engine.errors import UsageError
from engine.files.checkpoint import StoredTensor
from engine.files.gguf import read_gguf
from engine.files.gguf_blocks import BLOCKS
from engine.files.gguf_checkpoint import BlockTensor
from engine.files.gguf_config import read_config
from engine.files.open_model import open_model
from engine.text.tokenizer import Tokenizer, load_tokenizer
from tools.golden_cases import CASES, LLAMA, QWEN2, QWEN3, SCALES, TIED, UNTIED, GoldenCase, old_style, sizes
from tools.make_gguf import FIXTURE_TYPES, FIXTURES, gguf_names, is_paired, paired, write_fixture_model, write_gguf
from tools.random_weights import random_tensors, write_json, write_weights

QUANTISED = [name for name, block in BLOCKS.items() if not block.is_plain]
FAMILIES = {"qwen3": QWEN3, "qwen2": QWEN2, "llama": LLAMA}
IDS = [1, 5, 9, 200, 17, 3, 64, 250, 31, 99]


def stored_as(name: str, rows: int, columns: int, file: Path) -> StoredTensor:
    """A tensor of random bytes: every pattern of them is a valid block but for the float16s, which are made so."""
    block = BLOCKS[name]
    shape = rows * columns // block.size, block.nbytes
    data = np.random.default_rng(rows).integers(0, 256, shape, np.uint8)
    floats = np.random.default_rng(3).standard_normal((len(data), 2)).astype(np.float16)
    at = block.nbytes - 2 if name == "Q6_K" else 0
    data[:, at : at + 2] = floats[:, :1].view(np.uint8)
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        data[:, 2:4] = floats[:, 1:].view(np.uint8)
    file.write_bytes(b"before" + data.tobytes() + b"after")
    return StoredTensor("a", name, (rows, columns), file, 6, data.nbytes)


def reference(stored: StoredTensor) -> np.ndarray:
    data = np.frombuffer(stored.file.read_bytes(), np.uint8)[stored.offset : stored.offset + stored.nbytes]
    kind = gguf.GGMLQuantizationType[stored.dtype]
    return np.asarray(dequantize(data.reshape(stored.shape[0], -1), kind), np.float32)


@pytest.mark.parametrize("name", QUANTISED)
def test_blocks_are_what_the_format_says_bit_for_bit(name: str, tmp_path: Path) -> None:
    stored = stored_as(name, 24, 512, tmp_path / "file")
    expected = reference(stored)
    tensor = BlockTensor(stored, BLOCKS[name], "F32")
    assert equal(tensor.read(), expected)
    assert equal(tensor.rows(5, 17), expected[5:17])
    assert len(np.unique(expected)) > 1000


@pytest.mark.parametrize("name", QUANTISED)
def test_sizes_of_blocks_are_the_format_s(name: str) -> None:
    assert (BLOCKS[name].size, BLOCKS[name].nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rows_of_heads_come_apart_wherever_a_slice_begins(dtype: str, tmp_path: Path) -> None:
    """24 rows are two heads of 12, stored in pairs."""
    stored = stored_as("Q8_0", 24, 64, tmp_path / "file")
    tensor = BlockTensor(stored, BLOCKS["Q8_0"], dtype, head_dim=12)
    whole = tensor.read()
    assert np.array_equal(paired(whole.astype(np.float32), 12), BlockTensor(stored, BLOCKS["Q8_0"], dtype).read())
    for start in range(24):
        for stop in range(start + 1, 25):
            assert equal(tensor.rows(start, stop), whole[start:stop])


def test_reading_goes_slice_by_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = stored_as("Q4_0", 40, 64, tmp_path / "file")
    whole = BlockTensor(stored, BLOCKS["Q4_0"], "F32", head_dim=4).read()
    monkeypatch.setattr("engine.files.gguf_checkpoint.SLICE_BYTES", 4 * 64 * 6)  # six rows, so two heads at a time
    asked: list[tuple[int, int]] = []
    read = StoredTensor.row_bytes

    def row_bytes(self: StoredTensor, start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(StoredTensor, "row_bytes", row_bytes)
    assert equal(BlockTensor(stored, BLOCKS["Q4_0"], "F32", head_dim=4).read(), whole)
    assert asked == [(a, a + 8) for a in range(0, 40, 8)]


# Models.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_is_the_same_from_either_format(case: GoldenCase, tmp_path: Path) -> None:
    """Every rope, bias, tying and head count of the golden cases: config and logits to the last bit."""
    case.write(tmp_path)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, file)
    expected, found = load_config(tmp_path / "config.json"), open_model(file).config
    for name in ("hidden_size", "head_dim", "num_key_value_heads", "tie_word_embeddings", "qkv_bias", "o_bias"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps, rel=1e-7)
    assert found.rope.attention_scaling() == pytest.approx(expected.rope.attention_scaling(), rel=1e-6)
    head_dim = found.head_dim
    np.testing.assert_allclose(found.rope.inv_freq(head_dim), expected.rope.inv_freq(head_dim), rtol=2e-7)
    ids = [i % expected.vocab_size for i in range(3, 80)]
    logits = [LLM(model, dtype="float32", device="numpy").logits(ids) for model in (tmp_path, file)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4 * logits[0].std()


def random_model(directory: Path, family: str, tied: bool = True, hidden: int = 64) -> Path:
    shape = sizes(hidden, 128, 2, 4, 2, 32, 288)
    config = FAMILIES[family] | (TIED if tied else UNTIED) | shape | old_style(1e4, None)
    directory.mkdir()
    write_weights(directory, random_tensors(config, ("F32",), SCALES), 5)
    write_json(directory / "config.json", config)
    return directory


def dequantised(directory: Path, file: Path) -> Path:
    """The same model as safetensors in float32, with the values that the format's package reads from the file."""
    values = {t.name: np.asarray(dequantize(t.data, t.tensor_type), np.float32) for t in gguf.GGUFReader(file).tensors}
    config = load_config(directory / "config.json")
    tensors = {}
    for name, stored in gguf_names(directory).items():
        tensors[name] = values[stored]
        if is_paired(name, config.model_type):
            pairs = values[stored].reshape(-1, config.head_dim // 2, 2, *values[stored].shape[1:])
            tensors[name] = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values[stored].shape)
    other = directory.with_name("dequantised")
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_bytes((directory / "config.json").read_bytes())
    return other


KEPT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int4", "Q5_1": "uint8"}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_same_values_in_safetensors(family: str, kind: str, tmp_path: Path) -> None:
    directory = random_model(tmp_path / "model", family, tied=kind != "Q8_0")
    file = tmp_path / "model.gguf"
    write_gguf(directory, file, kind)
    expected = LLM(dequantised(directory, file), dtype="float32").logits(IDS)
    assert equal(LLM(file, dtype="float32").logits(IDS), expected)
    kept = LLM(file)
    assert kept.runner.model.embedding.table.dtype.name == KEPT[kind]
    assert (kept.logits(IDS) - expected).std() < 0.04 * expected.std()
    with LLM(file, dtype="float32") as decoded:
        for mine, same in zip(kept.runner.weights, decoded.runner.weights, strict=True):
            if mine.group:  # number for number what the blocks mean
                values = [np.asarray(kept.device.download(w)[: w.shape[0]]) for w in (mine, same)]
                assert np.array_equal(values[0], values[1]), mine.name
    original = LLM(directory, dtype="float32").logits(IDS)
    assert (expected - original).std() < (0.5 if kind in ("Q4_0", "Q5_1") else 0.05) * original.std()


def test_packing_goes_slice_by_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 16 rows of a stacked q, k and v whose heads have 12: they end anywhere in a head."""
    shape = sizes(64, 96, 1, 5, 1, 12, 300)
    write_weights(tmp_path, random_tensors(LLAMA | TIED | shape, ("F32",), SCALES), 5)
    write_json(tmp_path / "config.json", LLAMA | TIED | shape)
    write_gguf(tmp_path, tmp_path / "a.gguf", "Q8_0")
    expected = LLM(tmp_path / "a.gguf", dtype="float32").logits(IDS)
    monkeypatch.setattr("engine.layer.DECODED", 1)
    assert equal(LLM(tmp_path / "a.gguf", dtype="float32").logits(IDS), expected)


@pytest.mark.parametrize("device", ["numpy", "cpu"])
@pytest.mark.parametrize("kind", FIXTURE_TYPES)
def test_what_llama_cpp_s_quantiser_wrote(kind: str, device: str, tmp_path: Path) -> None:
    """K-quants, of weights that are made again here."""
    file = FIXTURES / f"qwen3-{kind.lower()}.gguf"
    write_fixture_model(tmp_path / "model")
    assert {t.dtype for t in read_gguf(file).tensors.values()} >= {"Q4_K", "Q6_K", "Q5_0", "F32"}
    same_values = dequantised(tmp_path / "model", file)
    expected = LLM(same_values, dtype="float32", device=device).logits(IDS)
    assert equal(LLM(file, dtype="float32", device=device).logits(IDS), expected)
    kept = LLM(file, device=device)
    matrices = [w for w in kept.runner.weights if w.layout == "matrix"]
    assert all(w.group for w in matrices) and {w.dtype.name for w in matrices} >= {"int8", "uint4"}
    assert (kept.logits(IDS) - expected).std() < 0.04 * expected.std()
    checkpoint, original = open_model(file, dtype="float32").checkpoint, open_model(tmp_path / "model").checkpoint
    for name, tensor in original.tensors.items():
        values = tensor.read()
        error = np.square(checkpoint.take(name, tensor.shape).read() - values).mean() / np.square(values).mean()
        assert error < 0.01, name


def test_the_bundled_model_says_the_same(tmp_path: Path) -> None:
    source = Path("models/tiny-qwen3")
    write_gguf(source, tmp_path / "tiny.gguf", "BF16", pre="qwen2")
    chat = [{"role": "user", "content": "What is your name?"}]
    params = SamplingParams(temperature=0, max_tokens=24)
    with LLM(source) as one, LLM(tmp_path / "tiny.gguf") as other:
        assert other.name == "tiny.gguf"
        assert other.eos_ids == one.eos_ids and other.encode_chat(chat) == one.encode_chat(chat)
        assert other.chat(chat, params).text == one.chat(chat, params).text != ""


# Metadata.


def with_metadata(directory: Path, out: Path, **changes: Any) -> Path:
    """A file with other metadata: underscores stand for dots in names, None drops a key."""
    write_gguf(directory, out.with_suffix(".plain"))
    reader = gguf.GGUFReader(out.with_suffix(".plain"))
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch)
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in changes:
            writer.add_key_value(name, field.contents(), field.types[0])
    types = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.INT32, float: gguf.GGUFValueType.FLOAT32}
    for name, value in changes.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_key_value(name, value, types.get(type(value), gguf.GGUFValueType.STRING))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("gguf") / "model", "llama")


def test_metadata_s_defaults(model: Path, tmp_path: Path) -> None:
    """head_dim, KV heads and RoPE's base have other defaults than config.json's."""
    absent = dict.fromkeys(["attention__key_length", "attention__value_length", "attention__head_count_kv",
                            "rope__freq_base", "rope__dimension_count"])  # fmt: skip
    file = with_metadata(model, tmp_path / "a.gguf", **{f"llama__{name}": None for name in absent})
    config = read_config(read_gguf(file))
    assert (config.head_dim, config.num_key_value_heads, config.rope.theta) == (16, 4, 10_000.0)


def test_sizes_and_scalings_that_files_may_give_otherwise(model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"llama__attention__head_count_kv": [2, 2], "llama__rope__scale_linear": 4.0}
    config = read_config(read_gguf(with_metadata(model, tmp_path / "a.gguf", **changes)))
    assert config.num_key_value_heads == 2 and (config.rope.type, config.rope.factor) == ("linear", 4.0)


def test_sampling_defaults(model: Path, tmp_path: Path) -> None:
    given = {"general__sampling__temp": 0.5, "general__sampling__top_k": 7}
    file = with_metadata(model, tmp_path / "a.gguf", **given, tokenizer__ggml__eot_token_id=9)
    files = open_model(file)
    assert files.generation_config == {"temperature": 0.5, "top_k": 7}
    assert files.config.eos_token_ids == {9} and files.tokenizer is None and "a.gguf" in files.no_tokenizer


UNSUPPORTED: dict[str, tuple[str, Any]] = {
    "mixture of experts": ("llama__expert_count", 8),
    "sliding window": ("llama__attention__sliding_window", 64),
    "capped scores": ("llama__attn_logit_softcapping", 30.0),
    "both directions": ("llama__attention__causal", False),
    "an unknown scaling": ("llama__rope__scaling__type", "longrope"),
    "partly rotated heads": ("llama__rope__dimension_count", 16),
    "values of another width": ("llama__attention__value_length", 64),
    "layers that differ": ("llama__attention__head_count_kv", [2, 4]),
    "a part of a model": ("split__count", 3),
    "an adapter": ("general__type", "adapter"),
    "no layers": ("llama__block_count", 0),
    "absurdly many layers": ("llama__block_count", 2_000_000_000),
    "a negative size": ("llama__embedding_length", -64),
    "a size that is text": ("llama__feed_forward_length", "128"),
    "no epsilon": ("llama__attention__layer_norm_rms_epsilon", None),
    "an epsilon that is not a number": ("llama__attention__layer_norm_rms_epsilon", float("nan")),
    "no context length": ("llama__context_length", None),
    "more heads than the tensors have": ("llama__attention__head_count", 8),
    "fewer layers than the tensors have": ("llama__block_count", 1),
    "more layers than the tensors have": ("llama__block_count", 3),
    "an end outside all tokens": ("tokenizer__ggml__eos_token_id", -1),
    "a temperature below 0": ("general__sampling__temp", -1.0),
    "a strange tokenizer": ("tokenizer__ggml__model", "bert"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    name, value = UNSUPPORTED[case]
    file = with_metadata(model, tmp_path / "a.gguf", **{name: value})
    refusal(lambda: LLM(file, device="numpy"), file)


def test_an_unknown_architecture_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refusal(lambda: LLM(file), file, "'gpt2' is not supported", "llama, qwen2, qwen3")


def test_a_directory_of_gguf_files_says_how_to_load_one(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "some.gguf")
    refusal(lambda: LLM(tmp_path), tmp_path, "some.gguf, name the file itself")
    with pytest.raises(UsageError, match="no such file"):
        LLM(tmp_path / "other.gguf")
    (tmp_path / "some.gguf").rename(tmp_path / "blob")
    assert LLM(tmp_path / "blob", device="numpy").name == "blob"


# Tokenizers.

AWKWARD = [
    "Once upon a time, 1234567 stones.", "don't \n\n  stop I'LL", "你好 👩\u200d👧 Cafe\u0301", " a", "", "  ",
    "\t\n\r\n x", "<|im_end|> is text, <s> and </s> too", "\x00\x7f\u2028", "ＦＵＬＬ ½ ² ٣", "a" * 300, "<0x41> ▁ Ġ",
    "\U0001f98a" * 3,
]  # fmt: skip


def both(directory: Path, tokenizer: str | bytes, pre: str, **settings: Any) -> tuple[Tokenizer, Tokenizer]:
    """A small tokenizer as its own files have it, and as a GGUF file has it."""
    random_model(directory, "qwen3")
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": 640}
    write_weights(directory, random_tensors(config, ("F32",), SCALES), 5)
    write_json(directory / "config.json", config)
    write(directory, tokenizer, tokenizer_config=settings)
    write_gguf(directory, directory / "model.gguf", pre=pre)
    found = open_model(directory / "model.gguf").tokenizer
    assert found is not None
    return load_tokenizer(directory), found


def check_same(own: Tokenizer, found: Tokenizer) -> None:
    assert found.vocab_size == own.vocab_size and found.adds_bos == own.adds_bos
    for text in AWKWARD:
        for special in (False, True):
            ids = own.encode(text, special=special, bos=True)
            assert found.encode(text, special=special, bos=True) == ids, text
        assert found.decode(ids) == own.decode(ids)
    chat = [{"role": "user", "content": "<|im_end|></s> hi"}, {"role": "assistant", "content": "ho <think> ha"}]
    assert found.encode_chat(chat) == own.encode_chat(chat)
    assert found.eos_ids >= own.eos_ids


def test_byte_level_tokens_as_qwen_has_them(tmp_path: Path) -> None:
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML, "add_bos_token": False}
    own, found = both(tmp_path / "model", qwen(), "qwen2", **settings)
    check_same(own, found)
    assert found.eos_ids == {i for i in range(own.vocab_size) if own.decode([i], skip_special=False)
                             in ("<|im_end|>", "<|endoftext|>")}  # fmt: skip


def test_byte_level_tokens_as_llama_has_them(tmp_path: Path) -> None:
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": CHATML}
    own, found = both(tmp_path / "model", llama3(), "llama-bpe", **settings)
    check_same(own, found)
    assert found.adds_bos


def test_words_that_are_tokens_need_no_merges_in_llama_s(tmp_path: Path) -> None:
    spec = json.loads(llama3())
    merges = spec["model"]["merges"]
    word = next(m for m in reversed(merges) if "".join(m).isascii())
    merges.remove(word)
    own, found = both(tmp_path / "model", json.dumps(spec), "llama-bpe", chat_template=CHATML)
    assert found.encode("".join(word)) == own.encode("".join(word)) == [spec["model"]["vocab"]["".join(word)]]
    assert "".join(word) == found.decode(found.encode("".join(word)))


def test_control_tokens_that_lie_between_others(tmp_path: Path) -> None:
    spec = json.loads(qwen())
    vocab, added = spec["model"]["vocab"], spec["added_tokens"]
    renumbered = {token: i + 3 for token, i in vocab.items()}
    for i, token in enumerate(added):
        token["id"] = i if i < 3 else token["id"]
        renumbered |= {token["content"]: token["id"]} if i < 3 else {}
    spec["model"]["vocab"] = renumbered
    check_same(*both(tmp_path / "model", json.dumps(spec), "qwen2", eos_token="<|im_end|>", chat_template=CHATML))


@pytest.mark.parametrize("options", [{}, {"byte_fallback": False, "vocab_size": 340}], ids=["bytes", "unknown"])
def test_sentencepiece_tokens(options: dict[str, Any], tmp_path: Path) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": LLAMA2_CHAT}
    check_same(*both(tmp_path / "model", sentencepiece(**options), "default", **settings))


def tokenizer_refusal(directory: Path, *parts: str, **changes: Any) -> None:
    random_model(directory, "llama")
    file = with_metadata(directory, directory / "a.gguf", **{f"tokenizer__ggml__{k}": v for k, v in changes.items()})
    refusal(lambda: LLM(file), file, *parts)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"merges": ["a b"]}, ["tokens", "missing"]),
        ({"tokens": ["a", "b", "a"], "merges": []}, ["tokens", "'a' twice"]),
        ({"tokens": ["a", "b"]}, ["pre", "missing"]),
        ({"tokens": ["a", "b"], "merges": ["a"], "pre": "qwen2"}, ["merges", "entry 0", "'a'"]),
        ({"tokens": ["a", "b"], "merges": ["a b"], "pre": "qwen2"}, ["merges", "entry 0", "'a b'"]),
        ({"tokens": ["a", "b"], "merges": ["a b"], "pre": "nobody's"}, ["pre", "qwen2"]),
        ({"tokens": ["a", "b"], "merges": [1, 2], "pre": "qwen2"}, ["merges"]),
        ({"tokens": "ab"}, ["tokens"]),
        ({"tokens": ["a", "b"], "token_type": [1]}, ["token_type", "1 entries for 2 tokens"]),
        ({"tokens": ["a", "b"], "token_type": [5, 5]}, ["tokens", "none"]),
        ({"tokens": ["a", "b"], "eos_token_id": 2}, ["eos_token_id", "[0, 1]"]),
        ({"tokens": ["a", "b"], "model": "llama"}, ["scores", "missing"]),
        ({"tokens": ["a", "b"], "model": "llama", "scores": [1.0]}, ["scores"]),
        ({"tokens": ["a", "b"], "model": "llama", "scores": [1.0, float("nan")]}, ["scores"]),
        ({"tokens": ["a", ""], "model": "llama", "scores": [1.0, 2.0]}, ["SentencePiece"]),
        ({"tokens": ["a", "b"], "token_type": [2, -9]}, ["token_type", "1 to 6"]),
    ],
)
def test_tokenizers_that_cannot_be(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    tokenizer_refusal(tmp_path / "model", *parts, **{"model": "gpt2", **changes})


def test_a_tokenizer_that_is_asked_for_stands_before_the_file_s(tmp_path: Path) -> None:
    directory = random_model(tmp_path / "model", "llama")
    write(tmp_path, sentencepiece(vocab_size=288, byte_fallback=False))
    file = with_metadata(directory, tmp_path / "a.gguf", tokenizer__ggml__model="bert")
    assert LLM(file, tokenizer=tmp_path, device="numpy").tokenizer is not None
