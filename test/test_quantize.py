"""tools.quantize: a quantised copy that says what the original quantised at load says; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine import LLM, RillError
from engine.abi import BFLOAT16, INT4
from engine.files.checkpoint import Checkpoint
from tools import quantize

IDS = [1, 7, 3, 9, 30]


@pytest.mark.parametrize("dtype", ["int8", "int4", "int4-64"])
def test_a_copy_has_the_bits_of_quantising_at_load(dtype: str, tiny: Path, tmp_path: Path) -> None:
    assert quantize.main([str(tiny), str(tmp_path / "small"), "--dtype", dtype]) == 0
    with LLM(tiny, dtype=dtype, max_seq_len=32) as at_load, LLM(tmp_path / "small", max_seq_len=32) as stored:
        assert np.array_equal(stored.logits(IDS), at_load.logits(IDS))
        assert stored.runner.weight_bytes == at_load.runner.weight_bytes
        assert stored.tokenizer is not None and at_load.tokenizer is not None
        assert stored.tokenizer.encode("text") == at_load.tokenizer.encode("text")
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (tmp_path / "small", tiny)]
    assert sizes[0] < (0.6 if dtype == "int8" else 0.5) * sizes[1]
    small, wide = tmp_path / "small", {"dtype": "float32", "max_seq_len": 32}
    widened = [LLM(small, device=name, **wide).logits(IDS) for name in ("numpy", "cpu")]  # type: ignore[arg-type]
    assert np.abs(widened[0] - widened[1]).max() < 1e-4 * widened[0].std()
    with LLM(tmp_path / "small", max_seq_len=32) as stored:
        assert np.abs(widened[0] - stored.logits(IDS)).std() < 0.1 * widened[0].std()


def test_parts_that_are_fused_and_stored_differently(tiny: Path, tmp_path: Path) -> None:
    """q in 4 bits, k and v as they were: two matrices."""
    assert quantize.main([str(tiny), str(tmp_path / "small"), "--dtype", "int4"]) == 0
    file, plain = tmp_path / "small" / "model.safetensors", load_file(tiny / "model.safetensors")
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "kv"]
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith(tuple(names))}
    save_file(tensors | {name: plain[name] for name in names}, file)
    small = tmp_path / "small"
    with LLM(small, max_seq_len=32) as cpu, LLM(small, max_seq_len=32, device="numpy") as oracle:
        q, kv = cpu.runner.model.blocks[0].attention.qkv.matrices
        assert (q.dtype, kv.dtype, kv.group) == (INT4, BFLOAT16, 0)
        assert np.abs(cpu.logits(IDS) - oracle.logits(IDS)).std() < 0.1 * oracle.logits(IDS).std()


def test_shards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SHARD", 30_000)
    assert quantize.main([str(tiny), str(tmp_path / "small")]) == 0
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    with LLM(tiny, dtype="int8", max_seq_len=32) as at_load, LLM(tmp_path / "small", max_seq_len=32) as stored:
        assert np.array_equal(stored.logits(IDS), at_load.logits(IDS))


def test_what_is_refused_leaves_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken, out = tmp_path / "taken", tmp_path / "out"
    taken.mkdir()
    for arguments, status, fragment in (
        ([str(tiny), str(taken)], 2, "exists already"),
        ([str(tiny), str(tmp_path / "no" / "out")], 2, "no directory"),
        ([str(tiny), str(out), "--dtype", "int3"], 2, "int3"),
        ([str(tmp_path / "none"), str(out)], 2, "none"),
    ):
        assert quantize.main(arguments) == status
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and fragment in error
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    assert quantize.main([str(tiny), str(out)]) == 0
    assert quantize.main([str(out), str(tmp_path / "twice")]) == 2


def test_parts_that_do_not_fit(tiny: Path, tmp_path: Path) -> None:
    assert quantize.main([str(tiny), str(tmp_path / "small"), "--dtype", "int4"]) == 0
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight.int4-32"
    changes = {
        f"{name}.scales": None, f"{name}.quants": tensors[f"{name}.quants"][:, 1:].copy(),
    }  # fmt: skip
    for key, value in changes.items():
        broken = {k: v for k, v in tensors.items() if k != key} | ({} if value is None else {key: value})
        save_file(broken, file)
        shape = (64, 160) if json.loads((tiny / "config.json").read_text())["intermediate_size"] == 160 else (0, 0)
        with pytest.raises(RillError, match=f"model.safetensors: tensor '{key}' is "):
            Checkpoint(file.parent).take("model.layers.0.mlp.down_proj.weight", shape)
