"""config.json and generation_config.json, checked field by field before anything is built from them.

What a model_type fixes is not known here: every file in engine/model states it as a `Family`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import RillError
from engine.files.json_file import Fields, brief, parse_object, read_bytes
from engine.files.stored_quants import QUANT_METHOD
from engine.rope import RopeConfig, parse_rope

MAX_CONFIG_BYTES = 4 << 20  # real ones have a few kilobytes

_VOCAB, _WIDTH, _LAYERS, _HEADS = "[1, 16777216]", "[1, 4194304]", "[1, 10000]", "[1, 65536]"
_HEAD_DIM, _POSITIONS = "[2, 65536]", "[1, 2147483647]"


@dataclass(frozen=True)
class Family:
    """What a model_type fixes, and what it assumes where config.json is silent (as transformers does).

    A bias is there (True), not there (False), or decided by the config's field of that name (str).
    """

    qk_norm: bool = False  # RMSNorm per head on q and k, before RoPE
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    sliding_window: int | None = None  # None: the family knows no sliding layers
    max_window_layers: int = 0  # sliding layers, where used, start at this one


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and constants; sizes are counted in elements, windows in positions."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]  # per layer: positions seen, the token's own included; None: all
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    raw: Mapping[str, Any] = field(repr=False, compare=False)


def load_config(path: str | Path) -> ModelConfig:
    """Read a config.json. Raises RillError naming the file and the field that cannot be used."""
    raw = parse_object(read_bytes(Path(path), MAX_CONFIG_BYTES), str(path))
    return parse_config(raw, find_family(raw, str(path)), str(path))


def find_family(raw: Mapping[str, Any], where: str, package: str = "engine.model") -> Family:
    """The FAMILY constant of the module that is named as the config's model_type."""
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    model_type = raw.get("model_type")
    family = _family(package, model_type) if model_type in names else None
    if family is None:
        supported = ", ".join(name for name in sorted(names) if _family(package, name))
        problem = "is missing" if model_type is None else f"{brief(model_type)} is not supported"
        raise RillError(f"{where}: model_type: {problem}; supported: {supported}")
    return family


def _family(package: str, module: str) -> Family | None:
    return getattr(importlib.import_module(f"{package}.{module}"), "FAMILY", None)


def parse_config(raw: Mapping[str, Any], family: Family, where: str = "config.json") -> ModelConfig:
    """Check a parsed config.json against what its family knows; errors start with `where`."""
    config = Fields(where, raw)
    _refuse_unsupported(config)
    layers = config.integer("num_hidden_layers", _LAYERS)
    heads = config.integer("num_attention_heads", _HEADS)
    hidden_size = config.integer("hidden_size", _WIDTH)
    max_position = config.integer("max_position_embeddings", _POSITIONS, family.max_position_embeddings)
    return ModelConfig(
        model_type=config.text("model_type"),
        vocab_size=config.integer("vocab_size", _VOCAB),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", _WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_key_value_heads(config, heads),
        head_dim=_head_dim(config, family, hidden_size, heads),
        rms_norm_eps=config.number("rms_norm_eps", "(0, 1]", family.rms_norm_eps),
        rope=parse_rope(config, family.rope_theta, max_position),
        tie_word_embeddings=config.boolean("tie_word_embeddings", family.tie_word_embeddings),
        qkv_bias=_bias(config, family.qkv_bias),
        o_bias=_bias(config, family.o_bias),
        mlp_bias=_bias(config, family.mlp_bias),
        qk_norm=family.qk_norm,
        max_position_embeddings=max_position,
        sliding_windows=_sliding_windows(config, family, layers),
        bos_token_id=_bos(config, family),
        eos_token_ids=_eos(config, family),
        raw=raw,
    )


def _refuse_unsupported(config: Fields) -> None:
    quantization = config.inner("quantization_config").values
    if quantization and quantization.get("quant_method") != QUANT_METHOD:
        method = brief(quantization.get("quant_method", "an unnamed method"))
        raise config.error(
            "quantization_config",
            f"weights quantised with {method} cannot be read; take the unquantised checkpoint of this model "
            f"(F32, F16 or BF16 safetensors), which the quantised one's model card names as its base model",
        )
    if config.text("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise config.expected("hidden_act", "silu")


def _key_value_heads(config: Fields, heads: int) -> int:
    kv_heads = config.integer("num_key_value_heads", _HEADS, heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    return kv_heads


def _head_dim(config: Fields, family: Family, hidden_size: int, heads: int) -> int:
    if not config.has("head_dim") and family.head_dim is None and hidden_size % heads:
        problem = f"is missing, and hidden_size {hidden_size} is not divisible by num_attention_heads {heads}"
        raise config.error("head_dim", problem)
    head_dim = config.integer("head_dim", _HEAD_DIM, family.head_dim or hidden_size // heads)
    if head_dim % 2:
        raise config.error("head_dim", f"must be even, since RoPE rotates pairs; found {head_dim}")
    return head_dim


def _bias(config: Fields, rule: bool | str) -> bool:
    return config.boolean(rule, False) if isinstance(rule, str) else rule


def _bos(config: Fields, family: Family) -> int | None:
    if config.is_null("bos_token_id") or not (config.has("bos_token_id") or family.bos_token_id is not None):
        return None
    return config.integer("bos_token_id", "[0, 2147483647]", family.bos_token_id)


def _eos(config: Fields, family: Family) -> frozenset[int]:
    if "eos_token_id" not in config.values and family.eos_token_id is not None:
        return frozenset([family.eos_token_id])
    return config.token_ids("eos_token_id")


def _sliding_windows(config: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    window = _window(config, family)
    first = config.integer("max_window_layers", "[0, 2147483647]", family.max_window_layers)
    if not config.has("layer_types"):
        return tuple(window if layer >= first else None for layer in range(layers))
    types = config.values["layer_types"]
    if not isinstance(types, list) or len(types) != layers:
        raise config.expected("layer_types", f"a list of {layers} names, one a layer")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.error("layer_types", f"{brief(kind)} is not full_attention or sliding_attention")
    if window is None and "sliding_attention" in types:
        raise config.error("layer_types", "has sliding_attention, but no sliding window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _window(config: Fields, family: Family) -> int | None:
    """The window that sliding layers of this model have, or None where there are no such layers."""
    if family.sliding_window is None:
        if config.has("sliding_window") and config.boolean("use_sliding_window", True):
            raise config.error("sliding_window", f"is not supported for {config.text('model_type')} models")
        return None
    if not config.boolean("use_sliding_window", False) or config.is_null("sliding_window"):
        return None
    return config.integer("sliding_window", _POSITIONS, family.sliding_window)


def load_generation_config(path: str | Path) -> dict[str, Any]:
    """The sampling defaults in a generation_config.json: only the fields the engine uses, checked;
    `eos_token_id` is always a frozenset. Empty where the file does not exist."""
    path = Path(path)
    if not path.exists():
        return {}
    return parse_generation_config(parse_object(read_bytes(path, MAX_CONFIG_BYTES), str(path)), str(path))


def parse_generation_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a parsed generation_config.json; errors start with `where`."""
    config = Fields(where, raw)
    readers = {
        "do_sample": config.boolean,
        "temperature": lambda name: config.number(name, "[0, 100]"),
        "top_k": lambda name: config.integer(name, "[0, 2147483647]"),
        "top_p": lambda name: config.number(name, "(0, 1]"),
        "min_p": lambda name: config.number(name, "[0, 1]"),
        "repetition_penalty": lambda name: config.number(name, "(0, 100]"),
        "bos_token_id": lambda name: config.integer(name, "[0, 2147483647]"),
        "eos_token_id": config.token_ids,
    }
    return {name: read(name) for name, read in readers.items() if config.has(name)}
