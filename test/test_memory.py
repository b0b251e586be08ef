"""What loading and running a model take, measured from outside: one copy of the weights, pages as they are used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import random_model
from tools.make_gguf import write_gguf

ALLOWANCE = 300 << 20  # Python, libraries, activations

PROGRAM = """
import json, sys
from engine import LLM, SamplingParams
from engine.machine import peak_memory
with LLM(sys.argv[1], max_seq_len=4096, max_batch=8) as llm:
    llm.generate([list(range(100))] * 2, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    runner = llm.runner
    print(json.dumps({"peak": peak_memory(), "weights": runner.weight_bytes, "used": runner.cache_used_bytes,
                      "capacity": runner.cache_capacity_bytes}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of Qwen3-0.6B with its embedding: 340 MB, most of it tied."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    assert random_model.main(["--preset", "qwen3-0.6b", "--layers", "1", str(directory)]) in (0, None)
    return directory


def test_peak_memory_is_one_copy_of_the_weights_and_the_pages_in_use(wide: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(wide)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    stored = (wide / "model.safetensors").stat().st_size
    assert found["weights"] <= stored * 1.01
    assert found["used"] < found["capacity"] / 20
    assert found["peak"] <= stored + found["used"] + ALLOWANCE
    assert found["peak"] >= stored  # the measurement itself works


def test_peak_memory_of_a_gguf_file_is_the_same(wide: Path, tmp_path: Path) -> None:
    """Blocks of 8 bits become bf16 slice by slice: what is decoded never lies in memory whole."""
    write_gguf(wide, tmp_path / "wide.gguf", "Q8_0")
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "wide.gguf")]
    found = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    assert found["weights"] <= (wide / "model.safetensors").stat().st_size * 1.01
    assert found["weights"] <= found["peak"] <= found["weights"] + found["used"] + ALLOWANCE
