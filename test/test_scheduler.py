"""What goes wrong with one request stays its own, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, RillError, SamplingParams, UsageError
from engine.verify import Comparison, verify

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)


@pytest.fixture
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, max_seq_len=1200, max_batch=3) as model:
        yield model


class BrokenDecoder:
    """Stands in for a decoder whose library fails in the middle of a text."""

    finished = False

    def __init__(self, when: str, error: BaseException) -> None:
        self.when, self.error = when, error

    def push(self, token: int) -> str:
        if self.when == "push":
            raise self.error
        return "x"

    def flush(self) -> str:
        raise self.error


class Panic(BaseException):
    pass


@pytest.mark.parametrize("when", ["push", "flush"])
@pytest.mark.parametrize("error", [ValueError("broken"), Panic("broken")])
def test_a_broken_decoder_fails_its_own_request_only(llm: LLM, when: str, error: BaseException) -> None:
    expected = llm.generate([5, 6, 7], GREEDY).token_ids
    broken, sound = (llm._request(prompt, GREEDY) for prompt in ([1, 2], [5, 6, 7]))
    broken.decoder = BrokenDecoder(when, error)
    llm._scheduler.submit([broken, sound])
    assert broken.done.wait(60) and sound.done.wait(60)
    with pytest.raises((ValueError, RillError), match="broken"):
        broken.completion()
    assert sound.completion().token_ids == expected
    assert llm.generate([5, 6, 7], GREEDY).token_ids == expected


def test_requests_that_come_and_go_do_not_starve_a_long_prompt(llm: LLM) -> None:
    """Each cancellation stops the step at hand; the steps get smaller until they fit between two of them."""
    running = threading.Event()
    run = llm.runner.plan.run

    def slow(first: int = 0, last: int | None = None) -> None:
        running.set()
        rows = int(llm.runner.step.arrays["rows"][0])
        for _ in range(rows // 8):  # as long as it has rows, and stopped like a native replay
            time.sleep(0.001)
            if llm.runner.device.control.cancel:  # type: ignore[attr-defined]
                break
        run(first, last)

    llm.runner.plan.run = slow  # type: ignore[method-assign]
    long = llm._request(list(range(256)) * 4, SamplingParams(temperature=0, max_tokens=1))
    llm._scheduler.submit([long])
    for _ in range(1500):
        if long.done.is_set():
            break
        passing = llm._request([1, 2], ENDLESS)
        running.clear()
        llm._scheduler.submit([passing])
        running.wait(0.05)
        time.sleep(0.02)
        llm._scheduler.cancel([passing])
    assert long.done.is_set()
    assert len(long.completion().token_ids) == 1


def test_closing_ends_a_request_that_is_just_being_admitted(tiny: Path) -> None:
    model = LLM(tiny, max_seq_len=1200, max_batch=1)
    admitting, closing = threading.Event(), threading.Event()
    reusable = model._scheduler._reusable

    def slowly(slot: int, request: Any) -> int:
        admitting.set()
        closing.wait(60)
        return reusable(slot, request)

    model._scheduler._reusable = slowly  # type: ignore[method-assign]
    request = model._request([1, 2], ENDLESS)
    model._scheduler.submit([request])
    admitting.wait(60)
    closer = threading.Thread(target=model.close)
    closer.start()
    while not model._scheduler.closed:
        time.sleep(0.001)
    closing.set()
    closer.join(60)
    assert request.completion().finish_reason == "cancelled"
    assert len(request.completion().token_ids) < 600


def test_interleaved_chats_keep_their_slots(llm: LLM) -> None:
    header = [250, 251, 252]
    chat_a, chat_b = header + list(range(200)), header + list(range(200, 100, -1))
    a = llm.generate(chat_a, GREEDY)
    b = llm.generate(chat_b, GREEDY)
    llm.logits(header)
    next_a = llm.generate(chat_a + a.token_ids + [9], GREEDY)
    next_b = llm.generate(chat_b + b.token_ids + [9], GREEDY)
    assert next_a.timings.cached_tokens >= len(chat_a)
    assert next_b.timings.cached_tokens >= len(chat_b)


def test_what_a_cancelled_prompt_left_behind_is_not_trusted(tiny: Path) -> None:
    """A prompt whose first chunk holds NaN is cancelled before any logits showed it."""
    with LLM(tiny, max_seq_len=1200, max_batch=1) as llm:
        expected = llm.generate(list(range(100)), GREEDY).token_ids
        table = llm.runner.model.embedding.table
        intact = table.storage.copy()
        panel, lane = divmod(200, 16)
        table.storage.view(np.uint16)[(panel * llm.config.hidden_size // 2 * 16 + lane) * 2] = 0x7FFF  # NaN
        request = llm._request([*range(90), 200, *range(90, 100)] * 6, GREEDY)
        done_steps = []
        run = llm.runner.run
        llm.runner.run = lambda *a: (run(*a), done_steps.append(1), llm._scheduler.cancel([request]))  # type: ignore
        llm._scheduler.submit([request])
        assert request.done.wait(60)
        llm.runner.run = run  # type: ignore[method-assign]
        table.storage[...] = intact
        assert request.completion().finish_reason == "cancelled" and len(done_steps) == 1
        assert llm.generate(list(range(100)), GREEDY).token_ids == expected


def test_logprobs_belong_to_the_token_ids(llm: LLM) -> None:
    probe = llm.generate([3, 4], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    llm.eos_ids = frozenset({probe.token_ids[-1]})
    done = llm.generate([3, 4], SamplingParams(temperature=0, max_tokens=50, logprobs=1))
    assert done.finish_reason == "stop" and done.logprobs is not None
    assert [entry.token_id for entry in done.logprobs] == done.token_ids


def test_two_readers_of_a_stream_both_end(llm: LLM) -> None:
    stream = llm.stream([1, 2], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    readers = [threading.Thread(target=lambda: list(stream)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert not any(reader.is_alive() for reader in readers)


@pytest.mark.parametrize("prompt", [
    None, 5, b"x", {"a": 1}, ["a", None], [b"x"], [[1.5, 2]], [["1"]], [[True]], [1, 2.5],
    [np.zeros((2, 2), np.int32)],
])  # fmt: skip
def test_prompts_of_the_wrong_type_are_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(UsageError, match="prompt"):
        llm.generate(prompt, GREEDY)


def test_arrays_are_prompts(llm: LLM) -> None:
    expected = llm.generate([1, 2], GREEDY).token_ids
    assert llm.generate(np.array([1, 2]), GREEDY).token_ids == expected  # type: ignore[call-overload]
    both: Any = [np.array([1, 2]), (1, 2)]
    assert [c.token_ids for c in llm.generate(both, GREEDY)] == [expected, expected]


@pytest.mark.parametrize("messages", ["hello", None, ["x"], 3])
def test_messages_of_the_wrong_type_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(UsageError, match="messages"):
        llm.chat(messages, GREEDY)


def test_nothing_that_the_head_writes_lies_where_it_reads(llm: LLM) -> None:
    """The last two nodes are replayed for more rows of logits, on the same hidden states."""
    nodes = llm.runner.plan.nodes[llm.runner.head :]
    hidden = nodes[0].tensors["x"].owner.storage
    for node in nodes:
        for tensor in node.written:
            assert not np.shares_memory(hidden, tensor.owner.storage)


def test_verify_sees_a_single_wrong_weight(tiny: Path) -> None:
    assert verify(str(tiny), [1, 2, 3], 1).passed
    small: dict[str, Any] = {"max_seq_len": 64, "max_batch": 1}
    with LLM(tiny, **small) as llm, LLM(tiny, device="numpy", **small) as oracle:
        weight = llm.runner.model.blocks[1].mlp.down.matrices[0]
        weight.storage.view(np.uint16)[7] ^= 0x8000
        comparison = Comparison(llm.runner, oracle.runner)
        comparison.run([1, 2, 3], 0)
        assert not comparison.report.passed
        assert weight.name in comparison.report.lines[-1]


def test_verify_names_the_node_that_is_wrong(tiny: Path) -> None:
    small: dict[str, Any] = {"max_seq_len": 64, "max_batch": 1}
    with LLM(tiny, **small) as llm, LLM(tiny, device="numpy", **small) as oracle:
        program: Any = llm.runner.plan.program
        index = next(i for i, n in enumerate(llm.runner.plan.nodes) if (n.op.struct or n.op.name) == "attention")
        program.structs[index].scale *= 1.1
        comparison = Comparison(llm.runner, oracle.runner)
        comparison.run(list(range(20)), 0)
        assert f"node {index} streaming_attention" in comparison.report.lines[-1]
