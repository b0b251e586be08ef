"""Start a bundled model from trained weights instead of from noise (needs `torch`, `transformers`): from its own, to
train it further, or `tiny-llama` from those of `tiny-qwen3`.

The two differ in their templates, a little in their vocabularies, and in the norms that Qwen3 has on queries and keys.
Nearly all pieces of the new vocabulary are tokens of the old one; any other gets the mean embedding of the tokens that
spell it. The norms divide by a length that hardly varies: they are folded into the projections with that length's mean.
What remains wrong, training mends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tools.train_data import Encoder, LlamaEncoder, Qwen3Encoder, pack_rows
from tools.train_tokenizer import END_OF_TEXT, IM_END, IM_START, SPACE


def warm_start(model: Any, encoder: Encoder, source_directory: Path) -> None:
    """Fill a model from a directory of its own architecture, or a Llama model from a Qwen3 one of its shape."""
    source = AutoModelForCausalLM.from_pretrained(source_directory, dtype=torch.float32)
    with torch.no_grad():
        if isinstance(encoder, LlamaEncoder) and source.config.model_type == "qwen3":
            _fill(model, encoder, source, Qwen3Encoder(source_directory))
        else:
            model.load_state_dict(source.state_dict())


def _fill(model: Any, encoder: LlamaEncoder, source: Any, source_encoder: Qwen3Encoder) -> None:
    rows = spell(encoder, source_encoder, source.model.embed_tokens.weight)
    model.model.embed_tokens.weight.copy_(rows)
    model.lm_head.weight.copy_(rows)
    model.model.norm.load_state_dict(source.model.norm.state_dict())
    lengths = measure_lengths(source, source_encoder)
    for index, (layer, old) in enumerate(zip(model.model.layers, source.model.layers, strict=True)):
        layer.load_state_dict(old.state_dict(), strict=False)
        attention = layer.self_attn
        for name in ("q", "k"):
            gain = getattr(old.self_attn, f"{name}_norm").weight[None] / lengths[index, name][:, None]
            getattr(attention, f"{name}_proj").weight.mul_(gain.reshape(-1, 1))


def spell(encoder: LlamaEncoder, source: Qwen3Encoder, embedding: torch.Tensor) -> torch.Tensor:
    """An embedding row for each piece, `[pieces, hidden]`: the mean of the old rows that spell it."""
    pieces = encoder.tokenizer
    controls = {encoder.begin: [IM_START], encoder.end: [IM_END, END_OF_TEXT], pieces.unk_id(): [END_OF_TEXT]}
    rows = []
    for i in range(pieces.vocab_size()):
        text = pieces.id_to_piece(i).replace(SPACE, " ")
        if pieces.is_byte(i):
            text = bytes([int(text[3:5], 16)]).decode("latin-1")
        ids = source.tokenizer.encode("".join(controls.get(i, [text]))).ids
        rows.append(embedding[ids].mean(0))
    return torch.stack(rows)


def measure_lengths(source: Any, encoder: Qwen3Encoder) -> dict[tuple[int, str], torch.Tensor]:
    """Mean root mean square of each head's queries and keys before their norm, by layer and "q" or "k"."""
    lengths: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            square = inputs[0].pow(2).mean(-1).sqrt()  # [batch, positions, heads]
            lengths[key] = square.mean((0, 1))

        return hook

    for index, layer in enumerate(source.model.layers):
        layer.self_attn.q_norm.register_forward_pre_hook(keep((index, "q")))
        layer.self_attn.k_norm.register_forward_pre_hook(keep((index, "k")))
    rows = pack_rows(encoder, "lengths", rows=8, length=256)
    source(torch.from_numpy(rows.ids), use_cache=False)
    return lengths
