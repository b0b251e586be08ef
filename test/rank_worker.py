"""What test_ranks.py starts under mpiexec: rank 0 does the jobs of a JSON file, the others follow it.

    rank_worker.py JOBS.json RESULTS.npz PIDS [FAULT]

A job is {"model": …, "options": {…}, "prompts": [[…], …], "count": n}. The results of job i are its greedy tokens
i.tokens [prompts, count], i.logits of the first prompt, and i.bytes, what its weights take on rank 0. FAULT is what
goes wrong, on the last rank unless it says otherwise. Every rank notes in PIDS/held-RANK what it has come to hold: a
line a model, with the bytes of weights, the bytes of the cache, its first layer and the one after its last.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine import LLM, SamplingParams
from engine.ranks.followers import enter
from engine.ranks.segments import Segments
from engine.runner import Runner


def main(jobs: str, results: str, pids: str, fault: str = "") -> None:
    rank, size = int(os.environ.get("PMI_RANK", 0)), int(os.environ.get("PMI_SIZE", 1))
    (Path(pids) / str(rank)).write_text(str(os.getpid()))
    note_what_is_held(Path(pids) / f"held-{rank}")
    if rank == size - 1:
        FAULTS[fault]()
    enter()
    found: dict[str, Any] = {}
    for i, job in enumerate(json.loads(Path(jobs).read_text())):
        with LLM(job["model"], **job["options"]) as llm:
            if fault == "rank 0 raises":
                raise RuntimeError("on purpose")
            params = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True)
            completions = llm.generate(job["prompts"], params)
            found[f"{i}.tokens"] = np.array([completion.token_ids for completion in completions])
            found[f"{i}.logits"] = llm.logits(job["prompts"][0])
            found[f"{i}.bytes"] = np.array(llm.runner.weight_bytes)
            found[f"{i}.cache"] = np.array(llm.runner.cache_capacity_bytes)
            found[f"{i}.segments"] = np.array(segments(llm.runner))
        if fault == "pause":
            time.sleep(2)
    np.savez(results, **found)


def segments(runner: Runner) -> list[int]:
    """In how many a step of 1, 4, 15 and 16 rows is cut."""
    program, nodes = runner.plan.program, len(runner.plan.nodes)
    return [len(program.ends(0, nodes, n)) if isinstance(program, Segments) else 1 for n in (1, 4, 15, 16)]


def note_what_is_held(file: Path) -> None:
    load = Runner.load

    def noting(self: Runner, progress: Any = None, cache: bool = False) -> None:
        load(self, progress, cache)
        weights, kv = (sum(tensor.storage.nbytes for tensor in each) for each in (self.weights, self.layers))
        layers = self.model.layers
        with file.open("a") as out:
            print(weights, kv, layers.start, layers.stop, file=out)

    Runner.load = noting  # type: ignore[method-assign]


def raise_in_a_step() -> None:
    follow, steps = Runner.follow, iter(range(3))

    def raising(self: Runner, first: int, last: int) -> None:
        if next(steps, None) is None:
            raise RuntimeError("on purpose")
        follow(self, first, last)

    Runner.follow = raising  # type: ignore[method-assign]


def raise_in_a_plan() -> None:
    from engine.ranks.comm import Comm

    all_reduce, calls = Comm.all_reduce, iter(range(5))

    def raising(self: Comm, x: np.ndarray) -> None:
        if next(calls, None) is None:
            raise RuntimeError("on purpose")
        all_reduce(self, x)

    Comm.all_reduce = raising  # type: ignore[method-assign]


def raise_in_a_stage() -> None:
    from engine.ranks.stages import Stages

    def raising(self: Stages, x: np.ndarray, pending: np.ndarray) -> None:
        raise RuntimeError("on purpose")

    Stages.send = raising  # type: ignore[method-assign]


def work_slowly() -> None:
    look = Segments._look

    def slow(self: Segments, index: int) -> None:
        time.sleep(0.5)
        look(self, index)

    Segments._look = slow  # type: ignore[method-assign]


def load_slowly() -> None:
    load = Runner.load

    def slow(self: Runner, progress: Any = None, cache: bool = False) -> None:
        time.sleep(2)
        load(self, progress, cache)

    Runner.load = slow  # type: ignore[method-assign]


def fail_to_load() -> None:
    def failing(self: Runner, progress: Any = None, cache: bool = False) -> None:
        raise MemoryError("on purpose")

    Runner.load = failing  # type: ignore[method-assign]


def stop_in_a_load() -> None:
    def stopping(self: Runner, progress: Any = None, cache: bool = False) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    Runner.load = stopping  # type: ignore[method-assign]


def stop_in_an_opening() -> None:
    def stopping(self: Runner, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    Runner.__init__ = stopping  # type: ignore[method-assign]


FAULTS = {
    "": lambda: None,
    "pause": lambda: None,
    "rank 0 raises": lambda: None,
    "a step raises": raise_in_a_step,
    "a plan raises": raise_in_a_plan,
    "a stage raises": raise_in_a_stage,
    "slow stage": work_slowly,
    "slow load": load_slowly,
    "failing load": fail_to_load,
    "stuck load": stop_in_a_load,
    "stuck open": stop_in_an_opening,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
