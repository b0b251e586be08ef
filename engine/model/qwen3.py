"""Qwen3 (model card: Qwen/Qwen3-0.6B and its sizes): RMSNorm per query and key head, before RoPE."""

from engine.config import Family

FAMILY = Family(
    qk_norm=True, qkv_bias="attention_bias", o_bias="attention_bias", head_dim=128, max_position_embeddings=32768,
    sliding_window=4096, max_window_layers=28,
)  # fmt: skip
