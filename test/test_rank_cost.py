"""What a token costs each rank: shares that make up the whole, and forecasts that follow from them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ranks import ROOT, finish, spawn, start
from test_ranks import pytestmark as needs_mpiexec

from demo.rank_cost import lines
from engine.ranks.cost import Cost, Link, PhaseCost, Turn

MODEL = ROOT / "models" / "tiny-qwen3"
LAYERS, HIDDEN, HEADS, VOCAB = 4, 256, 8 * 48, 1536


def phase(compute: float = 2.0, communication: float = 0.0, collectives: int = 1000, size: int = 10**6) -> PhaseCost:
    """Two ranks that compute for so long each, 100 tokens, half a second outside."""
    whole = compute + communication
    return PhaseCost(np.full(2, compute), np.zeros(2), communication, 100, whole + 0.5, collectives, size)


def test_what_takes_a_rank_least_is_communication_and_the_rest_waiting() -> None:
    found = PhaseCost(np.zeros(2), np.zeros(2), seconds=20.0)
    found.add(np.array([[10.0, 10.0], [3.0, 1.0], [2.0, 4.0]]))
    found.add(np.array([[5.0, 4.0]]))
    assert (found.compute.tolist(), found.waiting.tolist(), found.communication) == ([10.0, 9.0], [2.0, 2.0], 3.0)
    assert found.collectives == 2 and found.outside.tolist() == [5.0, 6.0]


def test_waiting_that_is_a_messages_way_is_communication() -> None:
    """Ranks that take turns in coming late: the least of each collective is nothing."""
    for latency, communication in ((1.0, 4.0), (0.5, 2.0), (3.0, 4.0)):
        found = PhaseCost(np.zeros(2), np.zeros(2), seconds=20.0)
        found.add(np.array([[10.0, 10.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 3.0]]))
        assert (found.communication, found.waiting.tolist()) == (0.0, [4.0, 5.0])
        found.add_way(Link(2, latency, 1e9))
        assert (found.communication, found.waiting.tolist()) == (communication, [4 - communication, 5 - communication])
        assert found.outside.tolist() == [10.0, 10.0]
        found.add_way(Link(2, latency / 2, 1e9))
        assert found.communication == communication, "what has been measured stays"


def test_a_link_goes_through_both_messages() -> None:
    link = Link.through(2, (1000, 12e-6), (501_000, 512e-6))
    assert (link.latency, link.bandwidth) == (pytest.approx(11e-6), pytest.approx(1e9))
    assert link.seconds(3, 501_000, 2) == pytest.approx(3 * 11e-6 + 501e-6)
    assert link.seconds(1, 0, 8) == pytest.approx(3 * 11e-6), "log2 of the ranks"
    assert link.seconds(0, 1e9, 4) == pytest.approx(1.5), "3/4 of the bytes instead of 1/2"
    assert link.seconds(9, 1e9, 1) == 0
    swift = Link.through(4, (1000, 2e-6), (2000, 1e-6))
    assert swift.bandwidth == float("inf") and swift.seconds(1, 1e9, 4) == 2e-6


def test_computing_is_shared_and_what_is_outside_stays() -> None:
    link = Link(2, 1e-3, 1e9)
    one, four = phase().forecast(link, 1), phase().forecast(link, 4)
    assert (one.compute, one.communication, one.outside) == pytest.approx((0.04, 0, 0.005))
    assert (four.compute, four.communication, four.outside) == pytest.approx((0.01, 0.02 + 1.5e-5, 0.005))


@pytest.mark.parametrize(("latency", "before", "after"), [(0.9e-3, 4, 8), (2.5e-3, 1, 2), (1e-6, 0, 0)])
def test_where_more_ranks_are_slower_it_says_so_and_what_is_needed(latency: float, before: int, after: int) -> None:
    decode, fits = phase(), {1: True, 2: True, 4: True, 8: True, 16: False}
    cost = Cost(2, {"decode": decode}, Link(2, latency, 1e9), fits, False, 0)
    turn = cost.turn(decode)
    text = "\n".join(lines(cost))
    assert "   16  heads do not divide" in text
    if not after:
        assert turn is None and "more ranks will not be slower: 8 are the fastest of these" in text
        return
    assert isinstance(turn, Turn) and (turn.before.ranks, turn.after.ranks) == (before, after)
    assert f"{after} ranks will be slower than {before}: " in text and "needed: collectives " in text
    quicker = Link(2, latency / turn.factor, 1e9 * turn.factor)
    few, many = (decode.forecast(quicker, ranks).seconds for ranks in (before, after))
    assert many == pytest.approx(few), "as fast as needed, and they are even"


# On ranks.

PROFILING = """
import json, sys
from engine import LLM, SamplingParams

greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
llm = LLM(sys.argv[1], max_batch=2, parallel=sys.argv[3])
expected = llm.generate([[5] * 20, [7, 8, 9]], greedy)
with llm.profile() as outer:
    llm.generate([1, 2, 3, 4], greedy)
    with llm.profile(keep_trace=True) as inner:
        llm.logits(list(range(70)))
        llm.runner.truncate(0, 0), llm.runner.truncate(1, 0)
        llm._scheduler.cached = [[], []]
        found = llm.generate([[5] * 20, [7, 8, 9]], greedy)
    llm.generate([1, 2, 3, 4, 5, 6], greedy)
with llm.profile() as empty:
    pass
with llm.profile() as closed:
    llm.close()
assert [c.token_ids for c in found] == [c.token_ids for c in expected]
assert empty.cost is None and closed.cost is None
with open(sys.argv[2], "w") as file:
    inner.write_trace(file)
seconds = {name: phase.seconds for name, phase in inner.phases.items()}
print(json.dumps([outer.cost.content(), inner.cost.content(), seconds]))
"""


@needs_mpiexec
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("parallel", ["tensor", "allgather"])
def test_shares_of_all_ranks_make_up_their_steps(ranks: int, parallel: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    status, out, err = finish(start(ranks, "-c", PROFILING, str(MODEL), str(trace), parallel))
    assert status == 0, err
    outer, inner, seconds = json.loads(out)
    sums, width, gathers = (LAYERS, HEADS, 0) if parallel == "allgather" else (2 * LAYERS + 1, HIDDEN, 1)
    assert set(inner["phases"]) == set(outer["phases"]) == {"prefill", "decode"}
    expected = {"prefill": (70 + 23, 2 * sums + 4 * gathers, 93, 72), "decode": (10, 5 * (sums + gathers), 10, 10)}
    for name, (tokens, collectives, rows, logits) in expected.items():
        found = inner["phases"][name]
        assert (found["tokens"], found["collectives"]) == (tokens, collectives)
        assert found["size"] == 4 * (rows * width * sums + logits * VOCAB * gathers)
        assert found["seconds"] == pytest.approx(seconds[name])
        assert len(found["compute"]) == ranks and min(found["compute"]) > 0 and min(found["waiting"]) >= 0
        assert found["communication"] > 0 and found["outside"][0] > 0
        parts = np.array([found["compute"], found["waiting"], found["outside"]]).sum(axis=0) + found["communication"]
        assert parts == pytest.approx(found["seconds"])
        forecast = [each["ranks"] for each in found["forecast"]]
        assert forecast == ([1, 2, 4, 8] if gathers else []), "16 ranks cannot share 8 heads"
    assert outer["phases"]["decode"]["tokens"] == 10, "but for the time of the inner one"
    check_trace(json.loads(trace.read_text()), ranks, inner)


def check_trace(trace: dict[str, Any], ranks: int, cost: dict[str, Any]) -> None:
    assert trace["cost"] == cost
    listed = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in listed if e["name"] == "process_name"}
    assert names == {rank: f"rank {rank}" for rank in range(ranks)}
    steps = [e for e in listed if e.get("cat") == "step"]
    counts = [
        Counter(e["name"] for e in listed if e["pid"] == rank and e["name"] in ("all_reduce", "all_gather", "gather"))
        for rank in range(ranks)
    ]
    assert all(count == counts[0] for count in counts) and counts[0]
    for rank in range(1, ranks):
        mine = [e for e in listed if e["pid"] == rank and e["ph"] == "X"]
        ends = [e["ts"] + e["dur"] for e in mine]
        assert all(end <= e["ts"] + 1e-3 for end, e in zip(ends, mine[1:], strict=False)), "one after another"
        assert {e["name"] for e in mine} == {"compute", *counts[0]} and all(e["dur"] >= 0 for e in mine)
        overlap = sum(any(s["ts"] <= e["ts"] <= s["ts"] + s["dur"] for s in steps) for e in mine)
        assert overlap > len(mine) / 2, "on the same clock"


STOPPING = """
import sys, time
import numpy as np
from engine import LLM, RillError, SamplingParams
from engine.ranks import rank_profile

rank_profile.MOST_COLLECTIVES = int(sys.argv[2]) or rank_profile.MOST_COLLECTIVES
greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
llm = LLM(sys.argv[1], max_seq_len=1000)
with llm.profile() as profile:
    llm.generate([1] * 30, greedy)
    for i in range(20):
        stream = llm.stream([i + 1] * 900, greedy)
        time.sleep(0.0005 * i)
        stream.close()
    norm = next(w for w in llm.runner.weights if w.name == "model.layers.2.self_attn.q_norm.weight")
    kept = norm.storage.copy()
    norm.storage[...] = np.nan
    try:
        llm.generate([5, 6, 8], greedy)
    except RillError as error:
        assert "not finite" in str(error)
    norm.storage[...] = kept
    llm.generate([2] * 30, greedy)
found = profile.cost.phases
print(profile.cost.left_out, *(found[name].tokens for name in ("prefill", "decode")),
      *(profile.phases[name].rows for name in ("prefill", "decode")))
"""


@needs_mpiexec
@pytest.mark.parametrize("room", [0, 100])
def test_steps_that_did_not_happen_count_nowhere(room: int) -> None:
    """Stopped on all ranks, or failed on rank 0 alone. Where there is no more room, the rest is left out."""
    status, out, err = finish(start(2, "-c", STOPPING, str(MODEL), str(room)))
    assert status == 0, err
    left_out, prefill, decode, prefill_rows, decode_rows = map(int, out.split())
    if room:
        assert left_out > 0 and (prefill, decode) < (prefill_rows, decode_rows)
    else:
        assert left_out == 0 and (prefill, decode) == (prefill_rows, decode_rows)
    assert prefill >= 30 and decode >= 2


DIFFERING = """
import os, sys
from engine import LLM, SamplingParams
from engine.ranks import rank_profile
rank_profile.hash_of = lambda _: os.environ["PMI_RANK"]
llm = LLM(sys.argv[1])
with llm.profile() as profile:
    llm.generate([1], SamplingParams(max_tokens=2))
print(profile.cost, profile.no_cost)
"""


@needs_mpiexec
def test_ranks_that_do_different_things_are_not_compared() -> None:
    status, out, err = finish(start(2, "-c", DIFFERING, str(MODEL)))
    assert (status, out) == (0, "None the ranks' collectives are not the same\n"), err


@needs_mpiexec
def test_the_program_prints_it() -> None:
    status, _, err = finish(start(2, "-m", "demo.infer", "--raw", "-p", "Once upon a time", "-n", "5", "--profile"))
    assert status == 0, err
    check_lines(err)
    allgather = ("-m", "demo.infer", "--raw", "-p", "Once", "-n", "5", "--profile", "--parallel", "allgather")
    status, _, err = finish(start(2, *allgather))
    assert status == 0 and "a sum between 2 ranks takes" in err and "forecast" not in err, err


def check_lines(err: str) -> None:
    assert "decode, on 2 ranks: µs a token\n" in err and "prefill, on 2 ranks: µs a token of a prompt\n" in err
    assert "forecast: a sum between 2 ranks takes " in err
    assert sum("ranks will" in line for line in err.splitlines()) == 2, "a line a phase"


def test_one_process_knows_nothing_of_it() -> None:
    source = (
        "import sys; from engine import LLM, SamplingParams; llm = LLM(sys.argv[1])\n"
        "with llm.profile() as profile: llm.generate([1], SamplingParams(max_tokens=2))\n"
        "print(profile.cost, {'mpi4py', 'engine.ranks.cost', 'engine.ranks.rank_profile'} & set(sys.modules))"
    )
    status, out, err = finish(spawn([sys.executable, "-c", source, str(MODEL)]))
    assert (status, out) == (0, "None set()\n"), err
