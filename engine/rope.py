"""Rotary position embedding (RoPE): the frequencies of every scaling that checkpoints use.

Sources: RoFormer (arXiv 2104.09864); linear position interpolation (arXiv 2306.15595); YaRN (arXiv
2309.00071); Llama 3.1's model card and reference code for llama3. Rules for absent fields are those of
transformers, since its config.json is what we read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from engine.files.json_file import Fields

Frequencies = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. Fields that a type does not use keep their defaults."""

    type: str = "default"  # default | linear | llama3 | yarn
    theta: float = 10_000.0
    factor: float = 1.0  # how many times the original context is stretched
    original_max_position_embeddings: int = 0  # llama3, yarn: positions seen in pretraining
    low_freq_factor: float = 1.0  # llama3: turns in the original context below which a frequency is divided,
    high_freq_factor: float = 4.0  # and above which it is kept
    beta_fast: float = 32.0  # yarn: turns in the original context above which a frequency is kept,
    beta_slow: float = 1.0  # and below which it is divided
    truncate: bool = True  # yarn: round that range outwards to whole dimensions
    attention_factor: float | None = None  # yarn: given outright
    mscale: float | None = None  # yarn: DeepSeek's pair, used only together
    mscale_all_dim: float | None = None

    def inv_freq(self, head_dim: int) -> Frequencies:
        """Radians per position of each rotated pair: float64 [head_dim / 2], in falling order."""
        unscaled = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        return _SCALINGS[self.type](self, unscaled)

    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by: 1 except for YaRN (section 3.4, equation 22)."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(self.factor, self.mscale_all_dim)
        return _yarn_mscale(self.factor, 1.0)


def _default(rope: RopeConfig, inv_freq: Frequencies) -> Frequencies:
    return inv_freq


def _linear(rope: RopeConfig, inv_freq: Frequencies) -> Frequencies:
    return inv_freq / rope.factor


def _llama3(rope: RopeConfig, inv_freq: Frequencies) -> Frequencies:
    """Three bands by the turns a pair makes in the original context: many turns are kept, few are
    divided by the factor, and between the two the share that is kept grows linearly."""
    turns = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept: Frequencies = np.clip(ramp, 0.0, 1.0)
    return kept * inv_freq + (1.0 - kept) * inv_freq / rope.factor


def _yarn(rope: RopeConfig, inv_freq: Frequencies) -> Frequencies:
    """NTK by parts: like llama3, but the ramp is linear in the dimension's index, not in its turns."""
    head_dim = 2 * len(inv_freq)
    low = _yarn_dimension(rope, rope.beta_fast, head_dim)
    high = _yarn_dimension(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a step, not a division by zero
    divided: Frequencies = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return (1.0 - divided) * inv_freq + divided * inv_freq / rope.factor


def _yarn_dimension(rope: RopeConfig, turns: float, head_dim: int) -> float:
    """The (fractional) index of the pair that makes so many turns in the original context."""
    wavelength = rope.original_max_position_embeddings / turns
    return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def parse_rope(config: Fields, default_theta: float, max_position_embeddings: int) -> RopeConfig:
    """Read RoPE from a config.json of either generation: `rope_theta` beside `rope_scaling`, or
    `rope_parameters` that holds both. Where a file has both, they must agree."""
    generations = [config.inner("rope_scaling"), config.inner("rope_parameters")]
    given = [rope for rope in generations if rope.values] or generations[:1]
    parsed = [_parse(config, rope, default_theta, max_position_embeddings) for rope in given]
    if parsed[0] != parsed[-1]:
        raise config.error("rope_scaling", f"contradicts rope_parameters in {_differences(*parsed)}")
    return parsed[0]


def _parse(config: Fields, rope: Fields, default_theta: float, max_position: int) -> RopeConfig:
    _refuse_unsupported(config, rope)
    theta = (rope if rope.has("rope_theta") else config).number("rope_theta", "(1, 1e15]", default_theta)
    kind = _rope_type(rope)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, rope.number("factor", "[0.001, 1e6]"))
    holder = config if config.has("original_max_position_embeddings") else rope
    original = holder.integer("original_max_position_embeddings", "[1, 2147483647]", max_position)
    if kind == "llama3":
        return _parse_llama3(rope, theta, original)
    ratio = max_position / original if original != max_position else None
    return RopeConfig(
        type=kind,
        theta=theta,
        factor=rope.number("factor", "[0.001, 1e6]", ratio),
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", "(0, 1e6]", 32.0),
        beta_slow=rope.number("beta_slow", "(0, 1e6]", 1.0),
        truncate=rope.boolean("truncate", True),
        **{name: rope.number(name, "[0, 1e6]") for name in _YARN_ATTENTION if rope.has(name)},
    )


_YARN_ATTENTION = ("attention_factor", "mscale", "mscale_all_dim")


def _parse_llama3(rope: Fields, theta: float, original: int) -> RopeConfig:
    factor = rope.number("factor", "[0.001, 1e6]")
    low, high = (rope.number(name, "(0, 1e6]") for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise rope.error("high_freq_factor", f"must be above low_freq_factor {low:g}, found {high:g}")
    return RopeConfig("llama3", theta, factor, original, low, high)


def _rope_type(rope: Fields) -> str:
    """The scaling's type, under its new name, its old one, or (transformers 4.43 and on) both alike."""
    found = "default"
    names = [name for name in ("rope_type", "type") if rope.has(name)]
    for name in names:
        found = rope.text(name)
        if found not in _SCALINGS:
            raise rope.expected(name, f"one of {', '.join(_SCALINGS)}")
    if len({rope.text(name) for name in names}) > 1:
        raise rope.error("rope_type", f"says {rope.text('rope_type')}, but type says {rope.text('type')}")
    return found


def _refuse_unsupported(config: Fields, rope: Fields) -> None:
    for holder in (config, rope):
        if holder.number("partial_rotary_factor", "[0, 1]", 1.0) != 1.0:
            raise holder.expected("partial_rotary_factor", "1 (partly rotated heads are not supported)")
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.error(name, "RoPE that differs between kinds of layers is not supported")


def _differences(one: RopeConfig, other: RopeConfig) -> str:
    return ", ".join(f.name for f in fields(RopeConfig) if getattr(one, f.name) != getattr(other, f.name))
