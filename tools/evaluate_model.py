"""Measure a bundled model on held-out stories and chats (needs `torch` and `transformers`).

    python -m tools.evaluate_model models/tiny-qwen3

prints the loss, the share of questions answered exactly, by category, and a story. These are the numbers of
the model card.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tools.chats import make_chat
from tools.train_data import ENCODERS, IGNORED, Encoder, Rows, pack_rows

CONTEXT = 1024
HELD_OUT_BATCHES = 6  # of 4 rows
OPENING = "Once upon a time"


def attention_mask(documents: torch.Tensor) -> torch.Tensor:
    """What to add to the scores `[rows, 1, length, length]`: a token sees its own document, up to itself."""
    length = documents.shape[1]
    seen = (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(length, length).tril().bool()
    return torch.zeros(seen.shape).masked_fill(~seen, -1e4)


def loss_of(
    model: Any, rows: Rows, dtype: torch.dtype = torch.bfloat16, weighted: bool = True
) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens, in nats; each counts by its weight, or all alike."""
    ids, labels, documents, positions = (
        torch.from_numpy(array) for array in (rows.ids, rows.labels, rows.documents, rows.positions)
    )
    mask = attention_mask(documents).to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    weights = (torch.from_numpy(rows.weights) if weighted else torch.ones(labels.shape)) * (labels != IGNORED)
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def held_out_loss(model: torch.nn.Module, encoder: Encoder, dtype: torch.dtype = torch.bfloat16) -> float:
    """Mean loss, in nats a learned token, on packed rows of held-out documents."""
    total = 0.0
    for i in range(HELD_OUT_BATCHES):
        rows = pack_rows(encoder, f"held out/{i}", 4, CONTEXT, held_out=True)
        with torch.no_grad():
            total += float(loss_of(model, rows, dtype, weighted=False))
    return total / HELD_OUT_BATCHES


def count_right_answers(
    model: torch.nn.Module, encoder: Encoder, chats: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Counter[str], Counter[str]]:
    """Questions answered exactly and questions asked, by category, over held-out chats.

    An answer counts when every one of its tokens and its end is the model's first choice given the chat
    before it, which is the same as decoding it greedily.
    """
    rng = random.Random("held out questions")
    right, asked = Counter[str](), Counter[str]()
    while chats > 0:
        document = encoder.chat(make_chat(rng, held_out=True))
        if len(document.ids) > CONTEXT:
            continue
        chats -= 1
        ids = torch.tensor([document.ids])
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            first = model(ids, use_cache=False).logits[0].argmax(-1)
        for start, end, category in document.answers:
            asked[category] += 1
            right[category] += bool((first[start - 1 : end - 1] == ids[0, start:end]).all())
    return right, asked


def tell_story(model: torch.nn.Module, encoder: Encoder, opening: str = OPENING) -> tuple[str, bool]:
    """The model's own greedy continuation of a raw opening, and whether it ended by itself."""
    document = encoder.story(opening)
    ids = torch.tensor([document.ids[:-1]])
    said = model.generate(ids, do_sample=False, max_new_tokens=500)[0].tolist()
    return encoder.tokenizer.decode(said), said[-1] == encoder.end


def main() -> None:
    """Print what the model card states."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--chats", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.directory, dtype=torch.float32).eval()
    encoder = ENCODERS[f"tiny-{model.config.model_type}"](arguments.directory)
    print(f"parameters {sum(p.numel() for p in model.parameters()):,}")
    print(f"held-out loss {held_out_loss(model, encoder, torch.float32):.4f}")
    right, asked = count_right_answers(model, encoder, arguments.chats, torch.float32)
    print("| questions | asked | answered exactly |\n|---|---|---|")
    for category in sorted(asked):
        print(f"| {category} | {asked[category]} | {right[category] / asked[category]:.1%} |")
    print(f"| **all** | {asked.total()} | {right.total() / asked.total():.1%} |")
    story, ended = tell_story(model, encoder)
    print(f"\n{story}\n\nended by itself: {ended}")


if __name__ == "__main__":
    main()
