"""Make the tokenizers of the bundled models from generated text.

`tiny-qwen3` gets a byte-level BPE in `tokenizer.json` (library `tokenizers`), `tiny-llama` a SentencePiece
BPE with byte fallback in `tokenizer.model` (needs `protobuf`). The pieces of the second are the tokens of the first,
the rarest excepted, so that what one model has learned can start the other (`tools/warm_start.py`). Both get a
`tokenizer_config.json` with a chat template.

`python -m tools.train_tokenizer --model tiny-qwen3 OUT`
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
BYTE_LEVEL_VOCAB = 1500
SPACE = "\u2581"  # how SentencePiece writes it
# Of INSTRUCTION_TEMPLATE, in the order of merging.
TEMPLATE_PIECES = ("IN", "ST", "INST", "[/", "SY", "SYS", "<<", ">>", "</")


def sample_documents(seed: str = SEED, count: int = DOCUMENTS) -> Iterator[str]:
    """Generated stories and chat messages, without any template."""
    rng = random.Random(seed)
    for _ in range(count):
        yield make_story(rng).text
        yield from (turn.content for turn in make_chat(rng))


def train_bpe(vocab_size: int) -> Tokenizer:
    """A byte-level BPE with so many tokens, without special ones."""
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
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ("system\n", "user\n", "assistant\n")
    tokenizer.train_from_iterator([*sample_documents(), *(roles * 100)], trainer)
    return tokenizer


def train_byte_level(directory: Path, vocab_size: int = BYTE_LEVEL_VOCAB) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` in the manner of Qwen."""
    specials = (END_OF_TEXT, IM_START, IM_END)
    tokenizer = train_bpe(vocab_size - len(specials))
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
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    kinds = proto.ModelProto.SentencePiece
    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = vocab_size
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    for name, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=name, score=0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=kinds.BYTE)
    characters, merged = spell_out(train_bpe(BYTE_LEVEL_VOCAB))
    merged = merged[: vocab_size - len(model.pieces) - len(TEMPLATE_PIECES) - len(characters)]
    for rank, piece in enumerate([*merged, *TEMPLATE_PIECES, *characters]):
        model.pieces.add(piece=piece, score=-rank)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
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


def spell_out(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Characters of the generated text, and what a byte-level BPE merges, in its order, as SentencePiece writes it."""
    texts = [text.replace(" ", SPACE) for text in sample_documents()]
    characters = sorted(set("".join([*texts, "[]", *TEMPLATE_PIECES])))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    letters = decoders.ByteLevel()
    return characters, [letters.decode(["".join(merge)]).replace(" ", SPACE) for merge in merges]


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
