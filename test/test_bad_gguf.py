"""GGUF files that are not valid: each is refused in one line, or loads exactly what it says."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import refusal

from engine.errors import RillError
from engine.files.gguf import MAX_HEADER_BYTES, extent, read_gguf
from engine.files.gguf_blocks import BLOCKS
from engine.files.open_model import open_model

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name: bytes | str, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def tensor(name: bytes | str = "a", sizes: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(version: int, tensors: int, keys: int, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def file_of(keys: list[bytes], tensors: list[bytes], data: int = 32, *, alignment: int = 32, version: int = 3) -> bytes:
    head = header(version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(range(256)) * (data // 256) + bytes(range(data % 256))


ONE = [key("some.number", U32, struct.pack("<I", 7))]
GOOD = file_of(ONE, [tensor()])
HUGE = 2**64 - 1
BAD_GGUF = {
    "empty file": b"",
    "only the magic": b"GGUF",
    "one byte too few for a header": GOOD[:23],
    "another magic": b"GGML" + GOOD[4:],
    "a zip": b"PK\x03\x04" + bytes(60),
    "version 1": file_of(ONE, [tensor()], version=1),
    "version 4": file_of(ONE, [tensor()], version=4),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(64),
    "no tensors": file_of(ONE, []),
    "2^64 - 1 tensors": header(3, HUGE, 0) + bytes(100),
    "2^64 - 1 keys": header(3, 1, HUGE) + bytes(100),
    "as many keys as would overflow to few": header(3, 1, 2**63 // 13 * 2 + 1) + bytes(100),
    "one tensor more than there is": header(3, 2, 1) + ONE[0] + tensor() + bytes(32),
    "one key more than there is": header(3, 1, 2) + ONE[0] + tensor() + bytes(32),
    "a key twice": file_of(ONE * 2, [tensor()]),
    "a key that is not UTF-8": file_of([key(b"\xff", U32, bytes(4))], [tensor()]),
    "a text that is not UTF-8": file_of([key("a", STRING, text(b"\xc3"))], [tensor()]),
    "a key of 2^64 - 1 bytes": header(3, 1, 1) + struct.pack("<Q", HUGE) + bytes(100),
    "a text of 2^63 bytes": file_of([key("a", STRING, struct.pack("<Q", 2**63))], [tensor()]),
    "a text that ends after the file": file_of([key("a", STRING, struct.pack("<Q", 200))], [tensor()]),
    "an unknown type": file_of([key("a", 13, bytes(8))], [tensor()]),
    "type 2^32 - 1": file_of([key("a", 2**32 - 1, bytes(8))], [tensor()]),
    "a bool of 2": file_of([key("a", BOOL, b"\x02")], [tensor()]),
    "an array of bools with a 3 in it": file_of([key("a", ARRAY, array(BOOL, 2, b"\x01\x03"))], [tensor()]),
    "an array of arrays": file_of([key("a", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4))))], [tensor()]),
    "an array of unknown type": file_of([key("a", ARRAY, array(99, 1, bytes(8)))], [tensor()]),
    "an array of 2^64 - 1 numbers": file_of([key("a", ARRAY, array(U64, HUGE))], [tensor()]),
    "an array of 2^61 numbers, 0 bytes in 64 bits": file_of([key("a", ARRAY, array(U64, 2**61))], [tensor()]),
    "an array of 2^40 texts": file_of([key("a", ARRAY, array(STRING, 2**40))], [tensor()]),
    "an array of unknown type with no elements": file_of([key("a", ARRAY, array(99, 0))], [tensor()]),
    "a tensor twice": file_of(ONE, [tensor(), tensor(offset=32)], 64),
    "a tensor twice, in one place": file_of(ONE, [tensor(), tensor()]),
    "a tensor name that is not UTF-8": file_of(ONE, [tensor(b"\xff")]),
    "no dimensions": file_of(ONE, [tensor(sizes=())]),
    "five dimensions": file_of(ONE, [tensor(sizes=(2, 1, 1, 1, 4))]),
    "2^32 - 1 dimensions": file_of(ONE, [text("a") + struct.pack("<IQIQ", 2**32 - 1, 8, 0, 0)]),
    "a dimension of 0": file_of(ONE, [tensor(sizes=(4, 0))]),
    "a dimension of 2^64 - 1": file_of(ONE, [tensor(sizes=(4, HUGE))]),
    "dimensions that overflow to the right size": file_of(ONE, [tensor(sizes=(2**63, 2, 8))]),
    "dimensions that overflow to 0": file_of(ONE, [tensor(sizes=(2**32, 2**32))]),
    "an unknown tensor type": file_of(ONE, [tensor(kind=99)]),
    "a tensor type that is not read": file_of(ONE, [tensor(sizes=(256, 1), kind=10)], 256),
    "a tensor type that was removed": file_of(ONE, [tensor(kind=4)]),
    "rows that are no whole blocks": file_of(ONE, [tensor(sizes=(48, 1), kind=8)], 64),
    "rows that are no whole blocks though all of it is": file_of(ONE, [tensor(sizes=(16, 2), kind=8)], 64),
    "a tensor that ends after the file": file_of(ONE, [tensor(sizes=(4, 3))]),
    "data cut by a byte": GOOD[:-1],
    "no data": GOOD[:-32],
    "an offset beyond the file": file_of(ONE, [tensor(offset=32)]),
    "an offset of 2^64 - 32": file_of(ONE, [tensor(offset=2**64 - 32)]),
    "an offset that is not aligned": file_of(ONE, [tensor(), tensor("b", offset=33)], 96),
    "two tensors in one place": file_of(ONE, [tensor(), tensor("b")], 64),
    "tensors that overlap": file_of(ONE, [tensor(sizes=(4, 4)), tensor("b", offset=32)], 96),
    "a hole": file_of(ONE, [tensor(), tensor("b", offset=64)], 96),
    "a hole at the beginning": file_of(ONE, [tensor(offset=32)], 64),
    "an alignment of 0": file_of([key("general.alignment", U32, bytes(4))], [tensor()]),
    "an alignment of 24": file_of([key("general.alignment", U32, struct.pack("<I", 24))], [tensor()], alignment=24),
    "an alignment of 2^31": file_of([key("general.alignment", U32, struct.pack("<I", 2**31))], [tensor()]),
    "an alignment that is a fraction": file_of([key("general.alignment", F32, struct.pack("<f", 32))], [tensor()]),
    "an alignment that the file has not": file_of([key("general.alignment", U32, struct.pack("<I", 256))], [tensor()]),
    "an endless name": file_of(ONE, [tensor("\x1b[31m" + "x" * 9999, sizes=(3, 99))]),
}  # fmt: skip


def write(directory: Path, content: bytes) -> Path:
    file = directory / "model.gguf"
    file.write_bytes(content)
    return file


def test_the_good_file_that_the_bad_ones_are_made_of(tmp_path: Path) -> None:
    for version in (2, 3):
        found = read_gguf(write(tmp_path, file_of(ONE, [tensor()], version=version)))
        assert found.metadata == {"some.number": 7}
        assert found.tensors["a"].read().tobytes() == bytes(range(32)) and found.tensors["a"].shape == (2, 4)


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {f"add_{kind}{bits}": 2 ** (bits - 1) - 1 for kind in ("uint", "int") for bits in (8, 16, 32, 64)}
    for name, value in numbers.items():
        getattr(writer, name)(name, value)
    writer.add_float32("f", 0.5)
    writer.add_float64("d", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Füchsin \0")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("bools", [True, False])
    writer.add_array("texts", ["", "a", "狐狸"])
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.arange(5, dtype=np.float32))
    writer.add_tensor("b", np.arange(6, dtype=np.float16).reshape(1, 2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(file)
    assert {name: found.metadata[name] for name in numbers} == numbers
    assert (found.metadata["f"], found.metadata["d"], found.metadata["yes"]) == (0.5, 0.1, True)
    assert found.metadata["text"] == "Füchsin \0" and found.metadata["texts"] == ["", "a", "狐狸"]
    assert found.metadata["ints"].tolist() == [1, -2, 3] and found.metadata["bools"].tolist() == [True, False]
    assert found.tensors["a"].read().tolist() == [0, 1, 2, 3, 4] and found.tensors["a"].offset % 64 == 0
    assert found.tensors["b"].read().tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf(case: str, tmp_path: Path) -> None:
    file = write(tmp_path, BAD_GGUF[case])
    for act in (lambda: read_gguf(file), lambda: open_model(file)):
        message = refusal(act, f"{file}: ")
        assert len(message) < len(str(file)) + 300


@pytest.mark.parametrize("end", range(len(GOOD)))
def test_cut_anywhere(end: int, tmp_path: Path) -> None:
    refusal(lambda: read_gguf(write(tmp_path, GOOD[:end])), tmp_path)


def test_a_header_above_the_limit(tmp_path: Path) -> None:
    """Sparse: the file has the bytes that it claims, and they are no header."""
    file = write(tmp_path, header(3, 1, 1) + key("a", STRING, struct.pack("<Q", MAX_HEADER_BYTES)))
    os.truncate(file, 2 * MAX_HEADER_BYTES)
    refusal(lambda: read_gguf(file), file, "100,000,000")


@pytest.mark.parametrize("kind", [U32, STRING])
def test_no_claim_takes_more_memory_than_the_file_has_bytes(kind: int, tmp_path: Path) -> None:
    """Just as many elements as would fit if nothing else were there, so that only reading them finds out."""
    size = 200_000
    count = size // (4 if kind == U32 else 8)
    file = write(tmp_path, header(3, 1, 1) + key("a", ARRAY, array(kind, count)) + b"\0" * (size - 100))
    tracemalloc.start()
    try:
        refusal(lambda: read_gguf(file), file)
        assert tracemalloc.get_traced_memory()[1] < 12 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link", "unreadable"])
def test_what_is_not_a_regular_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    match kind:
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "dangling link":
            file.symlink_to(tmp_path / "nowhere")
        case _:
            file.symlink_to(file)
    refusal(lambda: read_gguf(file), file)
    refusal(lambda: open_model(file), file)


def test_a_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    file = write(tmp_path, file_of(ONE, [tensor(sizes=(4, 2000))], 32_000))
    stored = read_gguf(file).tensors["a"]
    os.truncate(file, 20_000)
    assert stored.rows(0, 1000).shape == (1000, 4)
    refusal(stored.read, file, "cut short")


def test_extent_refuses_what_does_not_fit() -> None:
    file = Path("file")
    assert extent(file, "a", 3, 4, 5, 23) == 23 and extent(file, "a", 3, 0, HUGE, 3) == 3
    for begin, count, unit, end in ((3, 4, 5, 22), (5, 0, 1, 4), (0, -1, 1, 9), (9, -1, 1, 9), (0, 1, -1, 9),
                                    (-1, 1, 1, 9), (0, 2**63, 2, 9), (0, HUGE, HUGE, HUGE)):  # fmt: skip
        refusal(lambda values=(begin, count, unit, end): extent(file, "a", *values), "file: a: ")  # type: ignore[misc]


KEYS = [
    key("some.number", U32, struct.pack("<I", 7)),
    key("some.text", STRING, text("abc")),
    key("some.texts", ARRAY, array(STRING, 2, text("a") + text("bc"))),
    key("some.numbers", ARRAY, array(U64, 2, bytes(16))),
]
VALID = file_of(KEYS, [tensor(), tensor("b", (32, 2), 8, 32), tensor("c", (3,), 1, 128)], 134)
PIECES = st.sampled_from([b"\0", b"\xff", b"\x01", b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"\xff" * 8, bytes(8)])


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_bytes(data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        piece = data.draw(st.binary(max_size=4) | PIECES)
        span = data.draw(st.sampled_from([0, 1, len(piece), len(piece)]))
        content[at : at + span] = piece
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    check_loads_truly_or_refuses(bytes(content))


def check_loads_truly_or_refuses(content: bytes) -> None:
    """What loads lies inside the file, in order, without overlap, and reads as the bytes that are there."""
    directory = Path(tempfile.mkdtemp())
    try:
        file = write(directory, content)
        try:
            found = read_gguf(file)
        except RillError as error:
            assert str(error).isprintable() and "model.gguf" in str(error)
            return
        end = 0
        for stored in found.tensors.values():
            block = BLOCKS[stored.dtype]
            assert end <= stored.offset and (end := stored.offset + stored.nbytes) <= len(content)
            assert stored.nbytes * block.size == int(np.prod(stored.shape)) * block.nbytes
            whole = stored.row_bytes(0, stored.shape[0]).tobytes()
            assert whole == content[stored.offset : end] and whole.endswith(
                stored.row_bytes(stored.shape[0] - 1, stored.shape[0]).tobytes()
            )
    finally:
        shutil.rmtree(directory)


def test_the_valid_file_that_mutations_start_from() -> None:
    check_loads_truly_or_refuses(VALID)
    with tempfile.TemporaryDirectory() as directory:
        assert list(read_gguf(write(Path(directory), VALID)).tensors) == ["a", "b", "c"]
