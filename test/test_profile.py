"""Profiles: every node of every step that happened, nothing of those that did not, and all of their time."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import host_devices, isa_pairs

from demo.profile_report import table
from engine import LLM, RillError, SamplingParams, profile
from engine.device import Cancelled, TokenError
from engine.layer import plan_input
from engine.ops.embedding import Embedding
from engine.ops.rmsnorm import RMSNorm
from engine.plan import Plan
from engine.profile import TIMES, Profile, ProfiledStep, Replay
from engine.work import Limits

PROMPTS = [list(range(40, 60)), list(range(100, 103))]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=["cpu", "numpy"])
def llm(request: pytest.FixtureRequest, tiny: Path) -> Iterator[LLM]:
    if request.param == "cpu" and not isa_pairs():
        pytest.skip("no native libraries")
    with LLM(tiny, device=request.param, max_seq_len=600, max_batch=2, threads=2) as model:
        yield model


def profiled(llm: LLM, prompts: list[list[int]], keep_trace: bool = False) -> Profile:
    llm.runner.truncate(0, 0)
    llm.runner.truncate(1, 0)
    llm._scheduler.cached = [[], []]
    with llm.profile(keep_trace) as found:
        llm.generate(prompts, GREEDY)
    return found


def events(found: Profile) -> list[dict[str, Any]]:
    file = io.StringIO()
    found.write_trace(file)
    listed: list[dict[str, Any]] = json.loads(file.getvalue())["traceEvents"]
    return listed


def test_every_node_of_every_step_is_counted(llm: LLM) -> None:
    found = profiled(llm, PROMPTS)
    prefill, decode = found.phases["prefill"], found.phases["decode"]
    assert (prefill.steps, prefill.rows, decode.steps, decode.rows) == (1, 23, 5, 10)
    for phase in (prefill, decode):
        ops = phase.by_op(None)
        assert {each.op: each.calls for each in ops} == {
            name: phase.steps * sum(node.op.name == name for node in llm.runner.plan.nodes)
            for name in {node.op.name for node in llm.runner.plan.nodes}
        }
        times = [each.seconds for each in ops]
        assert min(times) > 0 and times == sorted(times, reverse=True)
        outside = phase.barriers + phase.starting + phase.python
        assert sum(times) + outside == pytest.approx(phase.seconds), "all of a step is in one line or another"
        assert phase.starting > 0 and phase.python > 0
        assert all(0 <= each.waiting < 1 for each in ops)


def test_a_node_lasts_from_the_first_thread_to_the_last_one() -> None:
    """Two nodes on three threads, of which one does not run and one comes late; barriers end where a thread goes on."""
    times = np.zeros((3, 2), TIMES)
    times[0] = [(10, 11, 21), (21, 30, 41)]
    times[2] = [(14, 20, 23), (23, 40, 44)]
    spent, barrier, waiting = Replay(0, 1, times).spent()
    assert (spent.tolist(), barrier.tolist(), waiting.tolist()) == ([6, 19], [1, 1], [3.0, 5.0])


def test_a_step_is_prefill_where_any_sequence_has_several_rows() -> None:
    spans = {"decode": [range(3, 4), range(0, 1)], "prefill": [range(3, 4), range(9)]}
    assert {phase: ProfiledStep(0, 1, spans[phase], []).phase for phase in spans} == {phase: phase for phase in spans}


def test_work_is_that_of_the_rows_at_their_positions(llm: LLM) -> None:
    found = profiled(llm, PROMPTS)
    prefill, decode = found.phases.values()
    expected = prefill.kinds.total([range(20), range(3)], 2)
    assert sum(each.work.flops for each in prefill.by_op(None)) == expected.flops
    assert sum(each.work.bytes for each in prefill.by_op(None)) == expected.bytes
    steps = [decode.kinds.total([range(20 + i, 21 + i), range(3 + i, 4 + i)], 2) for i in range(5)]
    assert sum(each.work.memory for each in decode.by_op(None)) == sum(work.memory for work in steps)
    assert found.dtypes() == set(steps[0].operations)


def test_the_least_time_is_that_of_the_tighter_limit(llm: LLM) -> None:
    found = profiled(llm, PROMPTS)
    limits = Limits(1e6, dict.fromkeys(found.dtypes(), 1e3))
    ops = {each.op: each for each in found.phases["prefill"].by_op(limits)}
    assert ops["matmul"].least == pytest.approx(ops["matmul"].work.flops / 1e3)
    assert ops["swiglu"].least == pytest.approx(ops["swiglu"].work.bytes / 1e6)
    assert all(each.least is None for each in found.phases["prefill"].by_op(None))


def test_a_profile_changes_no_token_and_ends(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, GREEDY)
    with llm.profile() as found:
        completions = llm.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    before = found.phases["decode"].steps
    llm.generate(PROMPTS, GREEDY)
    assert found.phases["decode"].steps == before and llm.runner.plan.profile is None


def test_a_stopped_step_counts_nowhere(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    program = llm.runner.plan.program
    assert program is not None
    replays = []

    def stopped_once(first: int, last: int, times: np.ndarray | None = None) -> None:
        replays.append(first)
        type(program).run(program, first, last, times)
        if len(replays) == 3:
            raise Cancelled

    monkeypatch.setattr(program, "run", stopped_once)
    found = profiled(llm, PROMPTS, keep_trace=True)
    assert found.stopped == 1 and len(replays) == 7
    assert [step.spans[0].start for step in found.trace] == [0, 20, 21, 22, 23, 24]


def test_a_failed_request_leaves_the_profile_sound(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with llm.profile() as found:
        with monkeypatch.context() as patch, pytest.raises(RillError):
            patch.setattr(llm.runner.plan.program, "run", lambda *_: (_ for _ in ()).throw(RillError("broken")))
            llm.generate([9, 9, 9], GREEDY)
        llm.generate([8, 8, 8], GREEDY)
    assert found.phases["decode"].steps == 5 and found.stopped == 1


def test_waiting_for_the_next_prompt_is_no_step(llm: LLM) -> None:
    with llm.profile(keep_trace=True) as found:
        llm.generate(PROMPTS[0], GREEDY)
        time.sleep(0.05)
        llm.generate(PROMPTS[1], GREEDY)
    gaps = [b.begin - a.end for a, b in zip(found.trace, found.trace[1:], strict=False)]
    assert min(gaps) >= 0 and sum(gap >= 50_000_000 for gap in gaps) == 1


def test_more_rows_of_logits_are_replays_of_the_same_step(llm: LLM) -> None:
    with llm.profile() as found:
        llm.logits(list(range(70)))
    ops = {each.op: each.calls for each in found.phases["prefill"].by_op(None)}
    assert found.phases["prefill"].steps == 1 and ops["logits"] == 3 and ops["embedding"] == 1
    assert sum(each.work.flops for each in found.phases["prefill"].by_op(None)) == pytest.approx(
        found.phases["prefill"].kinds.total([range(70)], 70).flops
    )


# The trace.


def test_a_trace_has_an_event_a_node_inside_its_step(llm: LLM) -> None:
    found = profiled(llm, PROMPTS, keep_trace=True)
    listed = events(found)
    assert {e["ph"] for e in listed} == {"M", "X"}
    names = {e["tid"]: e["args"]["name"] for e in listed if e["name"] == "thread_name"}
    assert list(names.values()) == ["steps", *(f"thread {i}" for i in range(len(names) - 1))]
    steps = [e for e in listed if e.get("cat") == "step"]
    assert [(e["name"], e["args"]["phase"], e["args"]["sequences"]) for e in steps] == [
        ("prefill 23", "prefill", 2), *[("decode 2", "decode", 2)] * 5
    ]  # fmt: skip
    assert steps[1]["args"]["positions"] == [[20, 20], [3, 3]] and steps[0]["ts"] == 0
    nodes = llm.runner.plan.nodes
    for tid in range(1, len(names)):
        mine = [e for e in listed if e.get("cat") == "node" and e["tid"] == tid]
        assert [e["args"]["node"] for e in mine] == list(range(len(nodes))) * len(steps)
        assert all(e["name"] == nodes[e["args"]["node"]].op.name for e in mine)
        assert all(e["args"]["layer"] == nodes[e["args"]["node"]].label for e in mine)
        ends = [e["ts"] + e["dur"] for e in mine]
        assert all(e["dur"] >= 0 and e["args"]["wait_us"] >= 0 for e in mine)
        assert all(end <= e["ts"] + 1e-3 for end, e in zip(ends, mine[1:], strict=False)), "one after another"
        for i, step in enumerate(steps):
            part = mine[i * len(nodes) : (i + 1) * len(nodes)]
            assert step["ts"] <= part[0]["ts"] and part[-1]["ts"] + part[-1]["dur"] <= step["ts"] + step["dur"]


def test_a_trace_ends_where_viewers_would_give_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MOST_EVENTS", 3 * (1 + found_threads(llm) * len(llm.runner.plan.nodes)))
    found = profiled(llm, PROMPTS, keep_trace=True)
    assert len(found.trace) == 3 and found.left_out == 3 and found.phases["decode"].steps == 5
    without = profiled(llm, PROMPTS)
    assert without.trace == [] and without.left_out == 0
    assert all(event["ph"] == "M" for event in events(without))


def found_threads(llm: LLM) -> int:
    return int(getattr(llm.device, "threads", 1))


# The devices.


def test_times_are_in_order_and_end_where_the_plan_fails() -> None:
    for device in (*host_devices(), isa_pairs()[-1][1]):
        embedding = Embedding(np.ones((4, 8), np.float32), device=device)
        norm = RMSNorm(np.ones(8, np.float32), 1e-6, device=device)
        device.load([embedding.table, norm.weight])
        plan = Plan(device)
        rows = plan_input(plan, np.array([2], np.int32), None, "rows")
        token = plan_input(plan, np.array([1, 4], np.int32), rows, "token")
        plan.keep(norm.record(embedding.record(token)))
        plan.lower()
        assert plan.program is not None
        times = np.zeros((getattr(device, "threads", 1), 2), TIMES)
        before = time.perf_counter_ns()
        with pytest.raises(TokenError):
            plan.program.run(0, 2, times)
        assert not times["end"][:, 1].any(), "the second node did not run"
        device.download(token)
        token.storage[1] = 3
        plan.program.run(0, 2, times)
        after = time.perf_counter_ns()
        flat = np.stack([times["begin"], times["end"], times["passed"]], axis=-1).reshape(len(times), -1)
        assert (np.diff(flat, axis=1) >= 0).all() and (flat > before).all() and (flat < after).all()


# The table.


def test_the_table_has_a_line_an_op_and_the_time_outside(llm: LLM) -> None:
    found = profiled(llm, PROMPTS)
    phase = found.phases["decode"]
    head, columns, *lines = table("decode", phase, Limits(1e9, dict.fromkeys(found.dtypes(), 1e9)))
    assert head.startswith("decode: 10 rows in 5 steps, ") and columns.split()[:3] == ["op", "calls", "ms"]
    assert [line.split()[0] for line in lines] == [
        *(each.op for each in phase.by_op(None)), "barriers", "thread", "Python"
    ]  # fmt: skip
    matmul = next(line.split() for line in lines if line.split()[0] == "matmul")
    assert len(matmul) == 9 and matmul[7].endswith("%")
    assert len({len(line) for line in lines if "a step" not in line}) == 1
