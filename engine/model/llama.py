"""Llama 2, 3, 3.1 and 3.2 (model card: meta-llama/Llama-3.2-1B and its sizes)."""

from engine.config import Family

FAMILY = Family(
    qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", bos_token_id=1, eos_token_id=2
)  # fmt: skip
