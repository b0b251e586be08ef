"""The engine as a guest in a process: threads, environment, and a clean end whatever is still running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.device.cpu import available_isas

LOAD = "import sys\nfrom engine import LLM, SamplingParams\nllm = LLM(sys.argv[1], max_seq_len=512)\n"
ENDLESS = "SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)"


def run(program: str, model: Path, **environment: str) -> str:
    """What a program prints. It must end by itself, with status 0 and nothing on standard error."""
    command = [sys.executable, "-X", "faulthandler", "-c", LOAD + program, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.parametrize("attempt", range(5))
def test_a_process_ends_cleanly_while_a_request_is_running(tiny: Path, attempt: int) -> None:
    assert run(f"s = llm.stream([1, 2], {ENDLESS}); next(s); print('left')", tiny) == "left"


def test_a_model_that_is_dropped_frees_its_thread_and_memory(tiny: Path) -> None:
    program = """
import gc, threading, weakref
runner = weakref.ref(llm.runner)
llm.generate([1, 2], SamplingParams(max_tokens=2))
del llm
gc.collect()
print([t.name for t in threading.enumerate()], runner())
"""
    assert run(program, tiny) == "['MainThread'] None"


def test_a_stream_keeps_its_model(tiny: Path) -> None:
    program = f"s = llm.stream([1, 2], {ENDLESS}); del llm; print(len(list(s)) > 0, s.completion().finish_reason)"
    assert run(program, tiny) == "True length"


def test_passive_waiting_and_more_threads_than_cores_give_the_same_tokens(tiny: Path) -> None:
    program = "print(llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)).token_ids)"
    expected = run(program, tiny)
    assert run(program, tiny, OMP_WAIT_POLICY="passive") == expected
    assert run(program, tiny, OMP_NUM_THREADS="5", OMP_DYNAMIC="true") == expected
    assert run(program, tiny, OMP_NUM_THREADS="1") == expected


def test_the_environment_stands_below_the_arguments(tiny: Path) -> None:
    program = "print(llm.device.isa, llm.device.threads, LLM(sys.argv[1], isa='baseline', threads=1).device.isa)"
    worst = available_isas()[0]
    assert run(program, tiny, RILL_ISA=worst, OMP_NUM_THREADS="3") == f"{worst} 3 baseline"


def test_two_isas_live_in_one_process(tiny: Path) -> None:
    program = """
models = [LLM(sys.argv[1], isa=isa, dtype="float32", max_seq_len=64) for isa in ("baseline", llm.device.isa)]
logits = [m.logits([5, 6, 7]) for m in models]
print(models[0].device.isa != models[1].device.isa or "one", abs(logits[0] - logits[1]).max() < 1e-3)
"""
    assert run(program, tiny).endswith("True")
