"""Random checkpoints of well-known shapes, for benchmarks.

    python -m tools.random_model --preset qwen3-0.6b OUT

The directory holds what a real one does: config, seeded weights, a tokenizer (every byte is a token, so any
text round-trips) and generation defaults. Text that such a model writes is noise; its cost is the real one.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.random_weights import Config, random_tensors, write_json, write_weights

DTYPES = {"bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16"), "f32": ("F32", "float32")}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258: after the bytes
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shape(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    tied: bool,
) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


QWEN3: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN2: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
LLAMA2: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}


def llama3(factor: float) -> Config:
    """Llama 3.1 (factor 8) and 3.2 (factor 32), stretched from 8,192 positions to 131,072."""
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return LLAMA2 | {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": scaling}


PRESETS: dict[str, Config] = {  # sizes as in the model cards
    "tiny": QWEN3 | shape(64, 160, 2, 4, 2, 32, 320, tied=True),
    "qwen3-0.6b": QWEN3 | shape(1024, 3072, 28, 16, 8, 128, 151936, tied=True),
    "qwen3-1.7b": QWEN3 | shape(2048, 6144, 28, 16, 8, 128, 151936, tied=True),
    "qwen3-4b": QWEN3 | shape(2560, 9728, 36, 32, 8, 128, 151936, tied=True),
    "qwen3-8b": QWEN3 | shape(4096, 12288, 36, 32, 8, 128, 151936, tied=False),
    "qwen2.5-0.5b": QWEN2 | shape(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "qwen2.5-1.5b": QWEN2 | shape(1536, 8960, 28, 12, 2, 128, 151936, tied=True),
    "llama-2-7b": LLAMA2 | shape(4096, 11008, 32, 32, 32, 128, 32000, tied=False),
    "llama-3.1-8b": llama3(8.0) | shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "llama-3.2-1b": llama3(32.0) | shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "llama-3.2-3b": llama3(32.0) | shape(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
}


def preset_config(preset: str, dtype: str = "bf16", layers: int | None = None) -> Config:
    """config.json of a preset; its special tokens are those of the byte tokenizer, not the real model's."""
    config = PRESETS[preset] | {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "torch_dtype": DTYPES[dtype][1],
        "use_cache": True,
    }
    return config if layers is None else config | {"num_hidden_layers": layers}


def byte_alphabet() -> list[str]:
    """What byte-level BPE (GPT-2) writes for each byte: its own character if visible, else one above 255."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges (token id = byte value, then special tokens), ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "generation_config.json", {"do_sample": False, "eos_token_id": [258, 256]})


class ProgressLine:
    """One line on stderr, rewritten ten times a second: share done and speed."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.shown < 0.1:
            return
        self.shown = now
        speed = done / 1e6 / max(now - self.start, 1e-9)
        end = "\n" if done == total else ""
        text = f"\rwriting weights: {done / total:4.0%} of {total / 1e9:.2f} GB, {speed:.0f} MB/s "
        print(text, end=end, file=sys.stderr, flush=True)


def clear_old_model(directory: Path) -> None:
    """Remove what an older run wrote, the config first, so that no mixture of the two is ever loaded."""
    (directory / "config.json").unlink(missing_ok=True)
    for path in (*directory.glob("model*.safetensors"), directory / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)


def write_model(
    directory: Path,
    config: Config,
    seed: int,
    dtype: str = "bf16",
    shard_bytes: int | None = None,
    quiet: bool = False,
) -> None:
    """Write a whole model directory; config.json comes last and so marks it as complete."""
    directory.mkdir(parents=True, exist_ok=True)
    clear_old_model(directory)
    tensors = random_tensors(config, (DTYPES[dtype][0],))
    write_weights(directory, tensors, seed, shard_bytes, progress=None if quiet else ProgressLine())
    write_tokenizer(directory)
    write_json(directory / "config.json", config)


def byte_count(text: str) -> int:
    """`5GB`, `500MB` or plain bytes; decimal units as Hugging Face's shard sizes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return math.ceil(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def seed_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.random_model", description="Write a random checkpoint of a well-known shape."
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; must be absent or empty")
    parser.add_argument("--preset", required=True, choices=list(PRESETS))
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--layers", type=positive, metavar="N", help="layers, instead of the preset's")
    parser.add_argument("--shard-size", type=byte_count, default="5GB", metavar="SIZE", help="default 5GB")
    parser.add_argument("--force", action="store_true", help="write into OUT even if it holds files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    out: Path = options.out
    if out.exists() and not out.is_dir():
        parser.error(f"{out} is not a directory")
    if out.is_dir() and any(out.iterdir()) and not options.force:
        parser.error(f"{out} is not empty; --force writes into it all the same")
    config = preset_config(options.preset, options.dtype, options.layers)
    try:
        write_model(out, config, options.seed, options.dtype, options.shard_size)
    except OSError as error:
        print(f"\n{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
