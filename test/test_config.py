"""config.json and generation_config.json: what is read from real ones, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import (
    MAX_CONFIG_BYTES,
    Family,
    ModelConfig,
    find_family,
    load_config,
    load_generation_config,
    parse_config,
)
from engine.errors import RillError
from engine.files.json_file import Fields

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_05B = {
    "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA32_1B = {
    "attention_bias": False, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA2_7B = {
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}  # fmt: skip
SMALL = {
    "model_type": "sample", "vocab_size": 100, "hidden_size": 48, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
PLAIN = Family()
SLIDING = Family(sliding_window=4096, max_window_layers=28)


def write(path: Path, config: object) -> Path:
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def small(family: Family = PLAIN, /, **changes: Any) -> ModelConfig:
    return parse_config({**SMALL, **changes}, family)


def test_qwen3(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "config.json", QWEN3_06B))
    assert (config.model_type, config.vocab_size, config.num_hidden_layers) == ("qwen3", 151936, 28)
    assert (config.hidden_size, config.intermediate_size) == (1024, 3072)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 128)
    assert config.rms_norm_eps == 1e-6 and config.rope.theta == 1e6 and config.rope.type == "default"
    assert config.qk_norm and not (config.qkv_bias or config.o_bias or config.mlp_bias)
    assert config.tie_word_embeddings and config.max_position_embeddings == 40960
    assert config.sliding_windows == (None,) * 28
    assert config.bos_token_id == 151643 and config.eos_token_ids == {151645}
    assert config.raw == QWEN3_06B


def test_qwen3_attention_bias_is_on_all_four_and_head_dim_has_its_own_default(tmp_path: Path) -> None:
    raw = {**QWEN3_06B, "attention_bias": True}
    del raw["head_dim"]
    config = load_config(write(tmp_path / "config.json", raw))
    assert config.qkv_bias and config.o_bias and not config.mlp_bias
    assert config.head_dim == 128  # not 1024 / 16


def test_qwen2(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "config.json", QWEN25_05B))
    assert config.qkv_bias and not (config.o_bias or config.mlp_bias or config.qk_norm)
    assert config.head_dim == 64 and config.sliding_windows == (None,) * 24


def test_qwen2_sliding_layers(tmp_path: Path) -> None:
    raw = {**QWEN25_05B, "use_sliding_window": True}
    config = load_config(write(tmp_path / "config.json", raw))
    assert config.sliding_windows == (None,) * 21 + (32768,) * 3


def test_llama32(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "config.json", LLAMA32_1B))
    assert config.rms_norm_eps == 1e-5 and config.eos_token_ids == {128001, 128008, 128009}
    assert (config.rope.type, config.rope.factor, config.rope.theta) == ("llama3", 32.0, 5e5)
    assert not (config.qk_norm or config.qkv_bias or config.o_bias or config.mlp_bias)


def test_llama_biases(tmp_path: Path) -> None:
    attention = load_config(write(tmp_path / "a.json", {**LLAMA32_1B, "attention_bias": True}))
    assert attention.qkv_bias and attention.o_bias and not attention.mlp_bias
    mlp = load_config(write(tmp_path / "b.json", {**LLAMA32_1B, "mlp_bias": True}))
    assert mlp.mlp_bias and not (mlp.qkv_bias or mlp.o_bias)


def test_llama2_of_the_first_exports(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "config.json", LLAMA2_7B))
    assert config.num_key_value_heads == 32 and config.head_dim == 128 and config.rope.theta == 1e4
    assert config.bos_token_id == 1 and config.eos_token_ids == {2} and not config.tie_word_embeddings


def test_null_ids_mean_none_even_where_the_family_has_some(tmp_path: Path) -> None:
    raw = {**LLAMA2_7B, "bos_token_id": None, "eos_token_id": None}
    config = load_config(write(tmp_path / "config.json", raw))
    assert config.bos_token_id is None and config.eos_token_ids == frozenset()


def test_biases_are_facts_or_fields() -> None:
    family = Family(qkv_bias=True, o_bias="attention_bias", mlp_bias=False)
    config = small(family, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    assert not small(family).o_bias


def test_family_defaults_fill_silence_only() -> None:
    family = Family(rope_theta=5e6, rms_norm_eps=1e-5, head_dim=32, tie_word_embeddings=True)
    config = small(family)
    assert (config.rope.theta, config.rms_norm_eps, config.head_dim) == (5e6, 1e-5, 32)
    assert config.tie_word_embeddings
    config = small(family, rope_theta=1e6, rms_norm_eps=1e-6, head_dim=16, tie_word_embeddings=False)
    assert (config.rope.theta, config.rms_norm_eps, config.head_dim) == (1e6, 1e-6, 16)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (None,) * 4),
        ({"sliding_window": 8}, (None,) * 4),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, (None,) * 4),  # starts at layer 28 by default
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None, 8)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 4),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 4),
        ({"layer_types": ["full_attention"] * 4}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8,
          "layer_types": ["sliding_attention", "full_attention"] * 2}, (8, None, 8, None)),
    ],
)  # fmt: skip
def test_sliding_windows(changes: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert small(SLIDING, **changes).sliding_windows == expected


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3 + [["sliding_attention"]]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, "layer_types"),
        ({"use_sliding_window": "yes"}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": -1}, "max_window_layers"),
    ],
)
def test_sliding_windows_refused(changes: dict[str, Any], field: str) -> None:
    refused(SLIDING, field, **changes)


def test_a_window_is_never_ignored_by_a_family_without_them() -> None:
    refused(PLAIN, "sliding_window", sliding_window=8)
    refused(PLAIN, "layer_types", layer_types=["sliding_attention"] * 4)
    assert small(PLAIN, sliding_window=8, use_sliding_window=False).sliding_windows == (None,) * 4


def refused(family: Family, field: str, /, **changes: Any) -> str:
    with pytest.raises(RillError) as caught:
        small(family, **changes)
    message = str(caught.value)
    assert message.startswith(f"config.json: {field}: ") and "\n" not in message and len(message) < 400
    return message


SIZES = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**64, 10**4000, True, "48", 48.0, [48], {}, float("nan")])
def test_sizes_refused(field: str, value: Any) -> None:
    refused(PLAIN, field, **{field: value})


@pytest.mark.parametrize("field", SIZES[:5])
def test_missing_fields_refused(field: str) -> None:
    assert "missing" in refused(PLAIN, field, **{field: None})
    raw = {name: value for name, value in SMALL.items() if name != field}
    with pytest.raises(RillError, match=f"config.json: {field}: is missing"):
        parse_config(raw, PLAIN)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_key_value_heads": 12}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": 50}, "head_dim"),
        ({"hidden_size": 6}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": 1}, "hidden_act"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"bos_token_id": [1]}, "bos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, True]}, "eos_token_id"),
        ({"eos_token_id": [2, -3]}, "eos_token_id"),
        ({"eos_token_id": [[2]]}, "eos_token_id"),
        ({"model_type": 3}, "model_type"),
        ({"rope_scaling": {"type": "new"}}, "rope_scaling.type"),
        ({"quantization_config": "gptq"}, "quantization_config"),
    ],
)
def test_refused(changes: dict[str, Any], field: str) -> None:
    refused(PLAIN, field, **changes)


def test_bias_field_of_a_wrong_type_is_refused() -> None:
    refused(Family(qkv_bias="attention_bias"), "attention_bias", attention_bias="no")


def test_quantised_weights_are_refused_with_the_way_that_works() -> None:
    message = refused(PLAIN, "quantization_config", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "'gptq'" in message and "unquantised checkpoint" in message
    assert small(PLAIN, quantization_config=None).hidden_size == 48


def test_hidden_act_may_be_silent_or_called_swish() -> None:
    assert small(hidden_act=None) == small(hidden_act="swish") == small()


@pytest.mark.parametrize(
    "interval, inside, outside",
    [
        ("[1, 3]", [1, 2, 3], [0, 4, 10**4000, -(10**4000)]),
        ("(0, 1]", [1e-300, 0.5, 1], [0, -0.0, 1.0000001, float("nan"), float("inf"), float("-inf")]),
        ("[-1, 1)", [-1, 0, 0.999], [1, -1.001]),
    ],
)
def test_intervals(interval: str, inside: list[float], outside: list[float]) -> None:
    for value in inside:
        assert Fields("a file", {"x": value}).number("x", interval) == value
    for value in outside:
        with pytest.raises(RillError, match="^a file: x: must be a number in"):
            Fields("a file", {"x": value}).number("x", interval)


@pytest.fixture
def family_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package like engine.model: two families, and a module that all of them share."""
    package = tmp_path / "families_of_a_test"
    package.mkdir()
    source = "from engine.config import Family\nFAMILY = Family(rope_theta={})\n"
    (package / "alpha.py").write_text(source.format(5.0))
    (package / "beta.py").write_text(source.format(7.0))
    (package / "decoder.py").write_text("shared = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package.name
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def test_families_are_found_by_file_name(family_package: str) -> None:
    assert find_family({"model_type": "beta"}, "config.json", family_package) == Family(rope_theta=7.0)


@pytest.mark.parametrize(
    "model_type",
    [None, "gamma", "decoder", "", "alpha.py", "..", "os", "a.b", 3, ["alpha"], {"alpha": 1}, "x" * 9999],
)
def test_unknown_model_types_list_the_supported(family_package: str, model_type: Any) -> None:
    with pytest.raises(RillError, match=r"^config.json: model_type: .* supported: alpha, beta$") as caught:
        find_family({"model_type": model_type}, "config.json", family_package)
    assert len(str(caught.value)) < 300


def test_unknown_model_type_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", {**SMALL, "model_type": "mamba"})
    problem = "'mamba' is not supported; supported: .*llama.*qwen2.*qwen3"
    with pytest.raises(RillError, match=problem) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


BAD_FILES = {
    "empty": b"",
    "not UTF-8": b'{"model_type": "\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "cut short": b'{"model_type": "llama"',
    "two values": b"{} {}",
    "not an object": b"[1, 2]",
    "a number": b"7",
    "NaN": b'{"model_type": "llama", "rms_norm_eps": NaN}',
    "Infinity": b'{"model_type": "llama", "rope_theta": -Infinity}',
    "a key twice": b'{"hidden_size": 1, "hidden_size": 2}',
    "deep nesting": b'{"a":' + b"[" * 1_000_000,
    "deep nesting, closed": b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "deep objects": b'{"a":' * 400_000,
    "a number without end": b'{"hidden_size": ' + b"9" * 100_000 + b"}",
    "too large": b'{"model_type": "llama"}' + b" " * MAX_CONFIG_BYTES,
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("load", [load_config, load_generation_config])
def test_bad_files(case: str, load: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(BAD_FILES[case])
    with pytest.raises(RillError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 300


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(RillError, match="no such file"):
        load_config(tmp_path / "config.json")
    with pytest.raises(RillError, match="not a regular file"):
        load_config(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RillError, match="not a regular file"):
        load_config(tmp_path / "pipe")
    with pytest.raises(RillError, match="cannot be read"):
        load_config(tmp_path / "a\0b")


def test_generation_config(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert load_generation_config(path) == {}
    raw = {
        "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None, "transformers_version": "4.51.0",
    }  # fmt: skip
    assert load_generation_config(write(path, raw)) == {
        "bos_token_id": 151643, "do_sample": True, "eos_token_id": {151645, 151643}, "temperature": 0.6,
        "top_k": 20, "top_p": 0.95,
    }  # fmt: skip
    assert load_generation_config(write(path, {"eos_token_id": 2})) == {"eos_token_id": frozenset([2])}


@pytest.mark.parametrize(
    "field, values",
    [
        ("temperature", [-0.1, "1", True, 1e30]),
        ("top_k", [-1, 2.5, "20", 2**40]),
        ("top_p", [0, 1.01, "0.9", [0.9]]),
        ("min_p", [-0.1, 1.5]),
        ("repetition_penalty", [0, -1, "1.1"]),
        ("do_sample", [1, "true"]),
        ("eos_token_id", ["2", [2, "3"], -1, 2.0, {}]),
        ("bos_token_id", [[1], -1, 1.0]),
    ],
)
def test_generation_config_refused(field: str, values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    for value in values:
        with pytest.raises(RillError) as caught:
            load_generation_config(write(path, {field: value}))
        assert field in str(caught.value) and str(path) in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SIZES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*SMALL, "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act",
     "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "attention_bias",
     "eos_token_id", "bos_token_id", "quantization_config", "partial_rotary_factor",
     "tie_word_embeddings", ""]
)  # fmt: skip
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"])},
    optional={
        name: st.integers(-2, 100) | st.floats() | JSON_VALUES
        for name in ["factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                     "original_max_position_embeddings", "mscale", "mscale_all_dim", "attention_factor"]
    },
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(FIELDS, JSON_VALUES | ROPES | st.integers(1, 64), max_size=5))
def test_any_change_gives_a_sound_config_or_a_refusal(changes: dict[str, Any]) -> None:
    family = Family(qkv_bias="attention_bias", sliding_window=4096, max_window_layers=2)
    try:
        config = parse_config({**SMALL, **changes}, family)
    except RillError as error:
        assert "\n" not in str(error) and str(error).startswith("config.json: ")
        return
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim > 0 and config.head_dim % 2 == 0
    assert len(config.sliding_windows) == config.num_hidden_layers
    frequencies = config.rope.inv_freq(config.head_dim)
    assert (frequencies >= 0).all() and (frequencies < 1e4).all() and config.rope.attention_scaling() >= 0
