"""GGUF: one file with a model's metadata, its tokenizer among them, and its tensors.

Source: the format's specification, docs/gguf.md of ggml. Versions 2 and 3, little endian. A file is untrusted input:
everything is checked before anything is allocated for it, and nothing it claims takes more memory than it has bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.errors import RillError
from engine.files.checkpoint import StoredTensor, read_into, signature
from engine.files.gguf_blocks import OTHERS, TYPES
from engine.files.json_file import brief

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000  # real ones have less than 20 MB, nearly all of it tokens
MAX_DIMENSIONS = 4
ALIGNMENT = 32  # of tensors, where general.alignment says nothing

_CHUNK = 1 << 20
_NUMBERS: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {n: np.dtype(f"<{code}") for n, code in enumerate("u1 i1 u2 i2 u4 i4 f4 u1".split())}
    | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_KEY_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8  # the least that one takes


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds. Metadata are int, float, bool, str, list[str] or arrays; a tensor's dtype is the name of its
    block type, its shape row-major (the file's own order is the reverse)."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """By its name, or by what it begins with."""
    if path.suffix == ".gguf":
        return not path.is_dir()
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def extent(file: Path, field: str, begin: int, count: int, unit: int, end: int) -> int:
    """begin + count · unit, if that is not beyond `end`. All arithmetic on sizes that a file claims goes through here;
    integers have no width to overflow. Raises RillError."""
    result = begin + count * unit
    if not (0 <= begin <= end and 0 <= count and 0 <= unit and result <= end):
        claim = f"claims {brief(count)} × {brief(unit)} bytes behind the first {brief(begin)}"
        raise RillError(f"{file}: {field}: {claim}, where no more than {end:,} can be")
    return result


def read_gguf(path: Path) -> GGUFFile:
    """Header, metadata and tensor directory of a file. Raises RillError for any that is not wholly valid."""
    if path.exists() and not path.is_file():
        raise RillError(f"{path}: is not a regular file")
    header = _Header(path, signature(path)[1])
    tensor_count, key_count = _counts(header)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = header.string("metadata key")
        if key in metadata:
            raise header.error(brief(key), "appears twice")
        metadata[key] = _value(header, key)
    entries = _directory(header, tensor_count)
    return GGUFFile(path, MappingProxyType(metadata), MappingProxyType(_place(header, metadata, entries)))


class _Header:
    """The file's beginning, read piece by piece as far as it goes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.limit = min(size, MAX_HEADER_BYTES)
        self.at = 0
        self._data = bytearray()

    def error(self, field: str, problem: str) -> RillError:
        return RillError(f"{self.path}: {field}: {problem}")

    def take(self, field: str, count: int, unit: int = 1) -> memoryview:
        """The next count · unit bytes."""
        start = self.at
        self.at = extent(self.path, field, start, count, unit, self.limit)
        if self.at > len(self._data):
            self._read_to(self.at)
        return memoryview(self._data)[start : self.at]

    def _read_to(self, end: int) -> None:
        """Reads on, as much again as is there already: a file is read once, and no more than twice what is needed."""
        begin = len(self._data)
        piece = bytearray(min(max(end - begin, begin, _CHUNK), self.limit - begin))
        read_into(self.path, begin, memoryview(piece))
        self._data = self._data + piece  # not in place: views of it are about

    def integer(self, field: str, width: int) -> int:
        """The next integer, of so many bytes."""
        return int.from_bytes(self.take(field, width), "little")

    def string(self, field: str) -> str:
        data = self.take(field, self.integer(field, 8))
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(brief(field), f"is not UTF-8 (byte {error.start})") from None


def _counts(header: _Header) -> tuple[int, int]:
    if header.size < 24 or bytes(header.take("magic", 4)) != MAGIC:
        raise RillError(f"{header.path}: is not a GGUF file")
    version = header.integer("version", 4)
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        found = "its numbers are big endian" if big_endian else f"found {version}"
        raise header.error("version", f"must be {' or '.join(map(str, VERSIONS))}, little endian; {found}")
    tensor_count, key_count = header.integer("tensor count", 8), header.integer("metadata count", 8)
    least = extent(header.path, "metadata count", header.at, key_count, _KEY_BYTES, header.limit)
    extent(header.path, "tensor count", least, tensor_count, _TENSOR_BYTES, header.limit)
    if not tensor_count:
        raise header.error("tensor count", "is 0: this file holds no weights")
    return tensor_count, key_count


def _value(header: _Header, key: str) -> Any:
    kind = header.integer(brief(key), 4)
    if kind == _STRING:
        return header.string(key)
    if kind != _ARRAY:
        return _numbers(header, key, kind, 1)[0].item()
    kind, count = header.integer(brief(key), 4), header.integer(brief(key), 8)
    if kind != _STRING:
        return _numbers(header, key, kind, count)
    extent(header.path, brief(key), header.at, count, 8, header.limit)  # each has a length at least
    return [header.string(key) for _ in range(count)]


def _numbers(header: _Header, key: str, kind: int, count: int) -> np.ndarray:
    if kind not in _NUMBERS:
        nested = "an array of arrays" if kind == _ARRAY else f"of unknown type {kind}"
        raise header.error(brief(key), f"is {nested}")
    dtype = _NUMBERS[kind]
    values = np.frombuffer(header.take(brief(key), count, dtype.itemsize), dtype).copy()
    if kind == _BOOL:
        if (values > 1).any():
            raise header.error(brief(key), "is neither true nor false")
        return values.astype(bool)
    return values


@dataclass(frozen=True)
class _Entry:
    """A tensor as the directory has it; its offset counts from the beginning of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    offset: int


def _directory(header: _Header, count: int) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        name = header.string("tensor name")
        if name in entries:
            raise header.error(f"tensor {brief(name)}", "appears twice")
        entries[name] = _entry(header, name, f"tensor {brief(name)}")
    return list(entries.values())


def _entry(header: _Header, name: str, field: str) -> _Entry:
    dimensions = header.integer(field, 4)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise header.error(field, f"has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    sizes = struct.unpack(f"<{dimensions}Q", header.take(field, dimensions, 8))  # the first one varies fastest
    kind, offset = header.integer(field, 4), header.integer(field, 8)
    if kind not in TYPES:
        supported = ", ".join(block.name for block in TYPES.values())
        raise header.error(field, f"has type {OTHERS.get(kind, kind)}; supported: {supported}")
    block = TYPES[kind]
    if not all(sizes) or sizes[0] % block.size:
        problem = f"whose rows are no multiple of the {block.size} weights in a block of {block.name}"
        raise header.error(field, f"has shape {brief(list(sizes[::-1]))}, {problem if all(sizes) else 'with a zero'}")
    nbytes = extent(header.path, field, 0, sizes[0] // block.size, block.nbytes, header.size)
    for size in sizes[1:]:
        nbytes = extent(header.path, field, 0, size, nbytes, header.size)
    return _Entry(name, sizes[::-1], block.name, nbytes, offset)


def _place(header: _Header, metadata: Mapping[str, Any], entries: list[_Entry]) -> dict[str, StoredTensor]:
    """Tensors lie one behind another in the directory's order, each at the next multiple of the alignment: so none
    overlaps, and none is missing."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.error("general.alignment", f"must be a power of two, found {brief(alignment)}")
    start = end = extent(header.path, "the tensors' data", header.at, -header.at % alignment, 1, header.size)
    tensors = {}
    for entry in entries:
        field = f"tensor {brief(entry.name)}"
        begin = extent(header.path, field, end, (start - end) % alignment, 1, header.size)
        if entry.offset != begin - start:
            problem = f"lies at {entry.offset:,}, but the one before it ends at {begin - start:,}, padding included"
            raise header.error(field, problem)
        end = extent(header.path, field, begin, entry.nbytes, 1, header.size)
        tensors[entry.name] = StoredTensor(entry.name, entry.type, entry.shape, header.path, begin, entry.nbytes)
    return tensors
