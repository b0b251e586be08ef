"""Small tokenizers of every kind the engine reads, made by the field's own libraries, for the tests."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Once upon a time there was a little fox who lived by the river.",
    "The fox counted 12 stones, 345 leaves and 6789 stars in 2024.",
    "'It's late,' said the owl, 'and we'll miss the moon!'",
    "  def tell(story):\n\treturn story + '\\n'\n",
    "Die Füchsin träumte von Käse; le café était fermé; 你好，世界。狐狸在河边。",
] * 8
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and not enable_thinking %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}\n"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _train(tokenizer: Tokenizer, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_level(split: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


@cache
def qwen() -> str:
    """Byte-level BPE with single digits and NFC; control tokens come last, <think> is not special."""
    tokenizer = _byte_level(QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    plain = {"special": False, "normalized": False}
    tokenizer.add_tokens([AddedToken("<think>", **plain), AddedToken("</think>", **plain)])
    return str(tokenizer.to_str())


@cache
def llama3() -> str:
    """Byte-level BPE with up to three digits, whole words looked up (ignore_merges), BOS before a text."""
    tokenizer = _byte_level(LLAMA3_SPLIT)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    spec = json.loads(tokenizer.to_str())
    spec["model"]["ignore_merges"] = True
    return json.dumps(spec)


@cache
def llama2() -> str:
    """SentencePiece's ways in the `tokenizers` library: byte tokens, ▁, <s> inside the vocabulary."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!▁)(?=▁)"), behavior="isolated")
    learned = json.loads(_train(raw).to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(m) for m in learned["merges"]],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = raw.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


@cache
def metaspace() -> str:
    """▁ at the beginning only, and a decoder that drops it from the first token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = _train(tokenizer, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.model.unk_token = "<unk>"
    return str(tokenizer.to_str())


@cache
def wordpiece() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


@cache
def word_ends() -> str:
    """Classic BPE with a suffix at the end of a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return str(_train(tokenizer, special_tokens=["<unk>"], end_of_word_suffix="</w>").to_str())


@cache
def words() -> str:
    """Whole words, and no decoder at all."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    )
    return str(tokenizer.to_str())


@cache
def sentencepiece(**options: Any) -> bytes:
    """Llama 2's kind: BPE with byte fallback, digits split, all whitespace kept."""
    model = io.BytesIO()
    defaults = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    lines = (line for text in CORPUS for line in text.split("\n") if line)
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**defaults, **options})
    return model.getvalue()


JSON_KINDS = {f.__name__: f for f in (qwen, llama3, llama2, metaspace, wordpiece, word_ends, words)}


def write(directory: Path, tokenizer: str | bytes, **files: Any) -> Path:
    """A model directory with this tokenizer and JSON files: `config={...}` is written to config.json."""
    name = "tokenizer.json" if isinstance(tokenizer, str) else "tokenizer.model"
    data = tokenizer.encode() if isinstance(tokenizer, str) else tokenizer
    (directory / name).write_bytes(data)
    for stem, content in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content))
    return directory
