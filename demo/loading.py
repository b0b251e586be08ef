"""`demo.benchmark --load`: how fast a model's files come into memory, beside plain reads of the same files."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from demo.methods import threads_of
from engine import LLM
from engine.cpu.huge_pages import reserve


def load_rates(open_llm: Callable[[], LLM], rounds: int) -> tuple[LLM, list[float], list[float]]:
    """Bytes a second of loading and of reading, in turn, after one round to warm up; and the model, closed."""
    rates, limits = [], []
    for _ in range(rounds + 1):
        with open_llm() as llm:
            rates.append(llm.runner.weight_bytes / llm.weights_seconds)
            files = {source.file for w in llm.runner.weights for source in w.sources if hasattr(source, "file")}
        limits.append(read_files(sorted(files), threads_of(llm)))
    return llm, rates[1:], limits[1:]


def read_files(files: list[Path], threads: int) -> float:
    """Bytes a second of plain reads into fresh memory, each thread its part of every file."""

    def read(file: Path, memory: np.ndarray, part: int) -> None:
        begin, end = memory.nbytes * part // threads, memory.nbytes * (part + 1) // threads
        with open(file, "rb", buffering=0) as stream:
            stream.seek(begin)
            while begin < end:
                begin += stream.readinto(memory[begin : min(end, begin + (1 << 20))].data) or end

    started = time.perf_counter()
    fresh = [reserve(file.stat().st_size) for file in files]
    with ThreadPoolExecutor(threads) as pool:
        for file, memory in zip(files, fresh, strict=True):
            list(pool.map(lambda part, f=file, m=memory: read(f, m, part), range(threads)))
    return sum(memory.nbytes for memory in fresh) / (time.perf_counter() - started)
