"""RoPE's frequencies against a scalar recomputation, and against numbers frozen from transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engine.errors import RillError
from engine.files.json_file import Fields
from engine.rope import RopeConfig, parse_rope

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_of(config: dict[str, Any], default_theta: float = 10_000.0, positions: int = 2048) -> RopeConfig:
    return parse_rope(Fields("config.json", config), default_theta, positions)


def scalar_llama3(rope: RopeConfig, head_dim: int) -> list[float]:
    """As Llama 3.1's reference code says it: by wavelengths, pair by pair."""
    longest = rope.original_max_position_embeddings / rope.low_freq_factor
    shortest = rope.original_max_position_embeddings / rope.high_freq_factor
    result = []
    for i in range(0, head_dim, 2):
        frequency = 1.0 / rope.theta ** (i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < shortest:
            result.append(frequency)
        elif wavelength > longest:
            result.append(frequency / rope.factor)
        else:
            smooth = rope.original_max_position_embeddings / wavelength - rope.low_freq_factor
            smooth /= rope.high_freq_factor - rope.low_freq_factor
            result.append((1 - smooth) * frequency / rope.factor + smooth * frequency)
    return result


def scalar_yarn(rope: RopeConfig, head_dim: int) -> list[float]:
    """As the paper's code says it: a ramp over indices between two dimensions found from the betas."""

    def dimension(rotations: float) -> float:
        context = rope.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    result = []
    for i in range(head_dim // 2):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        frequency = 1.0 / rope.theta ** (2 * i / head_dim)
        result.append(frequency / rope.factor * ramp + frequency * (1 - ramp))
    return result


@pytest.mark.parametrize("head_dim", [2, 32, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1e6, 5e6])
def test_default_and_linear(head_dim: int, theta: float) -> None:
    expected = np.array([1.0 / theta ** (i / head_dim) for i in range(0, head_dim, 2)])
    plain = rope_of({"rope_theta": theta}).inv_freq(head_dim)
    assert plain.dtype == np.float64 and plain.shape == (head_dim // 2,)
    np.testing.assert_allclose(plain, expected, rtol=1e-12)
    linear = rope_of({"rope_theta": theta, "rope_scaling": {"type": "linear", "factor": 2.5}})
    np.testing.assert_allclose(linear.inv_freq(head_dim), expected / 2.5, rtol=1e-12)
    assert linear.attention_scaling() == 1.0


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3(head_dim: int, factor: float) -> None:
    rope = rope_of({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3}})
    got = rope.inv_freq(head_dim)
    np.testing.assert_allclose(got, scalar_llama3(rope, head_dim), rtol=1e-12)
    kept_share = got / rope_of({"rope_theta": 5e5}).inv_freq(head_dim)
    assert np.any(kept_share == 1) and np.any(np.isclose(kept_share, 1 / factor))
    assert np.any((kept_share < 0.99) & (kept_share > 1.01 / factor)), "no pair lies in the middle band"
    assert rope.attention_scaling() == 1.0


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("betas", [(32.0, 1.0), (16.0, 2.0), (4.0, 4.0)])
@pytest.mark.parametrize("original", [16, 256, 32768])
@pytest.mark.parametrize("theta", [20.0, 1e6])  # the smaller puts the ramp's end beyond the last pair
def test_yarn(theta: float, original: int, betas: tuple[float, float], truncate: bool) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    scaling |= {"beta_fast": betas[0], "beta_slow": betas[1], "truncate": truncate}
    rope = rope_of({"rope_theta": theta, "rope_scaling": scaling})
    for head_dim in (32, 128):
        np.testing.assert_allclose(rope.inv_freq(head_dim), scalar_yarn(rope, head_dim), rtol=1e-12)


# Made with transformers 5.23 (float32): (head_dim, config, {index: inv_freq}, attention scaling).
FROZEN: list[tuple[int, dict[str, Any], dict[int, float], float]] = [
    (
        64,
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LLAMA3}},
        {1: 0.663601279, 14: 0.00321144611, 15: 0.00129054801, 16: 0.000429556705, 17: 9.70828623e-05,
         18: 1.94616387e-05, 31: 9.41830649e-08},
        1.0,
    ),
    (
        128,
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}},
        {1: 0.814617217, 28: 0.00321144611, 29: 0.00216657063, 32: 0.000524846022, 35: 9.55621217e-05,
         36: 7.78465546e-05, 63: 3.06892588e-07},
        1.0,
    ),
    (
        128,
        {"rope_theta": 1e6,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {1: 0.805842221, 23: 0.00697830599, 24: 0.00537532149, 31: 0.000802959781, 38: 9.26230132e-05,
         40: 4.44569851e-05, 63: 3.10234441e-07},
        1.138629436111989,
    ),
    (
        64,
        {"rope_theta": 1e4,
         "rope_parameters": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256,
                             "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.707,
                             "mscale_all_dim": 1.3}},
        {1: 0.749894202, 3: 0.421696514, 4: 0.285350084, 8: 0.0383304954, 10: 0.00696062203,
         11: 0.00263560307, 31: 8.3345094e-06},
        0.8791457689256885,
    ),
]  # fmt: skip


@pytest.mark.parametrize("head_dim, config, frequencies, scaling", FROZEN)
def test_frozen(head_dim: int, config: dict[str, Any], frequencies: dict[int, float], scaling: float) -> None:
    rope = rope_of(config)
    got = rope.inv_freq(head_dim)
    np.testing.assert_allclose(got[list(frequencies)], list(frequencies.values()), rtol=2e-6)
    assert rope.attention_scaling() == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize(
    "extra, expected",
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.75, "mscale": 2.0, "mscale_all_dim": 1.0}, 0.75),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),  # half of the pair counts for nothing
        ({"mscale": 2.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarn_attention_scaling(extra: dict[str, Any], expected: float) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, **extra}
    assert rope_of({"rope_scaling": scaling}).attention_scaling() == pytest.approx(expected, rel=1e-15)


def test_both_generations_mean_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, **LLAMA3}
    old = rope_of({"rope_theta": 5e5, "rope_scaling": scaling})
    older = rope_of({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0, **LLAMA3}})
    new = rope_of({"rope_parameters": {"rope_theta": 5e5, **scaling}})
    both = rope_of({"rope_theta": 5e5, "rope_scaling": scaling, "rope_parameters": scaling})
    assert old == older == new == both
    assert old.theta == 5e5 and old.type == "llama3" and old.factor == 8.0


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_parameters": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": None},
    ],
)
def test_default_means_none(config: dict[str, Any]) -> None:
    assert rope_of(config, default_theta=777.0) == RopeConfig(theta=777.0)
    assert rope_of({"rope_theta": 1000000, **config}) == RopeConfig(theta=1e6)


def test_theta_inside_rope_parameters_wins() -> None:
    assert rope_of({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 5e6}}).theta == 5e6


def test_original_context_falls_back_as_in_transformers() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert rope_of({"rope_scaling": yarn}, positions=640).original_max_position_embeddings == 640
    outside = {"rope_scaling": {**yarn, "original_max_position_embeddings": 5}}
    outside["original_max_position_embeddings"] = 320  # type: ignore[assignment]
    assert rope_of(outside, positions=640).original_max_position_embeddings == 320
    inferred = {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 160}}
    assert rope_of(inferred, positions=640).factor == 4.0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "config, field",
    [
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1e4}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 10**4000}}, "rope_parameters.rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": 3}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_scaling.truncate"),
        ({"rope_scaling": {**YARN, "mscale": "1"}}, "rope_scaling.mscale"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
         "rope_scaling.original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "high_freq_factor": 1.0}},
         "rope_scaling.high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8.0}}, "rope_scaling"),
    ],
)  # fmt: skip
def test_refused(config: dict[str, Any], field: str) -> None:
    with pytest.raises(RillError) as caught:
        rope_of(config)
    message = str(caught.value)
    assert message.startswith(f"config.json: {field}: ") and "\n" not in message
