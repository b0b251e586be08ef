"""From a model's name to its files: directories, indexes, pickles, hub names."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import equal, index_of, make, make_sharded, pack, refusal, sample

from engine.errors import RillError, UsageError
from engine.files.checkpoint import Checkpoint
from engine.files.model_files import INDEX_FILE, local_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_sharded(tmp_path / "sharded")


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    refusal(lambda: Checkpoint(tmp_path), tmp_path, "model.safetensors.index.json", " model.safetensors")
    refusal(lambda: Checkpoint(tmp_path / "model.safetensors"), tmp_path, "no such file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert(name: str, tmp_path: Path) -> None:
    make(tmp_path, {name: b"\x80\x04.", "config.json": {}})
    for model in (tmp_path, tmp_path / name):
        refusal(partial(Checkpoint, model), tmp_path / name, "pickled", "save_pretrained")


@pytest.mark.parametrize("model", ["", "a\0b", "x" * 5000, "no such", "a/b/c", "../nope", "./nope", "/nope"])
def test_no_such_model(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, RillError)) as caught:
        Checkpoint(model)
    assert str(caught.value).isprintable()


def test_other_files_are_no_models(tmp_path: Path) -> None:
    for name in ("model.gguf", "config.json", "README"):
        make(tmp_path, {name: {}})
        with pytest.raises(UsageError, match="safetensors"):
            Checkpoint(tmp_path / name)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "m-2.safetensors").unlink()
    refusal(lambda: Checkpoint(sharded), sharded / "m-2.safetensors", INDEX_FILE)


def test_tensor_that_the_index_places_elsewhere(sharded: Path) -> None:
    weight_map = dict.fromkeys(sample(), "m-1.safetensors")
    make(sharded, {INDEX_FILE: index_of(weight_map)})
    refusal(lambda: Checkpoint(sharded), sharded / "m-1.safetensors", "'b.weight'", INDEX_FILE)


def test_extra_tensors_in_shards(sharded: Path) -> None:
    """Visible where they are alone, ignored where the index has another place for them, refused where
    two shards have one and the index does not decide."""
    tensors = sample()
    extra = {"extra": np.ones(2, np.float32)}
    shadow = {"a.weight": np.zeros((3, 5), np.float32)}
    second = {name: tensors[name] for name in ("b.weight", "c.weight", "empty")}
    make(sharded, {"m-2.safetensors": pack({**second, **extra, **shadow})})
    checkpoint = Checkpoint(sharded)
    assert checkpoint.tensors.keys() == {*sample(), "extra"}
    assert equal(checkpoint.tensors["a.weight"].read(), tensors["a.weight"])
    for name, tensor in tensors.items():
        checkpoint.take(name, tensor.shape)
    refusal(checkpoint.finish, "'extra'")
    first = {name: tensors[name] for name in ("a.weight", "scalar")}
    make(sharded, {"m-1.safetensors": pack({**first, **extra})})
    refusal(lambda: Checkpoint(sharded), "'extra'", "m-1.safetensors", "m-2.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"weight_map": ' + b"[" * 100_000, {},
        b'{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}',
        {"weight_map": {}}, {"weight_map": None}, {"weight_map": ["m-1.safetensors"]},
        *[index_of({"a.weight": shard}) for shard in [
            None, 1, ["m-1.safetensors"], "", "m-1.bin", "../m-1.safetensors", "/etc/m.safetensors",
            "sub/m-1.safetensors", "..\\m-1.safetensors", "m\0.safetensors", "..", ".", "x" * 9999,
            "x" * 999 + ".safetensors", "\ud800.safetensors", "m-1.safetensors\n",
        ]],
    ],
)  # fmt: skip
def test_bad_index(content: object, sharded: Path) -> None:
    make(sharded, {INDEX_FILE: content})
    assert len(refusal(lambda: Checkpoint(sharded), sharded / INDEX_FILE)) < len(str(sharded)) + 300


class FakeHub:
    """Stands for huggingface_hub: `cached` and `online` are directories, or None where it would raise."""

    def __init__(self, cached: Path | None, online: Path | None) -> None:
        self.cached, self.online = cached, online
        self.asked: list[bool] = []

    def snapshot_download(self, name: str, *, local_files_only: bool, **options: object) -> str:
        assert name == "Qwen/Qwen3-0.6B"
        self.asked.append(local_files_only)
        found = self.cached if local_files_only else self.online
        if found is None:
            raise OSError("cannot reach it\nsecond line")
        return str(found)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def install(cached: Path | None = None, online: Path | None = None) -> FakeHub:
        fake = FakeHub(cached, online)
        module = types.ModuleType("huggingface_hub")
        module.snapshot_download = fake.snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return fake

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return install


def test_hub_name_from_the_cache_never_goes_online(hub: Callable[..., FakeHub], sharded: Path) -> None:
    make(sharded, {"config.json": {}})
    fake = hub(cached=sharded)
    assert Checkpoint("Qwen/Qwen3-0.6B").directory == sharded
    assert fake.asked == [True]


@pytest.mark.parametrize("lacks", ["config.json", "m-2.safetensors", INDEX_FILE])
def test_hub_name_with_a_partial_cache_goes_online(
    lacks: str, hub: Callable[..., FakeHub], sharded: Path, tmp_path: Path
) -> None:
    make(sharded, {"config.json": {}})
    partial = Path(shutil.copytree(sharded, tmp_path / "partial"))
    (partial / "model.safetensors").unlink()
    (partial / lacks).unlink()
    fake = hub(cached=partial, online=sharded)
    assert local_path("Qwen/Qwen3-0.6B") == sharded
    assert fake.asked == [True, False]


def test_hub_that_cannot_help(hub: Callable[..., FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub()
    refusal(lambda: Checkpoint("Qwen/Qwen3-0.6B"), "Qwen/Qwen3-0.6B", "cannot reach it")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refusal(lambda: Checkpoint("Qwen/Qwen3-0.6B"), "Qwen/Qwen3-0.6B", "pip install huggingface_hub")


def test_a_local_path_wins_over_a_hub_name(hub: Callable[..., FakeHub], tmp_path: Path) -> None:
    fake = hub()
    (tmp_path / "cwd" / "Qwen").mkdir()
    make(tmp_path / "cwd" / "Qwen" / "Qwen3-0.6B", {"model.safetensors": pack(sample())})
    assert "a.weight" in Checkpoint("Qwen/Qwen3-0.6B") and fake.asked == []


def test_paths_are_never_taken_for_hub_names(hub: Callable[..., FakeHub]) -> None:
    fake = hub()
    for model in ("./Qwen3", "../a", "a/b/c", "/a", Path("Qwen/Qwen3-0.6B"), "Qwen", "-x/y", "a/..", "a/b\n"):
        with pytest.raises(UsageError):
            Checkpoint(model)
    assert fake.asked == []
