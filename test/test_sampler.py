"""SamplingParams: what is refused, and where each setting comes from."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.abi import struct_dtype
from engine.errors import UsageError
from engine.sampler import SamplingParams

NOT_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, "1", True, [1], 1j]
NOT_INTEGERS: list[Any] = [math.nan, math.inf, 1.0, 0.5, "1", True, [1]]

REFUSED: dict[str, list[Any]] = {
    "temperature": [-1, -1e-9, 101, 1e300, *NOT_NUMBERS],
    "top_k": [-1, 2**31, *NOT_INTEGERS],
    "top_p": [0, -0.1, 1.0000001, 2, *NOT_NUMBERS],
    "min_p": [-0.1, 1.1, *NOT_NUMBERS],
    "repetition_penalty": [0, -1, 1e6, *NOT_NUMBERS],
    "presence_penalty": [-2.1, 2.1, 1e9, *NOT_NUMBERS],
    "max_tokens": [0, -1, 2**31, *NOT_INTEGERS],
    "stop": ["", [""], ["a", ""], [1], 1, [None], ["a", b"b"], {"a": 1}, True],
    "seed": [-1, 2**64, *NOT_INTEGERS],
    "ignore_eos": [0, 1, "yes"],
    "logprobs": [-1, 21, *NOT_INTEGERS],
    "prompt_logprobs": [-1, 21, *NOT_INTEGERS],
}
ACCEPTED: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-6, 1, 2.5, 100],
    "top_k": [0, 1, 2**31 - 1],
    "top_p": [1e-6, 0.5, 1],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [0.5, 1, 2.0],
    "presence_penalty": [-2, 0, 1.5],
    "max_tokens": [1, 10**6],
    "seed": [0, 2**64 - 1],
    "ignore_eos": [True, False],
    "logprobs": [0, 20],
    "prompt_logprobs": [0, 20],
}
QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values])
def test_what_cannot_be_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^sampling: {name}: must be ") as raised:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ACCEPTED.items() for v in values])
def test_what_can_be_is_kept(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == value
    assert getattr(params.resolve(QWEN3), name) == value


def test_endless_values_make_short_messages() -> None:
    with pytest.raises(UsageError) as raised:
        SamplingParams(stop=["x" * 10**6, ""])
    assert len(str(raised.value)) < 300


def test_numpy_scalars_count_as_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**64 - 1))
    assert (params.temperature, params.top_k, params.seed) == (0.5, 3, 2**64 - 1)
    assert type(params.temperature) is float and type(params.top_k) is int and type(params.seed) is int


def test_stop_is_one_text_or_several() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == SamplingParams(stop=()).stop == ()


def test_params_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("asked", "config", "temperature", "source"),
    [
        ({}, {}, 0, "default"),
        ({}, {"do_sample": False}, 0, "generation_config.json"),
        ({}, {"do_sample": False, "temperature": 0.6}, 0, "generation_config.json"),
        ({}, {"do_sample": True}, 1, "default"),
        ({}, QWEN3, 0.6, "generation_config.json"),
        ({}, {"temperature": 0.6}, 0.6, "generation_config.json"),
        ({"temperature": 0}, QWEN3, 0, "asked for"),
        ({"temperature": 0.9}, {"do_sample": False}, 0.9, "asked for"),
        ({"top_p": 0.9}, {}, 1, "default"),
        ({"top_k": 5}, {"do_sample": False}, 1, "default"),
        ({"min_p": 0.1}, {"do_sample": False, "temperature": 0.7}, 0.7, "generation_config.json"),
        ({"top_p": 1, "top_k": 0, "min_p": 0}, {}, 0, "default"),
        ({"seed": 1}, {}, 0, "default"),
    ],
)
def test_temperature_comes_from(asked: Any, config: Any, temperature: float, source: str) -> None:
    params = SamplingParams(**asked).resolve(config)
    assert (params.temperature, params.sources["temperature"]) == (temperature, source)


def test_every_setting_has_a_value_and_a_source() -> None:
    params = SamplingParams(top_k=0, stop=("a",), max_tokens=9, logprobs=2).resolve({**QWEN3, "eos_token_id": {1}})
    seed = params.seed
    assert params == SamplingParams(0.6, 0, 0.95, 0.0, 1.0, 0.0, 9, ("a",), seed, logprobs=2).resolve()
    assert params.sources == {
        "temperature": "generation_config.json",
        "top_k": "asked for",
        "top_p": "generation_config.json",
        "min_p": "default",
        "repetition_penalty": "default",
        "presence_penalty": "default",
        "seed": "random",
    }
    penalties = SamplingParams().resolve({"repetition_penalty": 1.1, "min_p": 0.05})
    assert (penalties.repetition_penalty, penalties.min_p) == (1.1, 0.05)


def test_a_seed_not_asked_for_is_fresh() -> None:
    seeds = {SamplingParams().resolve().seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**64 for seed in seeds)
    assert SamplingParams(seed=0).resolve().seed == 0


def test_a_bad_value_of_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="top_p"):
        SamplingParams().resolve({"top_p": 7.0})


def test_fill_writes_every_field() -> None:
    asked = SamplingParams(0.5, 7, 0.25, 0.125, 1.5, -0.5, seed=2**64 - 1, logprobs=3, prompt_logprobs=4)
    entries = np.zeros(2, struct_dtype("sampling"))
    entries.view(np.uint8)[:] = 0xAA  # what an earlier step left there
    place = dict(index=2**40, history_start=11, history_length=12, prompt_length=5)
    asked.resolve().fill(entries[0], **place)
    asked.resolve().fill(entries[1], **place, target=17)
    drawn = dict(seed=2**64 - 1, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5)
    drawn |= dict(presence_penalty=-0.5, logprobs=3, target=-1) | place
    assert {name: entries[0][name] for name in entries.dtype.names or ()} == drawn
    assert {name: entries[1][name] for name in entries.dtype.names or ()} == drawn | dict(logprobs=4, target=17)


def test_without_logprobs_none_are_reported() -> None:
    entry = np.zeros(1, struct_dtype("sampling"))[0]
    SamplingParams().resolve().fill(entry, index=0, history_start=0, history_length=0, prompt_length=0)
    assert entry["logprobs"] == -1
    SamplingParams(logprobs=0).resolve().fill(entry, index=0, history_start=0, history_length=0, prompt_length=0)
    assert entry["logprobs"] == 0


anything = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.booleans(),
    st.lists(st.text(max_size=2), max_size=2),
)


@given(st.fixed_dictionaries({}, optional={name: anything for name in REFUSED}))
def test_anything_is_accepted_or_refused_in_one_line(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values).resolve(QWEN3)
    except UsageError as error:
        assert any(f"sampling: {name}: must be" in str(error) for name in values)
        assert len(str(error)) < 300 and str(error).isprintable()
        return
    assert 0 <= params.temperature <= 100 and params.top_k >= 0 and 0 < params.top_p <= 1 and 0 <= params.min_p <= 1
    assert 0 < params.repetition_penalty <= 100 and abs(params.presence_penalty) <= 2 and 0 <= params.seed < 2**64
    assert params.max_tokens is None or params.max_tokens > 0
    assert all(isinstance(text, str) and text for text in params.stop)
