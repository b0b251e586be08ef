"""A GGUF file's metadata as the config.json and generation_config.json that its model had.

Keys: docs/gguf.md of ggml, and what llama.cpp's converter writes. What is not understood and would change a model's
numbers is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.config import ModelConfig, find_family, parse_config, parse_generation_config
from engine.files.checkpoint import Readable
from engine.files.gguf import GGUFFile
from engine.files.json_file import Fields, brief
from engine.rope import Frequencies, RopeConfig

PAIRED = frozenset({"llama"})  # architectures whose converters put rows of q and k that are rotated together in pairs
ROPE_FACTORS = "rope_freqs.weight"  # what each pair's frequency is divided by: llama3's scaling, worked out

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_NEUTRAL: Mapping[str, float | None] = MappingProxyType(  # of what no decoder here does; None: nothing is neutral
    {
        "expert_count": 0, "attention.causal": True, "attention.sliding_window": 0, "attention.max_alibi_bias": 0,
        "attention.clamp_kqv": 0, "attention.scale": 0, "attention.temperature_scale": 0, "logit_scale": 1,
        "residual_scale": 1, "embedding_scale": 1, "attn_logit_softcapping": 0, "final_logit_softcapping": 0,
        "rope.scaling.yarn_ext_factor": 1, "rope.scaling.yarn_log_multiplier": 0, "rope.scaling.alpha": 0,
        "attention.key_length_mla": None, "nextn_predict_layers": 0, "rope.dimension_sections": None,
    }
)  # fmt: skip
_END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip


@dataclass(frozen=True)
class FactoredRope(RopeConfig):
    """RoPE whose frequencies are divided by factors that a file gives outright, one a pair."""

    factors: tuple[float, ...] = ()

    def inv_freq(self, head_dim: int) -> Frequencies:
        return super().inv_freq(head_dim) / np.asarray(self.factors, np.float64)


def is_paired(file: GGUFFile) -> bool:
    """Whether rows of q and k lie in pairs that are rotated together."""
    return file.metadata.get("general.architecture") in PAIRED


def read_config(file: GGUFFile) -> ModelConfig:
    """The model's config. Raises RillError naming the file and the key that cannot be used."""
    where = str(file.path)
    general = Fields(where, file.metadata, "")
    _refuse_parts(general)
    arch = general.text("general.architecture")
    family = find_family({"model_type": arch}, where)
    prefix = f"{arch}."
    own = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    config = Fields(where, {key: _single(value) for key, value in own.items()}, prefix)
    _refuse_unsupported(config)
    raw = {"model_type": arch} | _shape(config) | _rope(config) | _of_tensors(file) | _ends(general)
    return parse_config(raw, family, where)


def with_rope_factors(config: ModelConfig, factors: Readable) -> ModelConfig:
    """The config with RoPE's frequencies divided by what the file says. factors: [head_dim / 2]."""
    values = tuple(float(factor) for factor in factors.read())
    if not all(0 < factor < math.inf for factor in values):
        raise Fields(ROPE_FACTORS, {}).error("factors", "must be positive numbers")
    rope = {field.name: getattr(config.rope, field.name) for field in fields(RopeConfig)}
    return replace(config, rope=FactoredRope(**rope, factors=values))


def read_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The sampling defaults in the metadata, as those of a generation_config.json."""
    given = {name: file.metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    return parse_generation_config({k: v for k, v in given.items() if v is not None}, f"{file.path}: general.sampling")


def _refuse_parts(general: Fields) -> None:
    if general.text("general.type", "model") != "model":
        raise general.expected("general.type", "model")
    parts = general.integer("split.count", "[0, 65535]", 0)
    if parts > 1:
        raise general.error("split.count", f"is {parts}: join the parts with `llama-gguf-split --merge` first")


def _single(value: Any) -> Any:
    """A size that is given for every layer, and the same for all, as one number."""
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        return value[0].item()
    return value


def _refuse_unsupported(config: Fields) -> None:
    for name, neutral in _NEUTRAL.items():
        value = config.values.get(name, neutral)
        if isinstance(value, np.ndarray) or value != neutral:
            raise config.error(name, f"is {brief(value)}, which is not supported")


def _shape(config: Fields) -> dict[str, Any]:
    raw: dict[str, Any] = {name: config.integer(key, "[1, 2147483647]") for key, name in _SIZES.items()}
    heads = raw["num_attention_heads"]
    raw["num_key_value_heads"] = config.integer("attention.head_count_kv", "[1, 65536]", heads)
    head_dim = config.integer("attention.key_length", "[2, 65536]", raw["hidden_size"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if config.has(name) and config.integer(name, "[0, 65536]") != head_dim:
            raise config.expected(name, f"{head_dim}, as many as a key has")
    epsilon = config.number("attention.layer_norm_rms_epsilon", "(0, 1]")
    return raw | {"head_dim": head_dim, "rms_norm_eps": epsilon}


def _rope(config: Fields) -> dict[str, Any]:
    """RoPE's base and scaling. A factor without a type is a linear one; so is the older key."""
    raw = {"rope_theta": config.number("rope.freq_base", "(1, 1e15]", 10_000.0)}
    older = config.number("rope.scale_linear", "[0, 1e6]", 0.0)
    factor = config.number("rope.scaling.factor", "[0, 1e6]", older) or 1.0
    kind = config.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise config.expected("rope.scaling.type", "none, linear or yarn")
    attention = config.number("rope.scaling.attn_factor", "(0, 1e6]", 1.0)
    if attention != 1.0 and kind != "yarn":
        raise config.expected("rope.scaling.attn_factor", "1 where the scaling is not yarn")
    if kind == "yarn":
        return raw | {"rope_scaling": _yarn(config, factor, attention)}
    scaled = kind == "linear" and factor != 1.0
    return raw | ({"rope_scaling": {"rope_type": "linear", "factor": factor}} if scaled else {})


def _yarn(config: Fields, factor: float, attention: float) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = "rope.scaling.original_context_length"
    if config.has(original):
        rope["original_max_position_embeddings"] = config.integer(original, "[1, 2147483647]")
    for name in ("beta_fast", "beta_slow"):
        if config.has(f"rope.scaling.yarn_{name}"):
            rope[name] = config.number(f"rope.scaling.yarn_{name}", "(0, 1e6]")
    given = "rope.scaling.yarn_attn_factor"
    if config.has(given) or attention != 1.0:
        usual = RopeConfig(type="yarn", factor=factor).attention_scaling()
        rope["attention_factor"] = attention * config.number(given, "(0, 1e6]", usual)
    return rope


def _of_tensors(file: GGUFFile) -> dict[str, Any]:
    """What the directory says and no key does: the rows of the embedding, tied or not, biases or none."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise Fields(str(file.path), {}).error("tensor 'token_embd.weight'", "is missing, or no matrix")
    return {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _ends(general: Fields) -> dict[str, Any]:
    bos = "tokenizer.ggml.bos_token_id"
    ends = [general.integer(key, "[0, 2147483647]") for key in _END_KEYS if general.has(key)]
    begin = general.integer(bos, "[0, 2147483647]") if general.has(bos) else None
    return {"bos_token_id": begin, "eos_token_id": ends}
