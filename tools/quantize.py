"""Writes a quantised copy of a checkpoint, which loads as fast as it is read and needs no original.

    python -m tools.quantize MODEL OUT --dtype int4

MODEL is a checkpoint in Hugging Face format, OUT a directory that does not exist yet. Matrices become integers with a
scale for each group of inputs (engine/files/stored_quants.py has the format), embedding and logits at least in 8 bits;
everything else stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from engine import RillError, UsageError
from engine.abi import INT4
from engine.config import MAX_CONFIG_BYTES
from engine.files.checkpoint import Checkpoint, Readable
from engine.files.json_file import parse_object, read_bytes
from engine.files.stored_quants import QUANT_METHOD, pack_pairs, stored_names
from engine.quantised import Format, format_of, quantise, stack

SLICE = 1 << 20  # weights that are quantised at once
SHARD = 1 << 30  # bytes of a file, or a tensor more
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
OTHER_FILES = ("tokenizer*", "generation_config.json", "chat_template*", "special_tokens_map.json", "vocab.json",
               "merges.txt", "added_tokens.json")  # fmt: skip
NUMPY = {"F32": np.float32, "F16": np.float16}


def format_for(name: str, dimensions: int, dtype: str) -> Format | None:
    """How a tensor of a model is to be stored; None: as it is."""
    if name in TABLES:
        return format_of(dtype.replace("int4", "int8"))
    return format_of(dtype) if name.endswith("_proj.weight") and dimensions == 2 else None


def quantised(name: str, tensor: Readable, format: Format) -> dict[str, np.ndarray]:
    step = max(1, SLICE // tensor.shape[1])
    parts = [quantise(tensor.rows(start, min(start + step, tensor.shape[0])), format, name)
             for start in range(0, tensor.shape[0], step)]  # fmt: skip
    whole = stack(parts)
    quants = pack_pairs(whole.quants) if format.dtype == INT4 else whole.quants
    return dict(zip(stored_names(name, format), (np.ascontiguousarray(quants), whole.scales), strict=True))


def all_tensors(checkpoint: Checkpoint, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    for i, (name, stored) in enumerate(sorted(checkpoint.tensors.items()), 1):
        tensor, format = checkpoint.take(name, stored.shape), format_for(name, len(stored.shape), dtype)
        if format:
            yield from quantised(name, tensor, format).items()
        else:
            values = tensor.read()
            yield name, values if stored.dtype in NUMPY else values.astype(np.float32)
        print(f"\r{i} of {len(checkpoint.tensors)} tensors", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def write_shards(tensors: Iterator[tuple[str, np.ndarray]], directory: Path) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    place: dict[str, int] = {}
    size = total = 0
    for name, values in tensors:
        if size and size + values.nbytes > SHARD:
            save_file(shards[-1], directory / f"{len(shards)}.part")
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name], place[name] = values, len(shards)
        size += values.nbytes
        total += values.nbytes
    save_file(shards[-1], directory / f"{len(shards)}.part")
    if len(shards) == 1:
        (directory / "1.part").rename(directory / "model.safetensors")
        return
    names = {i: f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)}
    for i, file in names.items():
        (directory / f"{i}.part").rename(directory / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in place.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def write_model(model: str, out: Path, dtype: str) -> None:
    """Raises UsageError or RillError; then OUT does not exist."""
    if format_of(dtype) is None:
        raise UsageError(f"dtype {dtype!r}: expected int8 or int4, or one with a group such as int4-64")
    if out.exists() or not out.parent.is_dir():
        raise UsageError(f"{out}: " + ("exists already" if out.exists() else f"{out.parent} is no directory"))
    checkpoint = Checkpoint(model)
    config = parse_object(read_bytes(checkpoint.config_path, MAX_CONFIG_BYTES), str(checkpoint.config_path))
    if config.get("quantization_config"):
        raise UsageError(f"{checkpoint.config_path}: is quantised already")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        directory = Path(name) / "model"
        directory.mkdir()
        write_shards(all_tensors(checkpoint, dtype), directory)
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "dtype": dtype}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for pattern in OTHER_FILES:
            for file in checkpoint.directory.glob(pattern):
                shutil.copy(file, directory)
        directory.rename(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.quantize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--dtype", default="int8", help="int8, int4, or with a group: int4-64")
    options = parser.parse_args(arguments)
    try:
        write_model(options.model, options.out, options.dtype)
    except (RillError, OSError) as error:
        print(f"tools.quantize: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
