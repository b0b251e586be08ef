"""The engine against transformers: stored logits and greedy tokens of small random models, on every ISA.

The checkpoints are made again from their seeds (tools/golden_cases.py); what transformers says about them
lies in test/golden and was made by tools/make_golden.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.config import load_config
from engine.device.cpu import available_isas
from engine.errors import RillError
from tools.golden_cases import CASES, LLAMA, QWEN2, QWEN3, SLIDING_CASES, TIED, GoldenCase, old_style, sizes
from tools.make_golden import GOLDEN, MIN_DISTINCT, MIN_MARGIN, STEPS, logsumexp
from tools.random_weights import Config, Scales, directory_digest, random_tensors, write_json, write_weights

LOGIT_TOLERANCE = 1e-3
TARGETS = [{"device": "cpu", "isa": isa} for isa in available_isas()] + [{"device": "numpy"}]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_sliding_case = pytest.mark.parametrize("case", SLIDING_CASES, ids=lambda case: case.name)
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: "-".join(target.values()))

MakeCheckpoint = Callable[[GoldenCase], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """case -> directory of its checkpoint, made once and proven to be what the reference saw."""
    made: dict[str, Path] = {}

    def make(case: GoldenCase) -> Path:
        if case.name not in made:
            directory = tmp_path_factory.mktemp(case.name)
            case.write(directory)
            digest = str(golden(case)["digest"])
            assert directory_digest(directory) == digest, (
                f"{case.name}: the checkpoint is no longer the one that the golden file was made from; "
                f"if the case was changed on purpose, run `python -m tools.make_golden {case.name}`"
            )
            made[case.name] = directory
        return made[case.name]

    return make


def golden(case: GoldenCase) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{case.name}.npz") as stored:
        return dict(stored)


def assert_matches(directory: Path, stored: dict[str, np.ndarray], **target: Any) -> None:
    """Prompt logits within LOGIT_TOLERANCE of the reference at every position, and its 64 greedy tokens."""
    llm = LLM(str(directory), dtype="float32", max_seq_len=512, **target)
    prompt = stored["prompt"].tolist()
    logits = llm.logits(prompt)
    assert logits.dtype == np.float32 and logits.shape == (len(prompt), stored["logits"].shape[1])
    sampled = np.take_along_axis(logits, stored["sampled_ids"], axis=1)
    errors = {
        "rows": np.abs(logits[stored["rows"]] - stored["logits"]).max(),
        "sampled": np.abs(sampled - stored["sampled_logits"]).max(),
        "logsumexp": np.abs(logsumexp(logits) - stored["logsumexp"]).max(),
    }
    assert all(error <= LOGIT_TOLERANCE for error in errors.values()), errors
    greedy = SamplingParams(temperature=0, max_tokens=len(stored["tokens"]), ignore_eos=True)
    assert list(llm.generate(prompt, greedy).token_ids) == stored["tokens"].tolist()


@every_target
@every_case
def test_logits_and_greedy_tokens(case: GoldenCase, target: Config, checkpoint: MakeCheckpoint) -> None:
    assert_matches(checkpoint(case), golden(case), **target)


@every_target
@every_sliding_case
def test_sliding_windows_are_honoured_or_refused(
    case: GoldenCase, target: Config, checkpoint: MakeCheckpoint
) -> None:
    directory = checkpoint(case)
    try:
        LLM(str(directory), dtype="float32", max_seq_len=512, **target)
    except RillError as error:
        assert "sliding" in str(error)
        return
    assert_matches(directory, golden(case), **target)


@pytest.mark.parametrize("case", CASES + SLIDING_CASES, ids=lambda case: case.name)
def test_rope_frequencies(case: GoldenCase, checkpoint: MakeCheckpoint) -> None:
    """The formulas themselves: greedy runs can agree although a frequency is wrong."""
    config = load_config(checkpoint(case) / "config.json")
    stored = golden(case)  # float32, and so computed: a few units in the last place off
    np.testing.assert_allclose(config.rope.inv_freq(config.head_dim), stored["inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(config.rope.attention_scaling(), stored["attention_factor"], rtol=1e-6)


@pytest.mark.parametrize("case", CASES + SLIDING_CASES, ids=lambda case: case.name)
def test_golden_files_decide(case: GoldenCase) -> None:
    """No near ties, no loops, and a prompt that crosses a page of 64 positions."""
    stored = golden(case)
    assert stored["margins"].min() >= MIN_MARGIN
    assert len(stored["tokens"]) == len(stored["margins"]) == STEPS
    assert len(set(stored["tokens"].tolist())) >= MIN_DISTINCT
    assert len(stored["prompt"]) == case.prompt_len > 64


# Layers that weigh less than the embedding make a model about as sure of itself as trained ones are: the
# best token has a probability of 0.75 on average. Flat random logits are full of ties that rounding turns.
SURE = Scales(logit=3.0, matrix=0.8, norm=0.1, bias=0.1)
FAMILIES = {"qwen3": QWEN3, "qwen2": QWEN2, "llama": LLAMA}


@every_target
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_against_float32_arithmetic(family: str, target: Config, tmp_path: Path) -> None:
    config = FAMILIES[family] | TIED | sizes(128, 256, 3, 8, 2, 32, 600) | old_style(1e6, None, "bfloat16")
    write_weights(tmp_path, random_tensors(config, ("BF16",), SURE), seed=1)
    write_json(tmp_path / "config.json", config)
    prompts = np.random.default_rng(0).integers(0, 600, (3, 300)).tolist()
    exact = prompt_logits(tmp_path, prompts, dtype="float32", **target)
    stored = prompt_logits(tmp_path, prompts, dtype="auto", **target)
    same_top = (exact.argmax(-1) == stored.argmax(-1)).mean()
    assert same_top >= 0.99
    assert mean_kl(exact, stored) <= 1e-3


def prompt_logits(directory: Path, prompts: list[list[int]], **options: Any) -> np.ndarray:
    """float32 [rows of all prompts, vocab]"""
    llm = LLM(str(directory), max_seq_len=512, **options)
    return np.concatenate([llm.logits(prompt) for prompt in prompts])


def mean_kl(exact: np.ndarray, other: np.ndarray) -> float:
    """Mean over rows of KL(softmax(exact) || softmax(other)), in nats."""
    log_p = exact - logsumexp(exact)[:, None]
    log_q = other - logsumexp(other)[:, None]
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
