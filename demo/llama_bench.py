"""One run of llama.cpp's own benchmark program, `llama-bench`, for `demo.compare_llama_cpp`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from demo.options import OptionError
from demo.timed_model import Trial
from engine import RillError

BUILD = ("build_commit", "build_number", "backends", "flash_attn")


@dataclass(frozen=True)
class PeerSample:
    """One round. weights: what the file holds, in llama.cpp's words; build: what ran it."""

    tokens_per_second: float
    weights: str
    kv_dtype: str
    build: dict[str, Any]


class LlamaBench:
    """The program, which is checked at once. options: more of its own."""

    def __init__(self, binary: Path, options: Sequence[str] = ()) -> None:
        self.binary, self.options = binary, list(options)
        self._run(["--help"])

    def sample(self, file: Path, trial: Trial, threads: int) -> PeerSample:
        """Raises RillError where the program fails or answers something else."""
        sizes = {"-p": trial.prompt_len or 0, "-n": trial.gen_len or 0, "-d": trial.depth, "-t": threads, "-r": 1}
        words = [str(word) for pair in sizes.items() for word in pair]
        try:
            sample, ran = parse_bench(self._run(["-m", str(file), *words, *self.options, "-o", "json"]))
        except ValueError as error:
            raise RillError(f"{self.binary}: {error}") from None
        asked = {"n_prompt": sizes["-p"], "n_gen": sizes["-n"], "n_depth": sizes["-d"], "n_threads": threads}
        if ran != asked:
            raise RillError(f"{self.binary}: it was asked for {asked} and ran {ran}")
        return sample

    def _run(self, arguments: list[str]) -> str:
        try:
            done = subprocess.run([self.binary.absolute(), *arguments], capture_output=True, text=True, check=False)
        except OSError as error:
            raise OptionError(f"{self.binary}: {error.strerror}") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["and said nothing"]
            raise RillError(f"{self.binary} ended with status {done.returncode}: {said[-1]}")
        return done.stdout


def parse_bench(text: str) -> tuple[PeerSample, dict[str, int]]:
    """The one test of `llama-bench -o json`, and what it was. Raises ValueError."""
    try:
        (row,) = json.loads(text)
        sample = PeerSample(mean(map(float, row["samples_ts"])), str(row["model_type"]), str(row["type_k"]),
                            {name: row.get(name) for name in BUILD})  # fmt: skip
        return sample, {name: int(row[name]) for name in ("n_prompt", "n_gen", "n_depth", "n_threads")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"expected the JSON of one test, of llama-bench -o json ({error!r})") from None
