"""tools/random_model.py: same seed, same files; real shapes; text round-trips; nothing is lost unasked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tools.random_model import PRESETS, main, preset_config
from tools.random_weights import CHUNK, RandomTensor, normal_values, tensor_shapes

PARAMETERS = {  # as counted in the model cards or from their index files
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}


def write(directory: Path, *options: str) -> dict[str, bytes]:
    """Run the tool with the tiny preset; file name -> content."""
    assert main(["--preset", "tiny", str(directory), *options]) == 0
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_same_seed_same_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "--seed", "7")
    assert first == write(tmp_path / "b", "--seed", "7")
    other = write(tmp_path / "c", "--seed", "8")
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_names_and_shapes(tmp_path: Path) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == tensor_shapes(config)
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.1.self_attn.q_norm.weight"].shape == (32,)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_sizes(preset: str) -> None:
    assert sum(int(np.prod(shape)) for shape in tensor_shapes(PRESETS[preset]).values()) == PARAMETERS[preset]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_values_are_normal(tmp_path: Path, dtype: str) -> None:
    write(tmp_path, "--dtype", dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate_proj.weight"].astype(np.float64)
    assert gate.std() == pytest.approx(1 / np.sqrt(64), rel=0.05) and abs(gate.mean()) < 0.01
    assert np.abs(gate).max() > 3 / np.sqrt(64)  # tails, not a flat spread
    assert tensors["model.norm.weight"].astype(np.float64).mean() == pytest.approx(1, abs=0.05)
    assert len(np.unique(tensors["model.embed_tokens.weight"], axis=0)) == 320


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    write(tmp_path / "one")
    files = write(tmp_path / "many", "--shard-size", "60KB")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads(files["model.safetensors.index.json"])
    assert index["weight_map"].keys() == whole.keys()
    assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}
    for name, shard in index["weight_map"].items():
        assert load_file(tmp_path / "many" / shard)[name].tobytes() == whole[name].tobytes()


def test_layers_can_be_fewer(tmp_path: Path) -> None:
    write(tmp_path / "two")
    write(tmp_path / "one", "--layers", "1")
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_hidden_layers"] == 1
    assert one.keys() == {name for name in two if ".layers.1." not in name}
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_large_tensors_are_made_in_pieces() -> None:
    tensor = RandomTensor("w", (3, CHUNK // 2 + 1), "F32", 0.0, 1.0, "w")
    pieces = list(tensor.chunks(seed=0))
    assert [piece.size for piece in pieces] == [CHUNK, CHUNK // 2 + 3]
    assert not np.array_equal(pieces[0][:1000], pieces[1][:1000])
    assert len(normal_values()) == 65536 and normal_values().std() == pytest.approx(1, rel=1e-3)


def test_any_text_round_trips(tmp_path: Path) -> None:
    write(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Once upon a time … 春が来た 👩‍👩‍👧 \t\r\n\x00\x7f\xa0\xad é"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids
    assert chat[0] == 257 and chat[-1] == 258 and tokenizer.id_to_token(258) == "<|im_end|>"
    config = preset_config("tiny")
    assert config["eos_token_id"] == 258 and tokenizer.get_vocab_size() == 259 < config["vocab_size"]


def test_existing_files_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as refusal:
        main(["--preset", "tiny", str(tmp_path)])
    assert refusal.value.code == 2
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_the_model_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, "--force", "--shard-size", "60KB")
    files = write(tmp_path, "--force")
    assert files["notes.txt"] == b"mine"
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]


@pytest.mark.parametrize(
    "options",
    ["--layers 0", "--layers x", "--seed -1", "--dtype int8", "--shard-size 0", "--shard-size 5TB"],
)
def test_bad_options_are_refused(tmp_path: Path, options: str) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["--preset", "tiny", str(tmp_path / "out"), *options.split()])
    assert refusal.value.code == 2 and not (tmp_path / "out").exists()


def test_failed_write_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RandomTensor, "chunks", full_disk)
    assert main(["--preset", "tiny", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
