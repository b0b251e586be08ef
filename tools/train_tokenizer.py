"""Make the tokenizers of the bundled models from generated text.

`tiny-qwen3` gets a byte-level BPE in `tokenizer.json` (library `tokenizers`), `tiny-llama` a SentencePiece
BPE with byte fallback in `tokenizer.model`. Both get a `tokenizer_config.json` with a chat template.

`python -m tools.train_tokenizer --model tiny-qwen3 OUT`
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tools.chats import make_chat
from tools.stories import make_story

DOCUMENTS = 6000
SEED = "tokenizer"
CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
INSTRUCTION_TEMPLATE = (
    "{%- set state = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set state.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' + state.system + message['content'] + ' [/INST]' -}}"
    "{%- set state.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def sample_documents(seed: str = SEED, count: int = DOCUMENTS) -> Iterator[str]:
    """Generated stories and chat messages, without any template."""
    rng = random.Random(seed)
    for _ in range(count):
        yield make_story(rng).text
        yield from (turn.content for turn in make_chat(rng))


def train_byte_level(directory: Path, vocab_size: int = 1500) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` in the manner of Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"'s| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = (END_OF_TEXT, IM_START, IM_END)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ("system\n", "user\n", "assistant\n")
    tokenizer.train_from_iterator([*sample_documents(), *(roles * 100)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_config(
        directory,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [IM_START, IM_END],
            "add_prefix_space": False,
            "model_max_length": 1024,
            "chat_template": CHATML_TEMPLATE,
        },
    )


def train_sentencepiece(directory: Path, vocab_size: int = 1536) -> None:
    """Write `tokenizer.model` and `tokenizer_config.json` in the manner of Llama 2."""
    model = io.BytesIO()
    lines = [line for text in sample_documents() for line in text.split("\n") if line]
    lines += ["[INST] <<SYS>>", "<</SYS>>", "[/INST]"] * 3000
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=2,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    _write_config(
        directory,
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": None,
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
            "model_max_length": 1024,
            "chat_template": INSTRUCTION_TEMPLATE,
        },
    )


def _write_config(directory: Path, config: dict[str, object]) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


TRAINERS = {"tiny-qwen3": train_byte_level, "tiny-llama": train_sentencepiece}


def main() -> None:
    """Train one of the two tokenizers into a directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=TRAINERS, default="tiny-qwen3")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    TRAINERS[arguments.model](arguments.out)


if __name__ == "__main__":
    main()
