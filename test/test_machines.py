"""Ranks on two machines that have nothing but TCP between them: the same tokens, and what docs/distributed.md says of
bytes and of time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machines import ADDRESSES, machines, why_none
from test_ranks import MPIEXEC, ROOT, assert_near_tie, finish, spawn
from test_ranks import pytestmark as needs_mpiexec

from engine import LLM, SamplingParams
from engine.verify import LOGIT_BOUND

MODEL = ROOT / "models" / "tiny-qwen3"
LAYERS, HIDDEN, VOCAB = 4, 256, 1536
SUMS = 2 * LAYERS + 1  # a token's
DECODED = 15
PROMPT = list(range(40, 60))
DELAY = 0.005

pytestmark = needs_mpiexec

PROGRAM = f"""
import json, sys, time
from engine import LLM, SamplingParams

def traffic():
    device = next(line for line in open("/proc/self/net/dev") if "eth0:" in line)
    numbers = device.partition(":")[2].split()
    return int(numbers[0]), int(numbers[8])  # bytes that came, bytes that went

llm = LLM(sys.argv[1], threads=1, dtype="float32", pp=int(sys.argv[2]))
llm.generate([9, 8, 7], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
with llm.profile() as profile:
    before, begin, found = traffic(), time.perf_counter(), []
    tokens = llm.generate({PROMPT}, SamplingParams(temperature=0, max_tokens={DECODED} + 1, ignore_eos=True)).token_ids
    seconds, after = time.perf_counter() - begin, traffic()
comm = llm.runner.comm
print(json.dumps({{"tokens": tokens, "seconds": seconds, "came": after[0] - before[0], "went": after[1] - before[1],
                  "step": int(llm.runner.step.shared.nbytes), "ranks": comm.size, "local": comm.place.ranks,
                  "cost": profile.cost.content()}}))
"""


@pytest.fixture(scope="module", autouse=True)
def place() -> None:
    if reason := why_none():
        pytest.skip(reason)


def run(directory: Path, delay: float, pp: int = 1) -> dict[str, Any]:
    with machines(directory, delay) as both:
        launch = [str(MPIEXEC), "-launcher", "ssh", "-launcher-exec", str(both.launcher), "-hosts", ",".join(ADDRESSES)]
        program = [sys.executable, "-m", "mpi4py", "-c", PROGRAM, str(MODEL), str(pp)]
        command = both.command([*launch, "-n", "2", *program])
        # UCX (MPICH) would find the memory that both machines have; libfabric takes what is named.
        status, out, err = finish(spawn(command, UCX_TLS="tcp,self", FI_PROVIDER="tcp"))
        assert status == 0, err
        found: dict[str, Any] = json.loads(out)
        assert (found["ranks"], found["local"]) == (2, 1), "each is alone on its machine"
        return found


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("near"), 0.0)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("far"), DELAY)


def test_the_tokens_of_one_process(near: dict[str, Any], far: dict[str, Any]) -> None:
    job = {"model": str(MODEL), "options": {"dtype": "float32"}}
    with LLM(MODEL, dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=DECODED + 1, ignore_eos=True)
        expected = llm.generate(PROMPT, params).token_ids
        bound = LOGIT_BOUND["float32"] * llm.logits(PROMPT).std()
    for tokens in (near["tokens"], far["tokens"]):
        assert len(tokens) == len(expected)
        wrong = [i for i, (found, right) in enumerate(zip(tokens, expected, strict=True)) if found != right][:1]
        for i in wrong:
            assert_near_tie(job, [*PROMPT, *expected[:i]], tokens[i], bound)


def test_what_goes_over_the_wire(near: dict[str, Any]) -> None:
    """Sums go both ways, the step one way and half of the logits the other. Packets have heads and are acknowledged."""
    sums = SUMS * HIDDEN * 4 * (DECODED + len(PROMPT))
    for way, least in (("went", sums + near["step"] * (DECODED + 1)), ("came", sums + VOCAB // 2 * 4 * (DECODED + 1))):
        assert least <= near[way] <= 1.5 * least, way


def test_a_delay_takes_each_sum_as_long(far: dict[str, Any]) -> None:
    """No rank is done with a sum before the other's part has come all the way; nor is rank 0 before the other has been
    told of the step."""
    assert far["seconds"] >= (DECODED + 1) * SUMS * DELAY


def test_a_delay_is_found_and_the_forecast_counts_it(far: dict[str, Any]) -> None:
    link, decode = far["cost"]["link"], far["cost"]["phases"]["decode"]
    assert link["ranks"] == 2 and DELAY / 2 <= link["latency"]
    one, two, four, *_ = decode["forecast"]
    assert one["communication"] == 0 and two["communication"] >= (SUMS + 1) * DELAY / 2
    assert four["communication"] >= 1.5 * two["communication"], "twice as many rounds"


def test_a_delay_between_stages_is_a_messages_way_and_the_way_of_a_step(tmp_path: Path) -> None:
    """Rank 1 hears of a step, and rank 0 gets its rows, each as late as that."""
    found = run(tmp_path, DELAY, pp=2)
    line, decode = found["cost"]["line"], found["cost"]["phases"]["decode"]
    way = line["boundaries"][0]["latency"]
    assert way >= DELAY and way + line["told"]["latency"] >= 2 * DELAY
    for communication, waiting in zip(decode["communication"], decode["waiting"], strict=True):
        assert communication + waiting >= 1.5 * DELAY * DECODED
    assert decode["communication"][0] >= DELAY * DECODED, "of a row, which rank 0 receives"
    one, two, four = decode["forecast"]
    assert one["communication"] == 0 and two["communication"] >= 2 * DELAY
    assert four["communication"] >= two["communication"] + 2 * way


def test_nothing_is_left(tmp_path: Path) -> None:
    with machines(tmp_path) as both:
        names = {*both.names, both.wire}
        assert names <= namespaces()
    assert not names & namespaces()
    with pytest.raises(ZeroDivisionError), machines(tmp_path):
        raise ZeroDivisionError
    assert not names & namespaces()


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}
