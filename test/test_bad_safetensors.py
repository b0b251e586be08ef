"""Safetensors files that are not valid: each is refused in one line, or loads exactly what it says."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import DTYPES, frame, index_of, make, pack, refusal, sample

import engine.files.checkpoint
from engine.errors import RillError
from engine.files.checkpoint import MAX_HEADER_BYTES, Checkpoint, read_header
from engine.files.model_files import INDEX_FILE


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def entries(data: bytes = bytes(8), **tensors: object) -> bytes:
    return frame(json.dumps(tensors).encode(), data)


def raw_entry(fields: str) -> bytes:
    return frame(b'{"a": {' + fields.encode() + b"}}", bytes(8))


GOOD = entries(a=entry())
ONE = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
ENDLESS_NAME = b'"\\u001b[31m' + b"x" * 9999 + b'"'
BAD_SAFETENSORS = {
    "empty file": b"",
    "under 8 bytes": b"1234567",
    "header longer than the file": struct.pack("<Q", 400) + GOOD[8:],
    "header longer than the file by far": struct.pack("<Q", 2**63) + GOOD[8:],
    "header of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + GOOD[8:],
    "header of nothing": frame(b""),
    "not UTF-8": frame(b'{"\xff": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "not JSON": frame(b"{a: 1}"),
    "not an object": frame(b"[]"),
    "cut JSON": frame(b"{" + ONE, bytes(8)),
    "zeros after the JSON": frame(b"{" + ONE + b"}\0\0", bytes(8)),
    "deep nesting": frame(b'{"a":' + b"[" * 1_000_000),
    "deep nesting in an unknown field": raw_entry('"dtype": "F32", "x": ' + "[" * 100_000 + "]" * 100_000),
    "the same key twice": frame(b"{" + ONE + b"," + ONE + b"}", bytes(8)),
    "two keys alike": frame(b"{" + ONE + b"," + ONE.replace(b"0, 8", b"8, 16") + b"}", bytes(16)),
    "metadata twice": frame(b'{"__metadata__": {"a": "1"}, "__metadata__": {"a": "2"}}'),
    "a metadata key twice": frame(b'{"__metadata__": {"a": "1", "a": "2"}}'),
    "overlap": entries(bytes(12), a=entry(), b=entry(data_offsets=[4, 12])),
    "two tensors in one place": entries(a=entry(), b=entry()),
    "hole at the beginning": entries(bytes(12), a=entry(data_offsets=[4, 12])),
    "hole between": entries(bytes(20), a=entry(), b=entry(data_offsets=[12, 20])),
    "trailing byte": GOOD + b"x",
    "truncated data": GOOD[:-1],
    "no data": GOOD[:-8],
    "data beyond the end": entries(a=entry(data_offsets=[8, 16])),
    "negative size": entries(a=entry(shape=[-2])),
    "two negative sizes": entries(a=entry(shape=[-1, -2])),
    "negative offset": entries(a=entry(data_offsets=[-8, 0])),
    "offsets reversed": entries(a=entry(data_offsets=[8, 0])),
    "three offsets": entries(a=entry(data_offsets=[0, 4, 8])),
    "overflowing shape": entries(a=entry(shape=[2**32, 2**32])),
    "overflowing to the right size": entries(a=entry(shape=[2**63, 2, 2])),
    "a size above 2^64": entries(a=entry(shape=[2**64 + 2])),
    "a size with 9,999 digits": raw_entry(f'"dtype": "F32", "shape": [{"9" * 9999}], "data_offsets": [0, 8]'),
    "shape of more bytes": entries(a=entry(shape=[3])),
    "shape of fewer bytes": entries(a=entry(shape=[1])),
    "scalar shape": entries(a=entry(shape=[])),
    "fractional shape": entries(a=entry(shape=[2.0])),
    "bool shape": entries(bytes(4), a=entry(shape=[True], data_offsets=[0, 4])),
    "text shape": entries(a=entry(shape="2")),
    "null shape": entries(a=entry(shape=None)),
    "NaN in a shape": raw_entry('"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]'),
    "unknown dtype": entries(a=entry(dtype="F33")),
    "no dtype": entries(a=entry(dtype=None)),
    "entry without fields": entries(a={}),
    "entry is a list": entries(a=[]),
    "metadata that is not text": entries(b"", __metadata__={"a": 1}),
    "an endless name": frame(b"{" + ONE.replace(b'"a"', ENDLESS_NAME) + b"}", bytes(4)),
    "lone surrogate": frame(ONE.join([b"{", b"}"]).replace(b'"a"', b'"\\ud800"'), bytes(8)),
    "a pickle": b"\x80\x02}q\x00." + bytes(40),
    "a zip": b"PK\x03\x04" + bytes(60),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
}


def test_the_good_file_that_the_bad_ones_are_made_of(tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": GOOD})
    assert Checkpoint(tmp_path).take("a", (2,)).read().tolist() == [0, 0]


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(case: str, tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": BAD_SAFETENSORS[case]})
    file = tmp_path / "model.safetensors"
    for model in (tmp_path, file):
        message = refusal(partial(Checkpoint, model), f"{file}: ")
        assert len(message) < len(str(file)) + 300
    make(tmp_path, {INDEX_FILE: index_of({"a": "model.safetensors"})})
    refusal(lambda: Checkpoint(tmp_path), f"{file}: ")


@pytest.mark.parametrize(
    "case",
    [
        "data beyond the end", "truncated data", "negative offset", "offsets reversed", "shape of more bytes",
        "overflowing shape", "entry is a list", "entry without fields", "text shape",
    ],
)  # fmt: skip
def test_no_tensor_reaches_outside_a_file_replaced_after_validation(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {"model.safetensors": BAD_SAFETENSORS[case]})
    monkeypatch.setattr(engine.files.checkpoint, "_validate", lambda file: None)
    refusal(partial(Checkpoint, tmp_path), tmp_path / "model.safetensors")


def test_header_above_the_format_s_limit(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:  # sparse: nothing of it is ever read
        opened.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        opened.truncate(MAX_HEADER_BYTES + 100)
    refusal(lambda: Checkpoint(file), file, "100,000,001")


def test_huge_shapes_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": entries(a=entry(shape=[2**40], data_offsets=[0, 2**42]))})
    refusal(lambda: Checkpoint(tmp_path), tmp_path)


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link"])
def test_weights_that_are_not_a_regular_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    match kind:
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case _:
            file.symlink_to(tmp_path / "nowhere")
    refusal(lambda: read_header(file), file)
    refusal(lambda: Checkpoint(tmp_path), tmp_path)


def slices(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the format says a valid file holds, read in the plainest way."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), data[slice(*tensor["data_offsets"])])
        for name, tensor in header.items()
    }


def check_loads_truly_or_refuses(content: bytes) -> None:
    directory = Path(tempfile.mkdtemp())
    try:
        make(directory, {"model.safetensors": content})
        try:
            checkpoint = Checkpoint(directory)
        except RillError as error:
            assert "\n" not in str(error) and "model.safetensors" in str(error)
            return
        expected = slices(content)
        assert checkpoint.tensors.keys() == expected.keys()
        for name, (dtype, shape, data) in expected.items():
            try:
                got = checkpoint.take(name, shape).read()
            except RillError:
                assert dtype not in DTYPES
                continue
            assert got.dtype == DTYPES[dtype] and got.shape == shape and got.tobytes() == data
    finally:
        shutil.rmtree(directory)


VALID = pack(sample(), 3)
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


PIECES = st.sampled_from([b"0", b"1", b"9", b"-", b'"', b",", b"]", b"}"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_bytes(data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        limit = data.draw(st.sampled_from([8, HEADER_END, len(content)]))
        at = data.draw(st.integers(0, max(0, min(limit, len(content)) - 1)))
        piece = data.draw(st.binary(max_size=4) | PIECES)
        span = data.draw(st.sampled_from([0, 1, len(piece)]))
        content[at : at + span] = piece
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    check_loads_truly_or_refuses(bytes(content))


NUMBERS = st.integers(-1, 130) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F4", "F99"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_headers(data: st.DataObject) -> None:
    """Entries replaced or moved, the header's length kept true: these reach the checks behind the parser."""
    header = json.loads(VALID[8:HEADER_END])
    names = st.sampled_from([*header, "new", "__metadata__"])
    for name in data.draw(st.lists(names, min_size=1, max_size=2)):
        match data.draw(st.integers(0, 4)):
            case 0:
                header.pop(name, None)
            case 1:
                header[name] = data.draw(ENTRY)
            case 2:
                header[name] = dict(header[data.draw(st.sampled_from(list(header)))]) if header else {}
            case 3 if name in header and "shape" in header[name]:
                header[name]["shape"] = data.draw(st.permutations(header[name]["shape"])) + [1]
            case _ if name in header and "data_offsets" in header[name]:
                header[name]["data_offsets"] = data.draw(st.lists(NUMBERS, max_size=3))
    check_loads_truly_or_refuses(frame(json.dumps(header).encode(), VALID[HEADER_END:]))
