"""The cache of quantised weights: a model is quantised once, and nothing stale or broken is ever taken from it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.layer
from demo import infer
from engine import LLM
from engine.files.packed_cache import cache_directory, cache_name

IDS = [1, 7, 3, 9]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rill"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def forbid_quantising(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("was quantised again")

    monkeypatch.setattr(engine.layer, "quantise", refuse)


def logits(model: Path, **options: Any) -> np.ndarray:
    with LLM(model, **{"dtype": "int8", "max_seq_len": 16, "device": "cpu", **options}) as llm:
        return llm.logits(IDS)


def test_the_second_load_takes_what_the_first_has_kept(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logits(model)
    assert len(list(home.iterdir())) == 1
    forbid_quantising(monkeypatch)
    assert np.array_equal(logits(model), first)
    assert np.array_equal(logits(model, isa="baseline", threads=1).argmax(axis=1), first.argmax(axis=1))
    with pytest.raises(AssertionError, match="quantised again"):
        logits(model, cache=False)
    with pytest.raises(AssertionError, match="quantised again"):
        logits(model, dtype="int4")


def test_plain_weights_and_no_cache_leave_nothing(model: Path, home: Path) -> None:
    logits(model, dtype="auto")
    logits(model, cache=False)
    assert not home.exists()


def test_a_file_that_changed_is_another_model(model: Path, home: Path) -> None:
    before = logits(model)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-64:] = bytes(64)
    file.write_bytes(data)
    assert not np.array_equal(logits(model), before)
    assert len(list(home.iterdir())) == 2


def test_what_is_cut_short_is_made_again(model: Path, home: Path) -> None:
    before = logits(model)
    kept = next(home.iterdir())
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    assert np.array_equal(logits(model), before) and kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_harmless(
    model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("in the way")
    assert infer.main([str(model), "--raw", "-p", "a", "-n", "2", "--dtype", "int4"]) == 0
    said = capsys.readouterr().err
    assert said.count("quantised weights are not kept: ") == 1 and "exists" in said
    assert home.read_text() == "in the way"
    home.unlink()
    assert infer.main([str(model), "--raw", "-p", "a", "-n", "2", "--dtype", "int4", "--no-cache"]) == 0
    assert not home.exists() and "not kept" not in capsys.readouterr().err


def test_a_file_that_changed_in_place_is_another_model(model: Path, home: Path) -> None:
    """Though size and time of change are what they were."""
    file = model / "model.safetensors"
    before, times = logits(model), file.stat()
    data = bytearray(file.read_bytes())
    data[-64:] = bytes(64)
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not np.array_equal(logits(model), before)


def test_other_contents_are_not_taken(model: Path, home: Path) -> None:
    before = logits(model)
    kept = next(home.iterdir())
    whole = bytearray(kept.read_bytes())
    whole[len(whole) // 2] ^= 1
    kept.write_bytes(whole)
    assert np.array_equal(logits(model), before)


def test_every_format_has_a_name_of_its_own(model: Path) -> None:
    names = set()
    for dtype in ("int8", "int8-32", "int4", "int4-64"):
        with LLM(model, dtype=dtype, max_seq_len=16, cache=False) as llm:
            names.add(cache_name(llm.runner.weights))
    assert len(names) == 4


def test_without_a_home_models_load_all_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", homeless)
    with LLM(model, dtype="int8", max_seq_len=16, device="cpu") as llm:
        assert llm.device.notes == ["quantised weights are not kept: Could not determine home directory."]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "rill"
