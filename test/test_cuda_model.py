"""Whole models on a GPU in emulation: the tokens of the CPU, and those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_cuda import emulated_devices
from test_golden import LOGIT_TOLERANCE, golden

from engine import LLM, SamplingParams
from engine.device import cuda
from engine.device.cuda import CUDADevice
from engine.verify import verify
from tools.golden_cases import CASES, SLIDING_CASES, GoldenCase

BUNDLED = Path(__file__).parent.parent / "models"
PROMPT = "Once upon a time"

pytestmark = pytest.mark.skipif(not emulated_devices(), reason="no C++ compiler for the emulation")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> CUDADevice:
    """device="cuda" opens the emulation."""
    device = emulated_devices()[0]
    monkeypatch.setattr(cuda, "open_driver", lambda place: device.driver)
    return device


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"attention": "streaming", "window": 8, "sink": 2}],
                         ids=["stored", "float32", "window"])  # fmt: skip
def test_greedy_tokens_are_the_cpus(name: str, options: dict[str, Any]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=4)
    tokens = []
    for device in ("cpu", "cuda"):
        with LLM(str(BUNDLED / name), device=device, max_seq_len=128, **options) as llm:
            tokens.append(list(llm.generate(PROMPT, greedy).token_ids))
    assert tokens[0] == tokens[1] and len(tokens[0]) == 4


@pytest.mark.parametrize("dtype", ["auto", "int8", "int4-64"])
def test_every_node_is_the_oracles(dtype: str) -> None:
    """Node by node on the emulated device's own inputs, weights included."""
    report = verify(str(BUNDLED / "tiny-qwen3"), list(range(20, 40)), gen_len=1, device="cuda", dtype=dtype)
    assert report.passed, report.lines


@pytest.mark.parametrize("case", [CASES[0], *SLIDING_CASES[:1]], ids=lambda case: case.name)
def test_prompt_logits_are_those_of_transformers(case: GoldenCase, tmp_path: Path) -> None:
    case.write(tmp_path)
    stored = golden(case)
    with LLM(str(tmp_path), device="cuda", dtype="float32", max_seq_len=512) as llm:
        logits = llm.logits(stored["prompt"].tolist())
    sampled = np.take_along_axis(logits, stored["sampled_ids"], axis=1)
    assert np.abs(logits[stored["rows"]] - stored["logits"]).max() <= LOGIT_TOLERANCE
    assert np.abs(sampled - stored["sampled_logits"]).max() <= LOGIT_TOLERANCE
