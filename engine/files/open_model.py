"""All that a model's files hold, whatever their format: weights, config, sampling defaults, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ModelConfig, load_config, load_generation_config
from engine.errors import RillError
from engine.files.checkpoint import Checkpoint
from engine.files.gguf import is_gguf, read_gguf
from engine.files.gguf_checkpoint import OTHER, GGUFCheckpoint
from engine.files.gguf_config import ROPE_FACTORS, is_paired, read_config, read_generation_config, with_rope_factors
from engine.files.model_files import local_path
from engine.text.gguf_tokenizer import gguf_tokenizer
from engine.text.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """What was found. name: of the directory or the file; no_tokenizer: why there is none, where there is none."""

    name: str
    checkpoint: Checkpoint
    config: ModelConfig
    generation_config: dict[str, Any]
    tokenizer: Tokenizer | None
    no_tokenizer: str = ""

    def vocab_size(self) -> int:
        """Ids that may be sampled: the embedding is often padded beyond the tokenizer's last token."""
        if self.tokenizer is None:
            return self.config.vocab_size
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise RillError(f"{self.checkpoint.directory}: the tokenizer has {self.tokenizer.vocab_size} tokens, the "
                            f"model's embedding {self.config.vocab_size}")  # fmt: skip
        return self.tokenizer.vocab_size


def open_model(
    model: str | Path, tokenizer: str | Path | None = None, dtype: str = "auto", with_tokenizer: bool = True
) -> ModelFiles:
    """Checks the files of a model (LLM says what that may be) and reads all but its weights. A tokenizer that is asked
    for must load. Raises UsageError or RillError naming the file."""
    path = local_path(model)
    if is_gguf(path):
        return _open_gguf(path, tokenizer, dtype, with_tokenizer)
    return _open_directory(path, tokenizer, with_tokenizer)


def _open_directory(path: Path, tokenizer: str | Path | None, with_tokenizer: bool) -> ModelFiles:
    checkpoint = Checkpoint(path)
    directory = checkpoint.directory
    config = load_config(checkpoint.config_path)
    generation_config = load_generation_config(directory / "generation_config.json")
    found = tokenizer is not None or any((directory / name).exists() for name in TOKENIZER_FILES)
    loaded = load_tokenizer(directory if tokenizer is None else tokenizer) if found and with_tokenizer else None
    missing = "" if found else f"{directory} has no {' or '.join(TOKENIZER_FILES)}"
    return ModelFiles(directory.name, checkpoint, config, generation_config, loaded, missing)


def _open_gguf(path: Path, tokenizer: str | Path | None, dtype: str, with_tokenizer: bool) -> ModelFiles:
    file = read_gguf(path)
    config = read_config(file)
    checkpoint = GGUFCheckpoint(file, dtype, config.head_dim if is_paired(file) else 0)
    if ROPE_FACTORS in file.tensors:
        config = with_rope_factors(config, checkpoint.take(OTHER + ROPE_FACTORS, (config.head_dim // 2,)))
    loaded = None
    if with_tokenizer:
        loaded = gguf_tokenizer(file.metadata, str(path)) if tokenizer is None else load_tokenizer(tokenizer)
    return ModelFiles(path.name, checkpoint, config, read_generation_config(file), loaded,
                      "" if loaded else f"{path} has no tokenizer.ggml.model")  # fmt: skip
