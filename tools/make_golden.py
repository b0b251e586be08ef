"""Make test/golden: logits and greedy tokens of the reference for each case of `golden_cases.py`.

Needs PyTorch and transformers; the tests do not. Run `python -m tools.make_golden [NAME ...]` after a change
of the cases. All is computed in float32 with the plain ("eager") attention, on weights widened to float32.

For each case, `test/golden/NAME.npz` holds
    prompt          int32 [n]           token ids
    tokens          int32 [64]          greedy continuation, EOS ignored
    margins         float32 [64]        by how much the best logit led the second at each of these steps
    rows            int32 [8]           positions with full logits
    logits          float32 [8, vocab]
    sampled_ids     int32 [n, 8]        some token ids for each position, and
    sampled_logits  float32 [n, 8]      their logits
    logsumexp       float32 [n]         over the whole vocabulary, for each position
    inv_freq        float32 [head_dim / 2], attention_factor float32: the rotary embedding's own numbers
    digest          SHA-256 of the checkpoint's files
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.golden_cases import CASES, SLIDING_CASES, GoldenCase
from tools.random_weights import directory_digest

GOLDEN = Path(__file__).resolve().parent.parent / "test" / "golden"
STEPS = 64
MIN_MARGIN = 1e-2  # float32 rounding moves logits by 1e-5 to 1e-4: correct engines agree on every token
MIN_DISTINCT = 24  # different tokens among the 64, so that a loop does not count as a test
MAX_PROMPTS = 500
FULL_ROWS = 8
SAMPLED = 8


def load_reference(directory: Path) -> Any:
    """The reference model in float32 with eager attention, on two threads."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def forward(model: Any, ids: list[int]) -> np.ndarray:
    """Logits float32 [len(ids), vocab] of one forward pass."""
    import torch

    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """STEPS tokens with the reference's KV cache; nothing ends the text early."""
    import torch

    cache, ids, tokens = None, torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(STEPS):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return tokens


def margins_of(logits: np.ndarray) -> np.ndarray:
    """Best minus second-best logit of each row."""
    best = np.sort(logits, axis=-1)[:, -2:]
    margins: np.ndarray = best[:, 1] - best[:, 0]
    return margins


def find_prompt(model: Any, case: GoldenCase) -> tuple[list[int], list[int], np.ndarray]:
    """The first seeded prompt whose continuation is clear at every step and varied.

    The steps are judged on one forward pass over the whole text, which must also agree with the cached run.

    Returns:
        prompt, tokens, margins.
    """
    for attempt in range(MAX_PROMPTS):
        draws = np.random.PCG64(np.random.SeedSequence([case.seed, attempt])).random_raw(case.prompt_len)
        prompt = (draws % np.uint64(case.config["vocab_size"])).tolist()
        tokens = greedy(model, prompt)
        logits = forward(model, prompt + tokens[:-1])[len(prompt) - 1 :]
        margins = margins_of(logits)
        if margins.min() >= MIN_MARGIN and len(set(tokens)) >= MIN_DISTINCT:
            assert logits.argmax(-1).tolist() == tokens, f"{case.name}: cached and whole run differ"
            varied = len(set(tokens))
            print(f"{case.name}: prompt {attempt}, least margin {margins.min():.4f}, {varied} tokens differ")
            return prompt, tokens, margins
    raise SystemExit(f"{case.name}: none of {MAX_PROMPTS} prompts has margins of {MIN_MARGIN} at every step")


def logsumexp(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    total: np.ndarray = top + np.log(np.exp(wide - top[..., None]).sum(-1))
    return total


def golden_arrays(case: GoldenCase, directory: Path) -> dict[str, Any]:
    """Everything that is stored for one case; the checkpoint lies in `directory`."""
    model = load_reference(directory)
    prompt, tokens, margins = find_prompt(model, case)
    logits = forward(model, prompt)
    positions = np.arange(len(prompt))
    rows = np.unique(np.linspace(0, len(prompt) - 1, FULL_ROWS).astype(np.int32))
    sampled = (positions[:, None] * 7 + np.arange(SAMPLED) * 31) % case.config["vocab_size"]
    rotary = model.model.rotary_emb
    return {
        "prompt": np.array(prompt, np.int32),
        "tokens": np.array(tokens, np.int32),
        "margins": margins.astype(np.float32),
        "rows": rows,
        "logits": logits[rows],
        "sampled_ids": sampled.astype(np.int32),
        "sampled_logits": np.take_along_axis(logits, sampled, axis=1),
        "logsumexp": logsumexp(logits).astype(np.float32),
        "inv_freq": rotary.inv_freq.numpy(),
        "attention_factor": np.float32(rotary.attention_scaling),
        "digest": directory_digest(directory),
    }


def make_golden(case: GoldenCase) -> Path:
    """Build the checkpoint, run the reference on it, store what it says."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        case.write(directory)
        arrays = golden_arrays(case, directory)
    path = GOLDEN / f"{case.name}.npz"
    np.savez_compressed(path, **arrays)
    return path


def main() -> int:
    cases = {case.name: case for case in CASES + SLIDING_CASES}
    parser = argparse.ArgumentParser(prog="python -m tools.make_golden", description="Make the golden files.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(cases)}")
    names = parser.parse_args().names
    if unknown := set(names) - set(cases):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    GOLDEN.mkdir(exist_ok=True)
    for name in names or cases:
        path = make_golden(cases[name])
        print(f"  {path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
