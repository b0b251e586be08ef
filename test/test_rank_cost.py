"""What a token costs each rank: shares that make up the whole, and forecasts that follow from them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_ranks import ROOT, finish, spawn, start
from test_ranks import pytestmark as needs_mpiexec

from demo.rank_cost import lines, order
from engine.ranks.cost import Cost, Line, Link, PhaseCost, Shared, Turn
from engine.ranks.rank_profile import largest_share

MODEL = ROOT / "models" / "tiny-qwen3"
LAYERS, HIDDEN, HEADS, VOCAB = 4, 256, 8 * 48, 1536


ALONE = np.array([np.nan])  # the way of a collective that is no message


def phase(compute: float = 2.0, collectives: int = 1000, size: int = 10**6, blocks: int = 1) -> PhaseCost:
    """Two ranks that compute for so long each, 100 tokens in as many steps, half a second outside."""
    found = PhaseCost(blocks, 2 // blocks)
    found.compute += compute
    found.replays += compute
    found.tokens = found.steps = found.runs = 100
    found.seconds = compute + 0.5
    found.shared[0].count, found.shared[0].size = collectives, size
    return found


def test_what_takes_a_rank_least_is_communication_and_the_rest_waiting() -> None:
    found = PhaseCost(1, 2)
    found.seconds = 20.0
    found.add(0, np.array([[10.0, 10.0], [3.0, 1.0], [2.0, 4.0]]), ALONE.repeat(2), 100)
    found.add(0, np.array([[5.0, 4.0]]), ALONE[:0], 0)
    assert (found.compute.tolist(), found.communication.tolist()) == ([10.0, 9.0], [3.0, 3.0])
    assert found.shared[0].waiting.tolist() == [2.0, 2.0]
    assert (found.collectives, found.size) == (2, 100)
    assert found.outside.tolist() == [5.0, 5.0]
    assert found.waiting.tolist() == [2.0, 3.0], "and for the next step, where rank 0 is in a replay still"


def test_waiting_that_is_a_messages_way_is_communication() -> None:
    """Ranks that take turns in coming late: the least of each collective is nothing."""
    for latency, communication in ((1.0, 4.0), (0.5, 2.0), (3.0, 4.0)):
        found = Shared(np.zeros(2))
        found.add(np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 3.0]]), 0)
        assert (found.communication, found.waiting.tolist()) == (0.0, [4.0, 5.0])
        found.add_way(Link(2, latency, 1e9))
        assert (found.communication, found.waiting.tolist()) == (communication, [4 - communication, 5 - communication])
        found.add_way(Link(2, latency / 2, 1e9))
        assert found.communication == communication, "what has been measured stays"


def test_a_stage_waits_for_the_others_and_a_message_takes_no_longer_than_its_way() -> None:
    """Rank 0 is the last stage: it receives while rank 1 computes, which waits for the next step while rank 0 does."""
    found = PhaseCost(2, 1)
    found.seconds = 20.0
    found.add(0, np.array([[16.0], [12.0]]), np.array([2.0]), 0)
    found.add(1, np.array([[10.0], [0.5]]), np.array([2.0]), 0)
    assert found.compute.tolist() == [4.0, 9.5]
    assert found.communication.tolist() == [2.0, 0.5], "a send that returns early took no longer"
    assert found.outside.tolist() == [4.0, 4.0]
    assert found.waiting.tolist() == [10.0, 6.0]
    found.add(0, np.array([[3.0], [1.0]]), np.array([2.0]), 0)
    assert found.communication.tolist() == [3.0, 0.5], "nor does one that was there already"


def test_ranks_of_a_stage_share_its_collectives() -> None:
    found = PhaseCost(2, 2)
    found.seconds = 40.0
    found.add(0, np.array([[30.0, 30.0], [20.0, 21.0], [2.0, 1.0]]), np.array([3.0, np.nan]), 8)
    found.add(1, np.array([[20.0, 18.0], [4.0, 6.0], [1.0, 0.0]]), np.array([np.nan, 3.0]), 8)
    assert found.compute.tolist() == [8.0, 8.0, 15.0, 12.0]
    assert found.communication.tolist() == [4.0, 4.0, 5.0, 4.0]
    assert found.outside.tolist() == [10.0] * 4
    assert found.waiting.tolist() == [18.0, 18.0, 10.0, 14.0]
    assert [(shared.count, shared.size) for shared in found.shared] == [(1, 8)] * 2


def test_a_link_goes_through_both_messages() -> None:
    link = Link.through(2, (1000, 12e-6), (501_000, 512e-6))
    assert (link.latency, link.bandwidth) == (pytest.approx(11e-6), pytest.approx(1e9))
    assert link.seconds(3, 501_000, 2) == pytest.approx(3 * 11e-6 + 501e-6)
    assert link.seconds(1, 0, 8) == pytest.approx(3 * 11e-6), "log2 of the ranks"
    assert link.seconds(0, 1e9, 4) == pytest.approx(1.5), "3/4 of the bytes instead of 1/2"
    assert link.seconds(9, 1e9, 1) == 0
    swift = Link.through(4, (1000, 2e-6), (2000, 1e-6))
    assert swift.bandwidth == float("inf") and swift.seconds(1, 1e9, 4) == 2e-6


def test_the_mean_of_links_takes_as_long_as_all_of_them() -> None:
    links = [Link(2, 1e-3, 1e6), Link(2, 3e-3, 4e6), Link(2, 2e-3, float("inf"))]
    assert Link.mean(links).seconds(3, 3000, 2) == pytest.approx(sum(link.seconds(1, 1000, 2) for link in links))
    assert Link.mean(links[2:]).bandwidth == float("inf")


def test_computing_is_shared_and_what_is_outside_stays() -> None:
    link = Link(2, 1e-3, 1e9)
    one, four = phase().on_ranks(link, 1, 1), phase().on_ranks(link, 4, 0.25)
    assert (one.compute, one.communication, one.outside) == pytest.approx((0.04, 0, 0.005))
    assert (four.compute, four.communication, four.outside) == pytest.approx((0.01, 0.02 + 1.5e-5, 0.005))


def test_a_token_passes_all_stages_and_pieces_of_a_prompt_follow_each_other() -> None:
    line = Line([Link(2, 1e-3, 1e6)], Link(2, 5e-3, float("inf")), 1000)
    found = phase(blocks=2)
    one, four = found.on_stages(line, 1, 1), found.on_stages(line, 4, 0.25)
    assert (one.compute, one.communication, one.outside) == pytest.approx((0.04, 0, 0.005))
    assert (four.compute, four.outside) == pytest.approx((0.04, 0.005)), "one stage works at a time"
    assert four.communication == pytest.approx(3 * 2e-3 + 2 * 5e-3), "three boundaries; two rounds to tell of a step"
    for pieces in (1, 2, 5, 100):
        found.runs = 100 // pieces
        for stages in (1, 2, 4, 16):
            each = found.on_stages(line, stages, 1 / stages)
            assert each.compute == pytest.approx(0.04 * (pieces + stages - 1) / (pieces * stages))
            passed = (pieces + stages - 2) / pieces if stages > 1 else 0
            told = (stages.bit_length() - 1) / pieces * 5e-3
            assert each.communication == pytest.approx(passed * 2e-3 + told)
    assert found.on_stages(line, 4, 0.5).compute == pytest.approx(0.04 * (1 + 99 * 0.5) / 100), "the slowest decides"


def test_stages_of_several_ranks_keep_their_collectives() -> None:
    line = Line([Link(2, 1e-3, float("inf"))], Link(4, 5e-3, float("inf")), 1000)
    found = PhaseCost(2, 2)
    found.compute += 2.0
    found.shared[0].communication, found.shared[1].communication = 1.0, 3.0
    found.tokens = found.steps = found.runs = 100
    two = found.on_stages(line, 2, 0.5)
    assert (two.compute, two.communication) == pytest.approx((0.04, 0.04 + 1e-3 + 5e-3))


@pytest.mark.parametrize("runs", [100, 1])
def test_it_says_whether_stages_gain_anything(runs: int) -> None:
    line = Line([Link(2, 1e-4, 1e9)], Link(2, 1e-4, float("inf")), 1000)
    prompt = phase(blocks=2)
    prompt.runs = runs
    shares: dict[int, float | None] = {1: 1.0, 2: 0.5, 4: 0.25, 8: None}
    cost = Cost(2, 2, {"prefill": prompt}, None, line, shares, False, 0)
    text = "\n".join(lines(cost))
    assert "prefill, on 2 stages" in text and "stages, one after the other: rank 1, rank 0\n" in text
    assert "      8   fewer layers" in text
    if runs == 1:
        assert "100 pieces of a prompt at work at once" in text
        assert "more stages will not be slower: 4 are the fastest of these" in text
    else:
        assert "2 stages will be slower than 1: they save no computing, for one works at a time" in text
        turn = cost.turn(prompt)
        assert turn and turn.saved == 0 and turn.factor == float("inf")


def test_the_stage_with_most_layers_decides() -> None:
    config = SimpleNamespace(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=64,
                             vocab_size=100)  # fmt: skip
    found = {count: largest_share(config, count, stages=True) for count in (1, 2, 3, 4, 6, 7)}  # type: ignore[arg-type]
    assert found == {1: 1, 2: 1 / 2, 3: 1 / 3, 4: 1 / 3, 6: 1 / 6, 7: None}
    found = {count: largest_share(config, count, stages=False) for count in (1, 3, 8, 16)}  # type: ignore[arg-type]
    assert found == {1: 1, 3: None, 8: 1 / 8, 16: None}, "heads"


def test_the_last_stage_is_that_of_rank_0() -> None:
    line = Line([Link(2, 1e-4, 1e9)] * 2, Link(6, 1e-4, float("inf")), 1000)
    assert order(Cost(6, 3, {}, None, line, {}, False, 0)) == "ranks 2 to 3, ranks 4 to 5, ranks 0 to 1"


@pytest.mark.parametrize(("latency", "before", "after"), [(0.9e-3, 4, 8), (2.5e-3, 1, 2), (1e-6, 0, 0)])
def test_where_more_ranks_are_slower_it_says_so_and_what_is_needed(latency: float, before: int, after: int) -> None:
    decode, shares = phase(), {1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125, 16: None}
    cost = Cost(2, 1, {"decode": decode}, Link(2, latency, 1e9), None, shares, False, 0)
    turn = cost.turn(decode)
    text = "\n".join(lines(cost))
    assert "   16  heads do not divide" in text
    if not after:
        assert turn is None and "more ranks will not be slower: 8 are the fastest of these" in text
        return
    assert isinstance(turn, Turn) and (turn.before.ranks, turn.after.ranks) == (before, after)
    assert f"{after} ranks will be slower than {before}: " in text and "needed: collectives " in text
    quicker = Link(2, latency / turn.factor, 1e9 * turn.factor)
    few, many = (decode.on_ranks(quicker, ranks, 1 / ranks).seconds for ranks in (before, after))
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
        assert min(found["communication"]) > 0 and found["outside"][0] > 0
        assert shares_of(found).sum(axis=0) == pytest.approx(found["seconds"])
        forecast = [each["ranks"] for each in found["forecast"]]
        assert forecast == ([1, 2, 4, 8] if gathers else []), "16 ranks cannot share 8 heads"
    assert outer["phases"]["decode"]["tokens"] == 10, "but for the time of the inner one"
    check_trace(json.loads(trace.read_text()), ranks, inner)


def shares_of(found: dict[str, Any]) -> np.ndarray:
    """Seconds [4, ranks]."""
    return np.array([found[name] for name in ("compute", "communication", "waiting", "outside")])


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


SLEEPS = (0.02, 0.01)  # seconds that the first stage and the last one take longer over a replay

STAGES = f"""
import json, sys, time
from engine import LLM, SamplingParams
from engine.ranks.segments import Segments

run = Segments.run
def slow(self, first, last, times=None):
    slows = last > first and slowly
    time.sleep({SLEEPS[0]} if slows and self.comm.stage.is_first else 0)
    run(self, first, last, times)
    time.sleep({SLEEPS[1]} if slows and self.comm.stage.is_last else 0)
Segments.run, slowly = slow, True

greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
llm = LLM(sys.argv[1], max_batch=2, pp=2)
with llm.profile(keep_trace=True) as profile:
    llm.logits(list(range(70)))
    llm.generate([[5] * 20, [7, 8, 9]], greedy)
with llm.profile() as long:
    llm.generate([[i] * 1000 for i in (1, 2)], SamplingParams(temperature=0, max_tokens=1))
ring = LLM(sys.argv[1], attention="streaming", window=40, sink=4, pp=2)
with ring.profile() as short:
    ring.generate([1] * 1100, SamplingParams(temperature=0, max_tokens=1))
with open(sys.argv[2], "w") as file:
    profile.write_trace(file)
print(json.dumps([each.cost.content() for each in (profile, long, short)]))
"""


@needs_mpiexec
@pytest.mark.parametrize("width", [1, 2])
def test_shares_of_stages_make_up_their_steps(width: int, tmp_path: Path) -> None:
    trace, ranks = tmp_path / "trace.json", 2 * width
    status, out, err = finish(start(ranks, "-c", STAGES, str(MODEL), str(trace)))
    assert status == 0, err
    cost, long, short = json.loads(out)
    assert (cost["ranks"], cost["stages"], cost["link"]) == (ranks, 2, None)
    line = cost["line"]
    assert line["row"] == 4 * HIDDEN and len(line["boundaries"]) == 1
    way, bandwidth = line["boundaries"][0]["latency"], line["boundaries"][0]["bandwidth"] or float("inf")
    assert 0 < way < 1 and line["told"]["latency"] > 0
    for name, tokens, steps in (("prefill", 93, 2), ("decode", 10, 5)):
        found = cost["phases"][name]
        assert (found["tokens"], found["steps"], found["runs"]) == (tokens, steps, steps)
        sums = (2 * LAYERS + 1) * steps if width > 1 else 0
        gathers = {"prefill": 4, "decode": 5}[name] if width > 1 else 0
        assert found["collectives"] == sums + gathers
        shares = shares_of(found)
        assert shares.sum(axis=0) == pytest.approx(found["seconds"]) and shares.min() >= 0
        compute, communication, waiting, _ = shares
        last, first = slice(0, width), slice(width, ranks)
        for mine, own, others in ((first, *SLEEPS), (last, *SLEEPS[::-1])):
            assert compute[mine].min() >= own * steps
            assert waiting[mine].min() >= 0.5 * others * steps, "most of what the other stage computes"
        if width == 1:
            assert communication.max() <= steps * way + tokens * line["row"] / bandwidth + 1e-9
        one, two, four = found["forecast"]
        assert [each["ranks"] for each in (one, two, four)] == [1, 2, 4], "of 4 layers"
        assert one["compute"] == two["compute"] == four["compute"] == pytest.approx(compute.sum() / width / tokens)
        assert one["communication"] < two["communication"] < four["communication"]
    counts = [(cost["phases"]["prefill"]["steps"], cost["phases"]["prefill"]["runs"]) for cost in (long, short)]
    assert counts == [(4, 1), (3, 3)], "pieces of 512 follow at once, but where pages are recycled"
    check_trace_of_stages(json.loads(trace.read_text()), width, cost)


BOUNDARIES = """
import json, sys
from engine import LLM, SamplingParams
from engine.ranks import rank_profile
from engine.ranks.cost import Line, Link

ways = [Link(2, seconds, float("inf")) for seconds in (1e-12, 1e3, 1e-12)]
rank_profile.measure_line = lambda *_: Line(ways, Link(4, 1.0, float("inf")), 1)
llm = LLM(sys.argv[1], pp=4)
with llm.profile() as profile:
    llm.generate([1], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
print(json.dumps(profile.cost.content()["phases"]["decode"]["communication"]))
"""


@needs_mpiexec
def test_each_boundary_has_a_way_of_its_own() -> None:
    """Only from the second stage to the third, which are ranks 2 and 3, a message may take as long as it did."""
    status, out, err = finish(start(4, "-c", BOUNDARIES, str(MODEL)))
    assert status == 0, err
    last, first, second, third = json.loads(out)
    assert max(last, first) < 1e-9 < 1e-6 < min(second, third) and third > second, "a receive waits, a send does not"


def check_trace_of_stages(trace: dict[str, Any], width: int, cost: dict[str, Any]) -> None:
    assert trace["cost"] == cost
    for rank in range(2 * width):
        mine = [e for e in trace["traceEvents"] if e["pid"] == rank and e["ph"] == "X" and e["cat"] != "step"]
        found = Counter(e["name"] for e in mine if e["name"] in ("send", "receive"))
        assert found == {"receive" if rank < width else "send": 7}
        if rank:
            ends = [e["ts"] + e["dur"] for e in mine]
            assert all(end <= e["ts"] + 1e-3 for end, e in zip(ends, mine[1:], strict=False)), "one after another"
            layers = {e["args"]["layer"].split(".")[2] for e in mine if "layers" in e["args"].get("layer", "")}
            assert layers == (({"0", "1"} if rank >= width else {"2", "3"}) if width > 1 else set())


STOPPING = """
import sys, time
import numpy as np
from engine import LLM, RillError, SamplingParams
from engine.ranks import rank_profile

rank_profile.MOST_COLLECTIVES = int(sys.argv[2]) or rank_profile.MOST_COLLECTIVES
greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
llm = LLM(sys.argv[1], max_seq_len=1000, pp=int(sys.argv[3]))
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
@pytest.mark.parametrize(("room", "pp"), [(0, 1), (100, 1), (0, 2), (100, 2)])
def test_steps_that_did_not_happen_count_nowhere(room: int, pp: int) -> None:
    """Stopped on all ranks, or failed on rank 0 alone. Where there is no more room, the rest is left out."""
    status, out, err = finish(start(2, "-c", STOPPING, str(MODEL), str(room), str(pp)))
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
