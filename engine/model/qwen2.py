"""Qwen2 and Qwen2.5 (model card: Qwen/Qwen2.5-0.5B and its sizes): biases on q, k and v."""

from engine.config import Family

FAMILY = Family(qkv_bias=True, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
