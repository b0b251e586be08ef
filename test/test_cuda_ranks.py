"""Ranks on the cuda device: the tokens of one process, in emulation and, with `pytest -m cuda`, on GPUs, which they may
share; what a segment costs; and failures, which are all ranks' or none's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated_cuda import RecordingDriver, emulated_devices
from harness import gpu_devices
from test_ranks import FAILING_REQUESTS, ROOT, WORKER, Run, alone, assert_near_tie, finish, start
from test_stages import CASES

from demo.methods import Method
from engine import LLM, SamplingParams, loading
from engine.cuda.program import CUDAProgram
from engine.device import cuda
from engine.ranks.segments import Segments
from engine.ranks.split import ALL_LAYERS, Split
from engine.verify import LOGIT_BOUND

PATHS = {"PYTHONPATH": f"{ROOT}:{WORKER.parent}"}
WINDOW = {"attention": "streaming", "window": 12, "sink": 4}
KINDS = {"float32": "float32", "auto": "bfloat16", "int8-32": "quantised"}  # of LOGIT_BOUND
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


class EmulatedRun(Run):
    worker = WORKER.with_name("emulated_rank_worker.py")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Run]:
    """Starts ranks whose cuda device is that of this process."""
    if request.param == "gpu":
        return Run if gpu_devices() else pytest.skip("no GPU")
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    monkeypatch.setattr(cuda, "open_driver", lambda place: RecordingDriver())
    return EmulatedRun


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Small models of Qwen3 and Llama."""
    directories = [tmp_path_factory.mktemp(case.name) for case in CASES]
    for case, directory in zip(CASES, directories, strict=True):
        case.write(directory)
    return [str(directory) for directory in directories]


def jobs(models: list[str], ranks: int) -> Iterator[dict[str, Any]]:
    """Batches of one and of two, whose prompts go beyond the rows that are fused and the window."""
    qwen3, llama = models
    tp: dict[str, Any] = {"tp": ranks}
    half: dict[str, Any] = {"tp": ranks // 2, "pp": 2}
    of_two = [(qwen3, 2, {"dtype": "auto", **tp}), (llama, 1, {"dtype": "float32", **tp, "parallel": "allgather"}),
              (qwen3, 1, {"dtype": "auto", **half, **WINDOW})]  # fmt: skip
    of_four = [(llama, 1, {"dtype": "int8-32", "pp": 4})]
    for model, batch, options in (
        (qwen3, 1, {"dtype": "float32", **tp, **WINDOW}),
        (llama, 1, {"dtype": "int8-32", **tp}),
        (llama, 2, {"dtype": "float32", **half}),
        *(of_two if ranks == 2 else of_four),
    ):
        longest = 7 if "tp" not in options else 18  # with whole layers, bits are compared where nodes are fused
        prompts = [np.random.default_rng(i).integers(0, 300, longest - 3 * i).tolist() for i in range(batch)]
        given = {"device": "cuda", "max_batch": batch, "cache": False}
        yield {"model": model, "options": options | given, "prompts": prompts, "count": 3}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_tokens_and_logits_of_one_process(ranks: int, starts: type[Run], models: list[str], tmp_path: Path) -> None:
    """Bit for bit where layers are whole; tokens differ only where two logits are as close as rounding."""
    wanted = list(jobs(models, ranks))
    run = starts(tmp_path, ranks, wanted)
    expected = [alone(job | {"options": job["options"] | {"tp": None, "pp": None}}) for job in wanted]
    status, out, err = finish(run.process)
    assert (status, out) == (0, ""), err
    results = dict(np.load(run.results))
    for i, (job, (tokens, logits, size, cache)) in enumerate(zip(wanted, expected, strict=True)):
        options = job["options"]
        whole, found = options.get("tp", 1) == 1, results[f"{i}.logits"]
        bound = LOGIT_BOUND[KINDS[options["dtype"]]] * logits.std()
        assert np.abs(found - logits).max() <= (0 if whole else bound), job
        for prompt, mine, right in zip(job["prompts"], results[f"{i}.tokens"], tokens, strict=True):
            if len(differs := np.flatnonzero(mine != right)):
                assert not whole and options["dtype"] != "float32", job
                one = job | {"options": options | {"tp": None, "pp": None}}
                assert_near_tie(one, [*prompt, *right[: differs[0]]], int(mine[differs[0]]), bound)
        assert results[f"{i}.bytes"] < size and results[f"{i}.cache"] < cache, "a rank holds its part"
        segments = results[f"{i}.segments"]
        assert (segments == segments[0]).all() and segments[0] > 1, "no kernel does a collective by itself"


# One process as one of two ranks, whose sums are left as they are.


class Alone:
    """What the collectives of the first of two ranks go by, when there is no other."""

    split, stage, window, size = Split(0, 2), ALL_LAYERS, None, 2

    def __init__(self) -> None:
        self.collectives: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda **arrays: self.collectives.append(name)

    def agreed_to_stop(self) -> bool:
        return False

    def show_life(self) -> None:
        pass


@pytest.fixture
def rank(models: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A model of two layers or more on the first of two ranks; `count` says what happened during a token."""
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    driver, peers = RecordingDriver(), Alone()
    monkeypatch.setattr(cuda, "open_driver", lambda place: driver)
    monkeypatch.setattr(loading, "_open_peers", lambda options, comm: peers)
    with LLM(models[0], device="cuda", dtype="float32", max_seq_len=512) as llm:
        llm.generate([5, 6, 7], GREEDY)
        yield SimpleNamespace(llm=llm, driver=driver, peers=peers)


def test_a_token_takes_one_wait_a_collective_and_no_memory(
    rank: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every segment is one launch, where it has been seen before; the step goes over once."""
    counts = dict.fromkeys(("synchronise", "allocate", "staging", "send"), 0)

    def counting(name: str) -> Any:
        call = getattr(rank.driver, name)

        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return call(*arguments)

        return counted

    pinned = {id(buffer) for buffer in rank.driver.staged}
    for name in counts:
        monkeypatch.setattr(rank.driver, name, counting(name))
    rank.peers.collectives.clear()
    rank.driver.replays = 0
    rank.llm.runner.replay(0, len(rank.llm.runner.plan.nodes))
    layers = rank.llm.config.num_hidden_layers
    assert rank.peers.collectives == ["all_reduce"] * (1 + 2 * layers) + ["gather"]
    collectives = len(rank.peers.collectives)
    assert rank.driver.replays == collectives + 1
    assert counts == {"synchronise": collectives + 1, "allocate": 0, "staging": collectives, "send": 1 + collectives}
    assert {id(buffer) for buffer in rank.driver.staged} == pinned


def test_what_is_fused_between_sums(rank: SimpleNamespace) -> None:
    """Heads are, everywhere; a product and the norm after it are not, for a sum stands between; the first norm and what
    follows are."""
    program = rank.llm.runner.plan.program
    assert isinstance(program, Segments) and isinstance(program.program, CUDAProgram)
    nodes, groups = rank.llm.runner.plan.nodes, program.program.groups.values()
    for group in groups:
        assert not any(nodes[i].op.collective for i in group.nodes)
    names = [tuple(nodes[i].op.name for i in group.nodes) for group in groups]
    heads = ("rmsnorm", "rmsnorm", "rope", "kv_store")
    assert names == [("rmsnorm", "matmul")] + [heads] * rank.llm.config.num_hidden_layers
    rank.driver.launched.clear()
    rank.llm.runner.replay(0, len(nodes))
    assert len(rank.driver.launched) == 2 + 9 * rank.llm.config.num_hidden_layers - 1 + 3
    assert program.program.max_recorded > len(program.program.recorded)


def test_methods_of_the_benchmark() -> None:
    found = [Method(name, "flash").device() for name in ("mpi+cuda", "cuda", "mpi", "avx2")]
    assert found == [{"device": "cuda"}, {"device": "cuda", "tp": 1}, {"device": "cpu", "isa": "baseline"},
                     {"device": "cpu", "isa": "avx2", "tp": 1}]  # fmt: skip


# Failures.


def emulated(source: str) -> str:
    """A program, on the emulated device."""
    return "import emulated_rank_worker\n" + source.replace("LLM(sys.argv[1]", "LLM(sys.argv[1], device='cuda'")


@pytest.mark.parametrize("pp", [1, 2])
def test_a_request_that_fails_is_its_own_affair(pp: int, models: list[str]) -> None:
    """On every rank alike; and what is not finite is traced to its node by all of them."""
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    source = FAILING_REQUESTS.replace("model.layers.2", "model.layers.3")  # which is rank 0's either way
    source = source.replace("max_tokens=9", "max_tokens=2")
    status, out, err = finish(start(2, "-c", emulated(source), models[0], str(pp), **PATHS))
    assert status == 0, err
    assert [line.split(";")[0] for line in out.splitlines()] == [
        "row 1 holds a token id outside the vocabulary",
        "row 1 holds a token id outside the vocabulary",
        "row 40 holds a token id outside the vocabulary",
        "the logits are not finite",
    ]
    assert "rmsnorm of model.layers.3.self_attn.q_norm" in out


STOPPING = """
import sys, threading, time
from engine import LLM, SamplingParams, runner
from engine.device import Cancelled
from engine.runner import Runner

runner.MAX_ROWS = 16
run, begun, stopped = Runner.run, threading.Event(), []
def noting(self, segments, wants):
    if len(segments[0].tokens) == runner.MAX_ROWS:
        begun.set()
    try:
        run(self, segments, wants)
    except Cancelled:
        stopped.append(segments)
        raise
Runner.run = noting
llm = LLM(sys.argv[1], max_seq_len=500)
greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
expected = llm.generate([5, 6], greedy).token_ids
stream = llm.stream([9] * 400, greedy)
begun.wait()
time.sleep(0.05)
stream.close()
assert llm.generate([5, 6], greedy).token_ids == expected
print("stopped", len(stopped))
"""


def test_a_step_is_stopped_on_all_ranks_or_on_none() -> None:
    if not emulated_devices():
        pytest.skip("no C++ compiler for the emulation")
    status, out, err = finish(start(2, "-c", emulated(STOPPING), str(ROOT / "models" / "tiny-llama"), **PATHS))
    assert status == 0, err
    assert out == "stopped 1\n", "no step was stopped in its middle"


@pytest.mark.parametrize("fault", ["a plan raises", "failing load"])
def test_a_rank_that_raises_ends_all(fault: str, starts: type[Run], models: list[str], tmp_path: Path) -> None:
    run = starts(tmp_path, 2, list(jobs(models, 2))[:1], fault)
    run.pid(0)
    status, _, err = finish(run.process)
    assert status != 0 and "on purpose" in err
    assert run.is_gone()
