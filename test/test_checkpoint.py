"""Checkpoints: what is read from valid ones, and what a model may ask of them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_checkpoints import DTYPES, equal, frame, make, make_sharded, pack, refusal, sample

from engine.files.checkpoint import Checkpoint
from engine.files.model_files import INDEX_FILE


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_sharded(tmp_path / "sharded")


@pytest.mark.parametrize("padding", range(8))
def test_reads_every_dtype_at_every_alignment(padding: int, tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": pack(sample(), padding), "config.json": {}})
    checkpoint = Checkpoint(tmp_path)
    for name, expected in sample().items():
        assert name in checkpoint
        assert equal(checkpoint.take(name, expected.shape).read(), expected)
    checkpoint.finish()
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in sample().values())
    assert checkpoint.directory == tmp_path and checkpoint.config_path == tmp_path / "config.json"
    assert "d.weight" not in checkpoint


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in sample().items() if tensor.dtype != ml_dtypes.bfloat16}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint(tmp_path).tensors
    assert found.keys() == tensors.keys()
    assert all(equal(found[name].read(), tensor) for name, tensor in tensors.items())


def test_stored_tensor_says_where_its_bytes_are(tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": pack(sample(), 5)})
    for name, stored in Checkpoint(tmp_path).tensors.items():
        content = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
        assert content == sample()[name].tobytes() and stored.name == name


def test_a_model_is_a_directory_a_file_or_an_index(sharded: Path) -> None:
    for model in (sharded, str(sharded), sharded / INDEX_FILE):
        checkpoint = Checkpoint(model)
        assert checkpoint.directory == sharded and checkpoint.config_path == sharded / "config.json"
        assert checkpoint.tensors.keys() == sample().keys()
        assert all(equal(checkpoint.tensors[name].read(), tensor) for name, tensor in sample().items())
    alone = Checkpoint(sharded / "m-3.safetensors")
    assert alone.tensors.keys() == {"a.weight"} and alone.config_path == sharded / "config.json"


def test_relative_paths_and_links(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = make(tmp_path / "snapshot", {})  # as in the hub's cache, where files are links to blobs
    for file in sharded.iterdir():
        (linked / file.name).symlink_to(file)
    assert Checkpoint(linked / INDEX_FILE).directory == linked
    monkeypatch.chdir(tmp_path)
    assert Checkpoint("snapshot").tensors.keys() == sample().keys()


def test_take_refuses(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    refusal(lambda: checkpoint.take("z", (2, 3)), sharded, "'z'", "[2, 3]", "missing")
    wrong = sharded / "m-1.safetensors"
    refusal(lambda: checkpoint.take("a.weight", (5, 3)), wrong, "'a.weight'", "[3, 5]", "[5, 3]")
    refusal(lambda: checkpoint.take("a.weight", (15,)), "'a.weight'", "[3, 5]", "[15]")


@pytest.mark.parametrize("dtype, size", [("I64", 8), ("I8", 1), ("F8_E4M3", 1), ("F64", 8), ("BOOL", 1)])
def test_take_refuses_dtypes_it_cannot_read(dtype: str, size: int, tmp_path: Path) -> None:
    header = {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}
    make(tmp_path, {"model.safetensors": frame(json.dumps(header).encode(), bytes(2 * size))})
    checkpoint = Checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    refusal(lambda: checkpoint.take("a", (2,)), file, "'a'", dtype, "F32, F16, BF16")


def test_finish_refuses_leftovers(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.extra": np.ones(1, np.float32) for i in range(9)}
    tensors |= {"used": np.ones(1, np.float32), "lm_head.weight": np.ones(1, np.float32)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    make(tmp_path, {"model.safetensors": pack(tensors)})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.take("used", (1,))
    message = refusal(checkpoint.finish, tmp_path, "'layers.0.extra'", "and 6 more")
    assert "'used'" not in message and "inv_freq" not in message
    for i in range(9):
        checkpoint.take(f"layers.{i}.extra", (1,))
    refusal(checkpoint.finish, "'lm_head.weight'")
    checkpoint.finish(ignore={"lm_head.weight"})


def test_finish_notices_a_file_that_changed(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    for name, tensor in sample().items():
        checkpoint.take(name, tensor.shape)
    checkpoint.finish()
    file = sharded / "m-1.safetensors"
    os.utime(file, ns=(0, 0))
    refusal(checkpoint.finish, file, "changed")


@pytest.mark.parametrize("left", [0, 8, 40, -1])
def test_a_file_cut_short_after_validation_is_an_error_not_a_crash(left: int, tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": pack({"a": np.ones((64, 64), np.float32)})})
    file = tmp_path / "model.safetensors"
    tensor = Checkpoint(tmp_path).take("a", (64, 64))
    os.truncate(file, left if left >= 0 else file.stat().st_size - 1)
    refusal(tensor.read, file, "cut short")
    file.unlink()
    refusal(tensor.read, file, "cannot be read")


NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
SHAPES = st.lists(st.integers(0, 5), max_size=4)
SPECS = st.tuples(st.sampled_from(list(DTYPES)), SHAPES, st.integers(0, 2**32 - 1))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, SPECS, max_size=5), st.integers(0, 9))
def test_any_valid_file_loads(specs: dict[str, tuple[str, list[int], int]], padding: int) -> None:
    tensors = {}
    for name, (dtype, shape, seed) in specs.items():
        values = np.random.default_rng(seed).standard_normal(shape)
        tensors[name] = np.asarray(values).astype(DTYPES[dtype])
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory), {"model.safetensors": pack(tensors, padding)})
        checkpoint = Checkpoint(directory)
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert equal(checkpoint.take(name, tensor.shape).read(), tensor)
        checkpoint.finish()
