"""The weights of a model: what its files hold, and where in them.

Everything is checked when a Checkpoint is made, before any weight is read or memory for one is allocated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from engine.errors import RillError
from engine.files.json_file import brief, one_line, parse_object
from engine.files.model_files import find_weights, local_path, read_index
from engine.files.stored_quants import find_quantised, stored_names

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

STORED_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
)
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"  # a buffer that old exports saved; it follows from the config


class Readable(Protocol):
    """A tensor that a model takes: `dtype` is the name, in STORED_DTYPES, of what `read` and `rows` return."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def read(self) -> npt.NDArray[Any]: ...
    def rows(self, start: int, stop: int) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes, row-major, at an absolute `offset` that need not be aligned.

    `dtype` is "F32", "F16" or "BF16"; other names of the formats occur, which `Checkpoint.take` refuses or decodes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read(self) -> npt.NDArray[Any]:
        """The array in its stored dtype. Raises RillError where the file has become shorter or unreadable.

        It is read, not mapped: a mapping of a file that is cut short later ends the process (SIGBUS).
        """
        return self.rows(0, self.shape[0]) if self.shape else self._view(self.row_bytes(0, 1), ())

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Some of the rows of what `read` returns."""
        return self._view(self.row_bytes(start, stop), (stop - start, *self.shape[1:]))

    def row_bytes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The bytes of some rows, as they are stored."""
        row = self.nbytes // (self.shape[0] or 1) if self.shape else self.nbytes
        data = np.empty((stop - start) * row, np.uint8)
        read_into(self.file, self.offset + start * row, data.data)
        return data

    def columns(self, rows: range, columns: range) -> npt.NDArray[Any]:
        """Some columns of some rows of a matrix; of each row, only these are read."""
        row, item = self.nbytes // self.shape[0], STORED_DTYPES[self.dtype].itemsize
        data = np.empty(len(rows) * len(columns) * item, np.uint8)
        parts = data.reshape(len(rows), -1)
        with _opened(self.file) as file:
            for part, at in zip(parts, rows, strict=True):
                _fill(file, self.file, self.offset + at * row + columns.start * item, part.data)
        return self._view(data, (len(rows), len(columns)))

    def _view(self, data: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return data.view(STORED_DTYPES[self.dtype]).reshape(shape)


class Checkpoint:
    """The tensors of a model, by name.

    `model` is a directory, a hub name, a `.safetensors` file or an index file. In a directory, the index
    decides where there is one, else `model.safetensors` is read; no other file is ever looked into. Tensors
    that lie in a shard without being in the index are visible, as in transformers; but where the index
    places a tensor, a second copy in another shard is not.

    >>> checkpoint = Checkpoint("models/tiny-qwen3")
    >>> norm = checkpoint.take("model.norm.weight", (hidden_size,)).read()
    >>> checkpoint.finish()
    """

    def __init__(self, model: str | Path) -> None:
        path = local_path(model)
        self.directory = path if path.is_dir() else path.parent
        self.config_path = self.directory / "config.json"
        weights = find_weights(path)
        self._hold(weights, _read_shards(weights) if weights.suffix == ".json" else read_header(weights))

    def _hold(self, weights_path: Path, tensors: dict[str, StoredTensor]) -> None:
        self.weights_path = weights_path
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)
        self._signatures = {file: signature(file) for file in {t.file for t in tensors.values()}}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def stored_name(self, name: str) -> str:
        """What the files call a tensor."""
        return name

    def take(self, name: str, shape: tuple[int, ...]) -> Readable:
        """The tensor a model needs, marked as used; it may be taken again (tied embeddings).

        Raises RillError where it is absent, has another shape, or is not a float of 16 or 32 bits.
        """
        tensor = self.tensors.get(name)
        expected = list(shape)
        if tensor is None and (quantised := self._find_quantised(name, shape)):
            return quantised
        if tensor is None:
            raise RillError(f"{self.weights_path}: tensor {self.stored_name(name)!r} of shape {expected} is missing")
        found = list(tensor.shape)
        if found != expected:
            problem = f"has shape {found}, but the config asks for {expected}"
            raise RillError(f"{tensor.file}: tensor {tensor.name!r} {problem}")
        self._taken.add(name)
        return self._readable(name, tensor)

    def _find_quantised(self, name: str, shape: tuple[int, ...]) -> Readable | None:
        try:
            found = find_quantised(name, shape, self.tensors)
        except RillError as error:
            raise RillError(f"{self.weights_path}: {error}") from None
        if found:
            self._taken.update(stored_names(name, found.format))
        return found

    def _readable(self, name: str, tensor: StoredTensor) -> Readable:
        if tensor.dtype not in STORED_DTYPES:
            problem = f"has dtype {tensor.dtype}, which is not one of {', '.join(STORED_DTYPES)}"
            raise RillError(f"{tensor.file}: tensor {tensor.name!r} {problem}")
        return tensor

    def finish(self, ignore: Collection[str] = ()) -> None:
        """To be called when all weights have been read. Raises RillError where tensors are left over that are
        neither in `ignore` nor known to be harmless, or where a file has changed since it was checked."""
        unused = [t.name for n, t in self.tensors.items() if n not in self._taken and n not in ignore]
        unused = [n for n in unused if not n.endswith(_HARMLESS_SUFFIX)]
        if unused:
            more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
            names = ", ".join(map(brief, unused[:4])) + more
            raise RillError(f"{self.weights_path}: holds tensors that the model does not use: {names}")
        for file, before in self._signatures.items():
            if signature(file) != before:
                raise RillError(f"{file}: has changed while it was read")


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    shards, placed = read_index(index)
    for shard in shards:
        if not shard.exists():
            raise RillError(f"{shard}: no such file, though {index.name} names it")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(shard).items():
            if placed.get(name, shard) != shard:
                continue
            if name in tensors:
                problem = f"is in {tensors[name].file.name} too, and {index.name} does not say which counts"
                raise RillError(f"{shard}: tensor {brief(name)} {problem}")
            tensors[name] = tensor
    for name, shard in placed.items():
        if name not in tensors:
            raise RillError(f"{shard}: has no tensor {brief(name)}, though {index.name} places it there")
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds. Raises RillError for any file that is not wholly valid.

    The library validates (sizes, offsets without hole or overlap, dtypes, shapes), without telling where
    data lies; so the header is parsed again here, which also refuses keys that appear twice.
    """
    size = signature(file)[1]
    length = _header_length(file, size)
    _validate(file)
    header = bytearray(length)
    read_into(file, 8, memoryview(header))
    entries = parse_object(bytes(header), f"{file}: the header")
    entries.pop("__metadata__", None)
    try:
        return {name: _stored(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError):  # not what was validated a moment ago
        raise RillError(f"{file}: has changed while it was read") from None


def _validate(file: Path) -> None:
    try:
        with safe_open(file, framework="np"):
            pass
    except Exception as error:
        reason = one_line(str(error).removeprefix("Error while deserializing header: "))
        raise RillError(f"{file}: is not a valid safetensors file: {reason}") from None


def _header_length(file: Path, size: int) -> int:
    if size < 8:
        raise RillError(f"{file}: is not a safetensors file: it has only {size} bytes")
    prefix = bytearray(8)
    read_into(file, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        problem = f"its header claims {length:,} bytes of the file's {size:,} (at most {MAX_HEADER_BYTES:,})"
        raise RillError(f"{file}: is not a valid safetensors file: {problem}")
    return length


def _stored(file: Path, name: str, entry: dict[str, Any], data: int, size: int) -> StoredTensor:
    """One entry of a header, whose data section begins at `data`. Bounds are checked once more, so that
    readers stay inside the file even if it was replaced between the two parses."""
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    nbytes, dtype = end - begin, STORED_DTYPES.get(entry["dtype"])
    if not 0 <= begin <= end <= size - data or dtype and nbytes != math.prod(shape) * dtype.itemsize:
        raise RillError(f"{file}: tensor {brief(name)} does not fit its place in the file")
    return StoredTensor(name, entry["dtype"], shape, file, data + begin, nbytes)


def signature(file: Path) -> tuple[int, int, int]:
    """Inode, size, time of change: whether a file is still what it was. Raises RillError where it cannot be read."""
    try:
        status = file.stat()
    except OSError as error:
        raise RillError(f"{file}: cannot be read: {error}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_into(file: Path, offset: int, target: memoryview) -> None:
    """Fill `target` with the file's bytes from `offset`; a file that ends early raises RillError."""
    with _opened(file) as opened:
        _fill(opened, file, offset, target)


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """The file's descriptor; what goes wrong meanwhile names it."""
    try:
        with file.open("rb", buffering=0) as opened:
            yield opened.fileno()
    except OSError as error:
        raise RillError(f"{file}: cannot be read: {error}") from None


def _fill(descriptor: int, file: Path, offset: int, target: memoryview) -> None:
    while len(target):
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise RillError(f"{file}: ends {len(target):,} bytes early; has it been cut short?")
        target, offset = target[count:], offset + count
