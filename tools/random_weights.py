"""Random checkpoints in Hugging Face format: same seed, same bytes, on any machine and NumPy version.

Only the raw 64-bit stream of PCG64 is used, which NumPy promises never to change; every 16 bits of it pick
one of 65,536 values of a normal distribution. A tensor's stream is seeded by its name, so it depends neither
on the other tensors nor on the cut into shards. Files are written piece by piece: memory stays at a few
megabytes however large the model is. Needs nothing but NumPy and ml_dtypes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {  # by the names that a safetensors header uses
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
CHUNK = 1 << 18  # elements made at a time; a multiple of 4, the draws in one 64-bit word

Config = dict[str, Any]  # the content of config.json
Progress = Callable[[int, int], None]  # (bytes written so far, bytes in all)


@dataclass(frozen=True)
class Scales:
    """Standard deviations that keep activations near 1 through any number of layers."""

    logit: float = 3.0  # of the logits: rows of the embedding and of lm_head get logit / sqrt(hidden_size)
    matrix: float = 1.0  # gain of a linear layer: its weights get matrix / sqrt(fan_in)
    norm: float = 0.1  # norm weights lie around 1
    bias: float = 0.1  # biases lie around 0


@dataclass(frozen=True)
class RandomTensor:
    """A tensor that is known by name, shape and distribution, and made only while it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    stream: str  # the name that seeds its values; a stored lm_head that is tied shares the embedding's

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def chunks(self, seed: int) -> Iterator[np.ndarray]:
        """The values in order, flat, at most CHUNK elements at a time."""
        bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(self.stream.encode())]))
        values = (self.mean + self.std * normal_values()).astype(np.float32).astype(DTYPES[self.dtype])
        size = math.prod(self.shape)
        for start in range(0, size, CHUNK):
            count = min(CHUNK, size - start)
            draws = bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")
            yield values[draws[:count]]


@cache
def normal_values() -> np.ndarray:
    """65,536 equally likely values of the standard normal distribution, float64, ascending.

    Rounded to 1/4096, so that a last bit that differs between two C libraries changes nothing.
    """
    quantile = NormalDist().inv_cdf
    lower = np.array([quantile((i + 0.5) / 65536) for i in range(32768)])
    values: np.ndarray = np.rint(np.concatenate([lower, -lower[::-1]]) * 4096) / 4096
    return values


def head_dim(config: Config) -> int:
    """The config's own head_dim, or hidden_size / num_attention_heads where it gives none."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names (without `model.layers.N.`) and shapes of one decoder layer's tensors, biases included."""
    kind, hidden, inter = config["model_type"], config["hidden_size"], config["intermediate_size"]
    q_width = config["num_attention_heads"] * head_dim(config)
    kv_width = config["num_key_value_heads"] * head_dim(config)
    matrices = {
        "self_attn.q_proj": (q_width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, q_width),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    attention_bias = kind != "qwen2" and config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, shape in matrices.items():
        shapes[f"{name}.weight"] = shape
        part = name.split(".")[1]
        qwen2_bias = kind == "qwen2" and part in ("q_proj", "k_proj", "v_proj")
        llama_bias = kind == "llama" and name.startswith("mlp") and config.get("mlp_bias", False)
        if qwen2_bias or llama_bias or (attention_bias and name.startswith("self_attn")):
            shapes[f"{name}.bias"] = shape[:1]
    if kind == "qwen3":
        shapes |= {f"self_attn.{part}_norm.weight": (head_dim(config),) for part in ("q", "k")}
    return shapes | {"post_attention_layernorm.weight": (hidden,)}


def tensor_shapes(config: Config, store_tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a qwen3, qwen2 or llama checkpoint, in the usual order.

    `store_tied` lists lm_head.weight even where the config ties it to the embedding.
    """
    vocab_by_hidden = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab_by_hidden}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(config).items()}
    shapes["model.norm.weight"] = (config["hidden_size"],)
    if store_tied or not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = vocab_by_hidden
    return shapes


def random_tensors(
    config: Config, dtypes: Sequence[str] = ("BF16",), scales: Scales | None = None, store_tied: bool = False
) -> list[RandomTensor]:
    """The checkpoint's tensors with their distributions; `dtypes` are dealt out in turn."""
    scales = scales or Scales()
    tensors: list[RandomTensor] = []
    for index, (name, shape) in enumerate(tensor_shapes(config, store_tied).items()):
        mean, std = 0.0, scales.matrix / math.sqrt(shape[-1])
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            std = scales.logit / math.sqrt(shape[-1])
        elif name.endswith("norm.weight"):
            mean, std = 1.0, scales.norm
        elif name.endswith(".bias"):
            std = scales.bias
        dtype, stream = dtypes[index % len(dtypes)], name
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            dtype, stream = tensors[0].dtype, tensors[0].name
        tensors.append(RandomTensor(name, shape, dtype, mean, std, stream))
    return tensors


def split_shards(tensors: Sequence[RandomTensor], shard_bytes: int | None) -> list[list[RandomTensor]]:
    """Cut the list into runs of at most `shard_bytes` (a larger tensor gets a shard to itself)."""
    shards: list[list[RandomTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and shard_bytes is not None and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def safetensors_header(tensors: Sequence[RandomTensor], skew: int = 0) -> bytes:
    """Length and JSON header; the data section then starts `skew` bytes past a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * ((skew - len(text)) % 8)
    return len(text).to_bytes(8, "little") + text


def write_whole(path: Path, pieces: Iterator[bytes | memoryview]) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            for piece in pieces:
                file.write(piece)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    write_whole(path, iter([(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()]))


def write_safetensors(
    path: Path,
    tensors: Sequence[RandomTensor],
    seed: int,
    skew: int = 0,
    wrote: Callable[[int], None] | None = None,
) -> None:
    """Make the tensors and write them to one file; `wrote` hears of every piece's bytes."""

    def pieces() -> Iterator[bytes | memoryview]:
        yield safetensors_header(tensors, skew)
        for tensor in tensors:
            for chunk in tensor.chunks(seed):
                yield chunk.view(np.uint8).data
                if wrote is not None:
                    wrote(chunk.nbytes)

    write_whole(path, pieces())


def write_weights(
    directory: Path,
    tensors: Sequence[RandomTensor],
    seed: int,
    shard_bytes: int | None = None,
    skew: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index if it does not fit."""
    shards = split_shards(tensors, shard_bytes)
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", tensors, seed, skew, wrote)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / name, shard, seed, skew, wrote)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def directory_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of a directory's files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
