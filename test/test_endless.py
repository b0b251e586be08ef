"""Sequences without end: sinks and a sliding window over pages that are used again and again."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_decoder import ReferenceDecoder

from demo import endless
from engine import LLM, RillError, SamplingParams, UsageError
from engine.device import Cancelled
from engine.device.cpu import available_isas
from engine.kvcache import PAGE
from engine.ops.sample import penalised
from engine.step import History, Sampled, Segment, Want
from engine.verify import verify
from tools.golden_cases import QWEN2, QWEN3, SCALES, TIED, old_style, sizes
from tools.random_weights import random_tensors, write_json, write_weights

SINK, WINDOW = 4, 40
STREAMING: dict[str, Any] = {"attention": "streaming", "sink": SINK, "window": WINDOW, "max_seq_len": 64, "threads": 1}
DRAWN = SamplingParams(temperature=0.9, top_k=50, seed=7, max_tokens=150, ignore_eos=True, logprobs=2)
SHORT = replace(DRAWN, max_tokens=20)
TARGETS = [{"device": "cpu", "isa": isa} for isa in available_isas()] + [{"device": "numpy"}]
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: "-".join(target.values()))
every_isa = pytest.mark.parametrize("isa", available_isas())
CLOSE = 1e-4  # standard deviations of the logits: float32 against float64

SHAPE = TIED | sizes(64, 96, 3, 4, 2, 16, 300) | old_style(1e4, None)
SLIDING = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}
CONFIGS = {"qwen3": QWEN3 | SHAPE, "qwen2": QWEN2 | SHAPE, "mixed": QWEN2 | SHAPE | SLIDING}
MIXED_WINDOWS = (None, 48, 48)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three layers each: no biases and norms of the heads; biases; biases, and all layers slide but the first."""
    directories = {}
    for name, config in CONFIGS.items():
        directories[name] = tmp_path_factory.mktemp(name)
        write_weights(directories[name], random_tensors(config, ("F32",), SCALES), seed=3)
        write_json(directories[name] / "config.json", config)
    return directories


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of at most 128 rows, so that rings are short and each such step overwrites two pages."""
    monkeypatch.setattr("engine.runner.MAX_ROWS", 2 * PAGE)


@pytest.fixture
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, **STREAMING, max_batch=3) as model:
        yield model


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The worst logit, in standard deviations."""
    return float(np.abs(found - expected).max() / expected.std())


@cache
def reference(model: Path, windows: tuple[int | None, ...], sink: int, count: int) -> np.ndarray:
    """Logits of tokens(count) by the definition."""
    return ReferenceDecoder(model, windows, sink).logits(tokens(count))


# What is computed.


@every_target
@pytest.mark.parametrize("sink, window", [(4, 40), (0, 30), (70, 5), (2, 64), (1, 1), (64, 130)])
def test_every_prefix_is_that_of_in_cache_positions(
    models: dict[str, Path], sink: int, window: int, target: dict[str, Any]
) -> None:
    with LLM(models["qwen3"], attention="streaming", sink=sink, window=window, max_seq_len=64, **target) as llm:
        assert error(llm.logits(tokens(450)), reference(models["qwen3"], (window,) * 3, sink, 450)) < CLOSE
        assert llm.attention == "streaming+window"


@every_target
def test_ten_windows_past_the_first(models: dict[str, Path], target: dict[str, Any]) -> None:
    """One token after the other, each by itself the most likely one of the definition's."""
    greedy = SamplingParams(temperature=0, max_tokens=11 * WINDOW, ignore_eos=True, logprobs=0)
    with LLM(models["qwen2"], **STREAMING, **target) as llm:
        done = llm.generate(tokens(10), greedy)
    logits = ReferenceDecoder(models["qwen2"], [WINDOW] * 3, SINK).logits(done.prompt_token_ids + done.token_ids[:-1])
    rows = logits[len(done.prompt_token_ids) - 1 :]
    chosen = np.take_along_axis(rows, np.array(done.token_ids)[:, None], axis=1)[:, 0]
    assert done.finish_reason == "length" and len(chosen) == 11 * WINDOW and len(set(done.token_ids)) > 50
    assert (rows.max(axis=1) - chosen).max() < CLOSE * rows.std()
    assert done.logprobs is not None
    expected = chosen - rows.max(axis=1) - np.log(np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1))
    assert np.abs([entry.logprob for entry in done.logprobs] - expected).max() < 1e-4


@every_isa
@pytest.mark.parametrize("length", [1, 43, 44, 45, 200])
def test_a_window_as_long_as_the_text_is_full_attention(tiny: Path, isa: str, length: int) -> None:
    """Bit for bit; and where sinks and window are exactly full, up to rounding."""
    ids = tokens(length)
    with LLM(tiny, isa=isa, attention="streaming", max_seq_len=256) as full:
        expected = full.logits(ids)
    for sink, window in ((0, length), (SINK, length), (SINK, 1000)):
        with LLM(tiny, isa=isa, attention="streaming", sink=sink, window=window) as llm:
            assert np.array_equal(llm.logits(ids), expected)
    if length > SINK:
        with LLM(tiny, isa=isa, dtype="float32", attention="streaming", sink=SINK, window=length - SINK) as llm:
            just_full = llm.logits(ids)
        with LLM(tiny, isa=isa, dtype="float32", attention="streaming", max_seq_len=256) as full:
            assert error(just_full, full.logits(ids)) < CLOSE


@pytest.mark.parametrize("far", [10_000, 1_000_003, 2**31 - 1 - 300])
def test_far_positions_are_as_good_as_near_ones(models: dict[str, Path], far: int) -> None:
    """Positions are skipped, not the arithmetic: with the sinks kept, only distances count, up to the last position."""
    ids = tokens(300)
    for device in ("cpu", "numpy"):
        with LLM(models["qwen3"], device=device, **STREAMING) as llm:
            near, there = (last_logits(llm, ids, start) for start in (5 * PAGE, far))
            assert error(there, near) < CLOSE


def last_logits(llm: LLM, ids: list[int], start: int) -> np.ndarray:
    """Of tokens from position `start` on, after the sinks."""
    results: list[Sampled] = []
    greedy = SamplingParams(temperature=0).resolve()
    want = Want(99, lambda entry: greedy.fill(entry, index=0, history_start=0, history_length=0, prompt_length=0),
                results.append, keep_logits=True)  # fmt: skip
    llm.runner.run([Segment(0, 0, ids[:SINK])], [])
    for first in range(0, 300, 100):
        llm.runner.run([Segment(0, start + first, ids[first : first + 100])], [want] if first == 200 else [])
    assert results[0].logits is not None
    return results[0].logits


# However it is cut, bit for bit.


@every_isa
def test_prefill_in_one_go_in_chunks_and_token_by_token_agree(tiny: Path, isa: str) -> None:
    ids, rows = tokens(700), {}
    for max_rows, threads in ((128, 2), (37, 1), (1, 2)):
        with LLM(tiny, isa=isa, **STREAMING | {"threads": threads}, max_batch=1) as llm:
            llm.runner.max_rows = max_rows
            rows[max_rows] = llm.logits(ids)
            assert llm.runner.caches[0].recycled[0] > 5, "pages were used again"
    assert np.array_equal(rows[128], rows[37])
    assert np.array_equal(rows[128], rows[1])


@every_isa
def test_a_step_that_overwrites_eight_pages(tiny: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, rows = tokens(2000), []
    for max_rows in (512, 128):
        monkeypatch.setattr("engine.runner.MAX_ROWS", max_rows)
        with LLM(tiny, isa=isa, **STREAMING, max_batch=1) as llm:
            rows.append(llm.logits(ids))
            assert llm.runner.groups[0].entries == {512: 11, 128: 5}[max_rows]
    assert np.array_equal(rows[0], rows[1])


@every_isa
def test_a_batch_gives_each_prompt_what_it_gets_alone(tiny: Path, isa: str) -> None:
    prompts = [tokens(n, seed=n) for n in (1, 39, 44, 300, 700)]
    with LLM(tiny, isa=isa, **STREAMING | {"threads": 2}, max_batch=3) as batched:
        together = batched.generate(prompts, DRAWN)
    with LLM(tiny, isa=isa, **STREAMING, max_batch=1) as alone:
        for prompt, completion in zip(prompts, together, strict=True):
            single = alone.generate(prompt, DRAWN)
            assert single.token_ids == completion.token_ids and single.logprobs == completion.logprobs


def test_cancelling_while_pages_are_overwritten_harms_nobody(llm: LLM) -> None:
    """The step is formed again, smaller, over pages that it has perhaps overwritten already."""
    prompt = tokens(600, seed=1)
    expected = llm.generate(prompt, DRAWN)
    for i in range(15):
        victim = llm.stream(tokens(700, seed=i), DRAWN)
        survivor = llm.stream(prompt, DRAWN)
        if i % 2:
            next(survivor)
        victim.close()
        for _ in survivor:
            pass
        done = survivor.completion()
        assert done.token_ids == expected.token_ids and done.logprobs == expected.logprobs


@pytest.mark.parametrize("rows_done", [0, 100, 128])
def test_a_step_that_was_stopped_is_made_again(tiny: Path, rows_done: int) -> None:
    """Whatever it has written, and with fewer rows than it had."""
    ids = tokens(700)
    with LLM(tiny, **STREAMING, max_batch=1) as llm:
        expected = llm.generate(ids, DRAWN)
    with LLM(tiny, **STREAMING, max_batch=1) as llm:
        run, calls = llm.runner.run, []

        def stopped_once(segments: list[Segment], wants: list[Want]) -> None:
            calls.append(len(segments[0].tokens))
            if len(calls) % 4 == 0 and rows_done:
                run([Segment(s.slot, s.first_pos, s.tokens[:rows_done]) for s in segments], [])
            if len(calls) % 4 == 0:
                raise Cancelled
            run(segments, wants)

        llm.runner.run = stopped_once  # type: ignore[method-assign, assignment]
        done = llm.generate(ids, DRAWN)
        assert calls[:6] == [128, 128, 128, 128, 64, 128]
        assert done.token_ids == expected.token_ids and done.logprobs == expected.logprobs


# What a conversation finds again.


def test_a_text_that_goes_on_finds_its_cache_and_one_that_turns_back_does_not(tiny: Path) -> None:
    """Of 649 positions the last 4 pages are there, from 448 on, and those that row n looks at begin at n - 39."""
    with LLM(tiny, **STREAMING, max_batch=1) as llm:
        for shared, cached in ((650, 649), (600, 600), (487, 487), (486, 0), (30, 0)):
            assert_same_when_found_again(llm, shared, cached)


@pytest.mark.parametrize("attention", ["standard", "flash", "streaming"])
@every_target
def test_full_and_sliding_layers_far_beyond_the_window(
    models: dict[str, Path], attention: str, target: dict[str, Any]
) -> None:
    with LLM(models["mixed"], attention=attention, max_seq_len=640, **target) as llm:
        assert [(g.layers, g.entries) for g in llm.runner.groups] == [([0], 10), ([1, 2], 4)]
        assert error(llm.logits(tokens(400)), reference(models["mixed"], MIXED_WINDOWS, 0, 400)) < CLOSE
        assert llm.attention == attention


@every_isa
def test_groups_agree_on_what_a_conversation_finds_again(models: dict[str, Path], isa: str) -> None:
    with LLM(models["mixed"], isa=isa, max_seq_len=1000, max_batch=1, threads=1) as llm:
        for shared, cached in ((650, 649), (495, 495), (494, 0)):
            assert_same_when_found_again(llm, shared, cached)
            assert len({int(cache.length[0]) for cache in llm.runner.caches}) == 1
        llm.generate(tokens(600), SHORT)
        assert llm.runner.truncate(0, 494) == 494
        assert llm.runner.truncate(0, 100) == 0, "the full layer has more, but must forget as the others do"
        assert llm.runner.cache_used_bytes == 0


def assert_same_when_found_again(llm: LLM, shared: int, cached: int) -> None:
    """A text of which the first `shared` tokens were the last one's, beside the same with an empty cache."""
    llm.generate(tokens(100, seed=1), SHORT)
    last = llm.generate(tokens(500), DRAWN)
    text = last.prompt_token_ids + last.token_ids
    prompt = text[:shared]
    prompt += [(token + 1) % 256 for token in (text[min(shared, len(text) - 1)], *prompt[:50])]
    found = llm.generate(prompt, SHORT)
    assert found.timings.cached_tokens == cached
    llm.generate(tokens(100, seed=1), SHORT)
    fresh = llm.generate(prompt, SHORT)
    assert fresh.timings.cached_tokens == 0
    assert found.token_ids == fresh.token_ids and found.logprobs == fresh.logprobs


def test_the_smaller_window_counts_and_sinks_stand_before_the_users_only(models: dict[str, Path]) -> None:
    for window, windows in ((30, (30, 30, 30)), (48, (48, 48, 48)), (60, (60, 48, 48))):
        with LLM(models["mixed"], attention="streaming", sink=0, window=window, max_seq_len=64) as llm:
            assert error(llm.logits(tokens(300)), reference(models["mixed"], windows, 0, 300)) < CLOSE
        with LLM(models["mixed"], attention="streaming", sink=6, window=window, max_seq_len=64) as llm:
            sinks = [block.attention.attention.sink for block in llm.runner.model.blocks]
            assert sinks == [6, *([6, 6] if window <= 48 else [0, 0])]
            if window <= 48:
                assert error(llm.logits(tokens(300)), reference(models["mixed"], windows, 6, 300)) < CLOSE


def test_a_ring_that_would_save_nothing_is_not_made(models: dict[str, Path]) -> None:
    with LLM(models["mixed"], max_seq_len=4 * PAGE) as llm:
        assert [group.ring.ring_pages for group in llm.runner.groups] == [0, 0]
    with LLM(models["mixed"], max_seq_len=4 * PAGE + 1) as llm:
        assert [group.ring.ring_pages for group in llm.runner.groups] == [0, 4]


# No end, in constant memory.


def test_neither_prompt_nor_text_end_at_the_context(llm: LLM) -> None:
    """Without max_tokens, the end of text does."""
    probe = llm.generate(tokens(200), SamplingParams(temperature=1.5, seed=2, max_tokens=400, ignore_eos=True))
    late = max(set(probe.token_ids), key=probe.token_ids.index)
    llm.eos_ids = frozenset({late})
    done = llm.generate(tokens(200), SamplingParams(temperature=1.5, seed=2))
    assert done.finish_reason == "stop" and done.token_ids == probe.token_ids[: probe.token_ids.index(late)]
    assert len(done.token_ids) > 2 * llm.runner.step.history.reach


def test_positions_are_what_ends_a_text(llm: LLM) -> None:
    request = llm._request([1, 2], SamplingParams())
    assert request.max_tokens == 2**31 - 1 - 2
    llm.max_seq_len = 100  # as if so many were all
    done = llm.generate(tokens(90), SamplingParams(temperature=0, ignore_eos=True))
    assert done.finish_reason == "length" and len(done.token_ids) == 10


def test_the_cache_stops_growing(llm: LLM) -> None:
    runner, used = llm.runner, []
    for length in (40, 700, 2000, 1000):  # the first three go to slots of their own
        llm.generate(tokens(length, seed=length), replace(DRAWN, max_tokens=500))
        used.append(3 * runner.cache_used_bytes)
    capacity = runner.cache_capacity_bytes
    assert used == [capacity, 2 * capacity, 3 * capacity, 3 * capacity]
    assert capacity == sum(kv.storage.nbytes for kv in runner.layers)
    assert all(kv.shape[0] == 3 * 5 for kv in runner.layers)


def test_a_token_leaves_nothing_behind_but_itself(llm: LLM) -> None:
    stream = llm.stream([1, 2], SamplingParams(temperature=1.5, seed=1, max_tokens=3000, ignore_eos=True))
    sizes = {}
    tracemalloc.start()
    try:
        for _ in stream:
            count = stream._request.timings.generated_tokens
            sizes[count] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    first, last = min(count for count in sizes if count > 500), max(sizes)
    assert last > 2500 and (sizes[last] - sizes[first]) / (last - first) < 200


# Penalties look back a bounded way.


def test_history_is_the_last_tokens_in_a_row() -> None:
    rng = np.random.default_rng(0)
    for reach in (1, 2, 7, 64):
        array = np.full(3 * 2 * reach, -1, np.int32)
        history, told = History(array, reach), [[], [], []]  # type: tuple[History, list[list[int]]]
        for _ in range(300):
            slot = int(rng.integers(3))
            if rng.integers(20) == 0:
                told[slot].clear()
            new = rng.integers(0, 1000, int(rng.choice([1, 1, 1, 3, reach, 3 * reach]))).tolist()
            history.write(slot, len(told[slot]), new)
            told[slot] += new
            start, count = history.span(slot, len(told[slot]))
            assert array[start : start + count].tolist() == told[slot][-reach:]


@pytest.mark.parametrize("device", ["cpu", "numpy"])
def test_penalties_look_at_the_last_tokens(models: dict[str, Path], device: str) -> None:
    """As many as max_seq_len; the prompt's are the first that they lose sight of."""
    reach, prompt = 64, tokens(50)
    params = SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=100,
                            ignore_eos=True)  # fmt: skip
    with LLM(models["qwen3"], device=device, **STREAMING) as llm:
        ids = prompt + llm.generate(prompt, params).token_ids
        logits = llm.logits(ids)
        for end in range(len(prompt), len(ids)):
            entry = np.zeros(1, llm.runner.step.arrays["sampling"].dtype)[0]
            seen = ids[max(0, end - reach) : end]
            kept_prompt = max(0, len(prompt) - max(0, end - reach))
            params.resolve().fill(entry, index=0, history_start=0, history_length=len(seen), prompt_length=kept_prompt)
            assert ids[end] == int(np.argmax(penalised(logits[end - 1], entry, np.array(seen, np.int32))))


# What may be asked.


@pytest.mark.parametrize("options, message", [
    ({"sink": 4}, "sink and window belong to attention='streaming'"),
    ({"window": 4}, "sink and window belong to attention='streaming'"),
    ({"attention": "standard", "sink": 4, "window": 60}, "sink and window belong to attention='streaming'"),
    ({"attention": "flash", "sink": 0}, "sink and window belong to attention='streaming'"),
    ({"attention": "streaming", "sink": 4}, "sink 4 needs a window"),
    ({"attention": "streaming", "sink": 0}, "sink 0 needs a window"),
    ({"attention": "streaming", "window": 0}, "window 0: expected a whole number from 1 to"),
    ({"attention": "streaming", "window": -5}, "window -5"),
    ({"attention": "streaming", "window": 60, "sink": -1}, "sink -1: expected a whole number from 0 to"),
    ({"attention": "streaming", "window": "60"}, "window '60'"),
    ({"attention": "streaming", "window": 60.0}, "window 60.0"),
    ({"attention": "streaming", "window": True}, "window True"),
    ({"attention": "streaming", "window": 60, "sink": 1.5}, "sink 1.5"),
    ({"attention": "streaming", "window": 2**31 - 1, "sink": 1}, "together at most 2147483647 positions"),
    ({"attention": "streaming", "window": 2**40}, "window 1099511627776"),
    ({"attention": "standard", "q_block": 32}, "q_block and kv_block belong to attention='flash' or 'streaming'"),
    ({"kv_block": 64}, "q_block and kv_block belong to attention='flash' or 'streaming'"),
    ({"attention": "flash", "q_block": 0}, "q_block 0: expected 1 to 1024"),
    ({"attention": "flash", "kv_block": 65}, "kv_block 65"),
    ({"attention": "flash", "kv_block": "64"}, "kv_block '64'"),
    ({"attention": "psychic"}, "attention 'psychic': expected one of auto, standard, flash, streaming"),
])  # fmt: skip
def test_what_does_not_belong_together_is_refused(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(tiny, **options)


def test_a_window_that_no_memory_holds_is_refused(tiny: Path) -> None:
    with pytest.raises(RillError, match="lower sink, window or max_batch"):
        LLM(tiny, attention="streaming", sink=4, window=2**31 - 5)


def test_the_kinds_by_name(tiny: Path) -> None:
    expected = {"auto": "streaming", "standard": "standard", "flash": "flash", "streaming": "streaming"}
    for asked, name in expected.items():
        with LLM(tiny, attention=asked, max_seq_len=64) as llm:
            assert llm.attention == name
            assert len(llm.runner.plan.nodes) == len(set(llm.runner.plan.nodes))
    with LLM(tiny, attention="streaming", window=7, q_block=32, kv_block=64) as llm:
        layer = llm.runner.model.blocks[0].attention.attention
        assert (layer.window, layer.sink, layer.q_block, layer.kv_block) == (7, 0, 32, 64)


def test_the_oracle_knows_sinks_and_windows(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runner.MAX_ROWS", 100)
    report = verify(str(tiny), tokens(270), 2, attention="streaming", sink=3, window=20)
    assert report.passed, report.lines


# demo.endless.

FEW = ("--sink", "4", "--window", "40", "--positions", "500,70000", "--tokens", "40", "-r", "2", "-t", "1")


@pytest.mark.parametrize("most, status, verdict", [(1e9, 0, "PASS"), (-1.0, 1, "FAIL")])
def test_times_by_position_and_a_long_text(
    most: float, status: int, verdict: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endless, "FLAT", most)
    assert endless.main(FEW) == status
    out = capsys.readouterr().out
    assert "4 sinks and a window of 40" in out and f"\n{verdict}: flat within" in out
    first_cells = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")]
    assert first_cells[:3] == ["| position", "| 500", "| 70,000"]
    assert first_cells[3:6] == ["| pieces of text", "| 4", "| 8"] and out.endswith("\n40 tokens\n")


@pytest.mark.parametrize("option, value", [("--tokens", "9"), ("-r", "1"), ("--positions", "0")])
def test_endless_is_asked_for_what_makes_no_sense(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert endless.main([option, value]) == 2
    assert "expected" in capsys.readouterr().err
