"""A decoder in plain float64, written from the definition of in-cache positions: keys are kept unrotated and without
end, and every row rotates those it sees as if they stood one behind the other (StreamingLLM: Xiao et al., 2023)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import softmax

from engine.files.checkpoint import Checkpoint


class ReferenceDecoder:
    """A checkpoint of plain RoPE with tied embeddings. windows: of each layer, None where it sees everything; before a
    window it sees the first `sink` positions too."""

    def __init__(self, directory: Path, windows: Sequence[int | None], sink: int = 0) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        stored = Checkpoint(directory).tensors
        self.weights = {name: tensor.read().astype(np.float64) for name, tensor in stored.items()}
        self.windows, self.sink = windows, sink
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.heads

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[tokens, vocab_size] after each token."""
        table = self.weights["model.embed_tokens.weight"]
        x = table[list(tokens)]
        for layer, window in enumerate(self.windows):
            name = f"model.layers.{layer}"
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x), window)
            n = self.norm(f"{name}.post_attention_layernorm", x)
            gate, up = (self.linear(f"{name}.mlp.{part}_proj", n) for part in ("gate", "up"))
            x = x + self.linear(f"{name}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        return self.norm("model.norm", x) @ table.T

    def attention(self, name: str, x: np.ndarray, window: int | None) -> np.ndarray:
        q, k, v = (self.linear(f"{name}.{part}_proj", x).reshape(len(x), -1, self.head_dim) for part in "qkv")
        q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        k, v = (np.repeat(y, self.heads // self.kv_heads, axis=1) for y in (k, v))
        out = np.empty_like(q)
        for row in range(len(x)):
            start = 0 if window is None else max(0, row + 1 - window)
            seen = [*range(min(self.sink, start)), *range(start, row + 1)]
            places = np.arange(len(seen))
            keys, query = self.rotate(k[seen], places), self.rotate(q[row : row + 1], places[-1:])
            weights = softmax(np.einsum("hd,khd->hk", query[0], keys) / np.sqrt(self.head_dim))
            out[row] = np.einsum("hk,khd->hd", weights, v[seen])
        return self.linear(f"{name}.o_proj", out.reshape(len(x), -1))

    def rotate(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """[rows, heads, head_dim], half against half."""
        half = self.head_dim // 2
        turn = np.exp(1j * places[:, None] * self.config["rope_theta"] ** (-np.arange(half) / half))[:, None]
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """RMSNorm where the model has one of that name."""
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            return x
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * weight
