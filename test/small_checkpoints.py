"""Checkpoints for tests: valid ones written by hand, and the check that a bad one is refused in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.errors import RillError
from engine.files.model_files import INDEX_FILE

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def pack(tensors: Mapping[str, np.ndarray], padding: int = 0) -> bytes:
    """A safetensors file, not written by the library, so that `padding` can misalign the data."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        entries[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.tobytes()
    return frame(json.dumps(entries).encode() + b" " * padding, data)


def frame(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((7,)).astype(np.float16),
        "c.weight": rng.standard_normal((2, 3, 1)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(1.5, np.float32),
    }


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def make(directory: Path, files: Mapping[str, bytes | object]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name).write_bytes(data)
    return directory


def index_of(weight_map: object) -> dict[str, object]:
    return {"metadata": {"total_size": 1}, "weight_map": weight_map}


def make_sharded(directory: Path) -> Path:
    """Two shards, an index, and stray files that must not be looked into."""
    tensors = sample()
    first = {name: tensors[name] for name in ("a.weight", "scalar")}
    second = {name: tensors[name] for name in ("b.weight", "c.weight", "empty")}
    weight_map = dict.fromkeys(first, "m-1.safetensors") | dict.fromkeys(second, "m-2.safetensors")
    stray = {"a.weight": np.zeros((3, 5), np.float32)}
    files = {"m-1.safetensors": pack(first), "m-2.safetensors": pack(second, 3)}
    files |= {"m-3.safetensors": pack(stray), "model.safetensors": b"not one", "pytorch_model.bin": b"pickle"}
    return make(directory, {**files, INDEX_FILE: index_of(weight_map)})


def refusal(act: Callable[[], object], *parts: str | Path) -> str:
    """The one line that `act` is refused with; it must name all `parts`."""
    with pytest.raises(RillError) as caught:
        act()
    message = str(caught.value)
    assert message.isprintable()
    for part in parts:
        assert str(part) in message
    return message
