"""The engine as its users see it: batches, chunks, cache reuse, cancellation, limits, errors."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import LLM, RillError, SamplingParams, UsageError
from engine.device.cpu import available_isas

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
PROMPTS = [list(range(n)) for n in (1, 5, 63, 64, 65, 130)] + [[7] * 9]


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, max_seq_len=700, max_batch=3) as model:
        yield model


every_isa = pytest.mark.parametrize("isa", available_isas())
every_dtype = pytest.mark.parametrize("dtype", ["auto", "float32"])


@every_isa
@every_dtype
def test_a_batch_gives_each_prompt_what_it_gets_alone(tiny: Path, isa: str, dtype: str) -> None:
    """Bit for bit: log probabilities are compared exactly, and more prompts than max_batch queue."""
    with LLM(tiny, isa=isa, dtype=dtype, max_seq_len=256, max_batch=3, threads=2) as batched:
        together = batched.generate(PROMPTS, DRAWN)
    with LLM(tiny, isa=isa, dtype=dtype, max_seq_len=256, max_batch=1, threads=1) as alone:
        for prompt, completion in zip(PROMPTS, together, strict=True):
            single = alone.generate(prompt, DRAWN)
            assert single.token_ids == completion.token_ids
            assert single.logprobs == completion.logprobs


@every_isa
@every_dtype
def test_prefill_in_one_go_in_chunks_and_token_by_token_agree(tiny: Path, isa: str, dtype: str) -> None:
    ids = np.random.default_rng(3).integers(0, 320, 150).tolist()
    rows = {}
    for max_rows, threads in ((512, 2), (37, 1), (1, 2)):
        with LLM(tiny, isa=isa, dtype=dtype, max_seq_len=256, max_batch=1, threads=threads) as model:
            model.runner.max_rows = max_rows
            rows[max_rows] = model.logits(ids)
    assert np.array_equal(rows[512], rows[37])
    assert np.array_equal(rows[512], rows[1])


def test_the_same_seed_gives_the_same_text_every_time(llm: LLM) -> None:
    texts = {c.text for c in llm.generate([PROMPTS[1]] * 100, DRAWN)}
    assert len(texts) == 1
    other = llm.generate(PROMPTS[1], SamplingParams(temperature=0.9, seed=8, max_tokens=12, ignore_eos=True))
    assert other.text not in texts


def test_a_prompt_takes_one_pass_over_the_weights_per_512_rows(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    replay = llm.runner.plan.run

    def counted(first: int = 0, last: int | None = None) -> None:
        passes.append(first)
        replay(first, last)

    monkeypatch.setattr(llm.runner.plan, "run", counted)
    for length, expected in ((512, [0]), (513, [0, 0])):
        passes.clear()
        llm.generate([length % 320] * length, SamplingParams(temperature=0, max_tokens=1))
        assert passes == expected


def test_a_prompt_that_begins_like_the_last_one_is_not_computed_again(llm: LLM) -> None:
    first = llm.generate(list(range(100, 300)), GREEDY)
    longer = first.prompt_token_ids + first.token_ids + [5, 6]
    second = llm.generate(longer, GREEDY)
    assert second.timings.cached_tokens >= 200
    with LLM(llm.directory, max_seq_len=700, max_batch=1) as fresh:
        assert fresh.generate(longer, GREEDY).token_ids == second.token_ids
    again = llm.generate(longer, GREEDY)
    assert again.token_ids == second.token_ids
    assert again.timings.cached_tokens == len(longer) - 1  # one row is needed for the logits


def test_chat_turns_reuse_the_cache(tiny_qwen3: LLM) -> None:
    messages = [{"role": "user", "content": "Hello! Who are you?"}]
    first = tiny_qwen3.chat(messages, SamplingParams(temperature=0, max_tokens=20))
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is two plus three?"}]
    second = tiny_qwen3.chat(messages, SamplingParams(temperature=0, max_tokens=20))
    assert second.timings.cached_tokens >= first.timings.prompt_tokens - 4


@pytest.fixture(scope="module")
def tiny_qwen3() -> Iterator[LLM]:
    with LLM(Path(__file__).parent.parent / "models" / "tiny-qwen3") as model:
        yield model


def test_streamed_text_is_the_generated_text(tiny_qwen3: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    stream = tiny_qwen3.stream("Once upon a time", params)
    pieces = list(stream)
    whole = tiny_qwen3.generate("Once upon a time", params)
    assert len(pieces) > 10
    assert "".join(pieces) == whole.text == stream.completion().text


def test_stop_strings_end_the_text_before_them(tiny_qwen3: LLM) -> None:
    whole = tiny_qwen3.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=60)).text
    stop = whole[20:26]  # spans tokens
    stopped = tiny_qwen3.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=60, stop=[stop]))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(stop)]


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    done = llm.generate(list(range(40)), params)
    ids = done.prompt_token_ids + done.token_ids
    assert llm.tokenizer is not None
    logits = llm.logits(ids)[:, : llm.tokenizer.vocab_size].astype(np.float64)  # the rest is padding
    shifted = logits - logits.max(1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    assert done.prompt_logprobs is not None and done.prompt_logprobs[0] is None and done.logprobs is not None
    for position, entry in enumerate([*done.prompt_logprobs[1:], *done.logprobs], start=1):
        assert entry is not None and entry.token_id == ids[position]
        assert entry.logprob == pytest.approx(expected[position - 1, ids[position]], abs=1e-4)
        best = np.argsort(-logits[position - 1], kind="stable")[: len(entry.top)]
        assert list(entry.top) == best.tolist()
    assert len(done.prompt_logprobs) == 40 and len(done.logprobs) == 3


def test_logits_of_more_rows_than_are_made_at_once(llm: LLM) -> None:
    ids = np.random.default_rng(0).integers(0, 320, 600).tolist()
    logits = llm.logits(ids)
    assert logits.shape == (600, 320) and logits.dtype == np.float32
    assert np.array_equal(llm.logits(ids[:33]), logits[:33])


def test_closing_a_stream_cancels_it_and_leaves_the_others(llm: LLM) -> None:
    alone = llm.generate(PROMPTS[2], DRAWN)
    endless = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
    stream = llm.stream([3, 4, 5], endless)
    next(stream)
    results = []
    other = threading.Thread(target=lambda: results.append(llm.generate(PROMPTS[2], DRAWN)))
    other.start()
    stream.close()
    other.join()
    assert stream.completion().finish_reason == "cancelled"
    assert len(stream.completion().token_ids) < 600
    assert results[0].token_ids == alone.token_ids and results[0].logprobs == alone.logprobs
    assert llm.generate(PROMPTS[2], DRAWN).token_ids == alone.token_ids


def test_cancelling_in_the_middle_of_a_step_again_and_again_harms_nobody(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[5], DRAWN)
    for i in range(20):
        victim = llm.stream(list(range(i, 300)), SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        survivor = llm.stream(PROMPTS[5], DRAWN)
        victim.close()
        for _ in survivor:
            pass
        assert survivor.completion().token_ids == expected.token_ids
        assert survivor.completion().logprobs == expected.logprobs


def test_requests_that_wait_can_be_cancelled(llm: LLM) -> None:
    endless = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
    streams = [llm.stream([i], endless) for i in range(5)]  # three run, two wait
    for stream in reversed(streams):
        stream.close()
    assert {s.completion().finish_reason for s in streams} == {"cancelled"}
    assert streams[4].completion().token_ids == []


def test_a_full_context_ends_with_length(tiny: Path) -> None:
    with LLM(tiny, max_seq_len=64, max_batch=1) as model:
        done = model.generate([1] * 60, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        assert done.finish_reason == "length" and len(done.token_ids) == 4
        with pytest.raises(UsageError, match=r"65 tokens.*64"):
            model.generate([1] * 65)
        assert model.logits([1] * 64).shape == (64, 320)


def test_eos_is_the_union_of_what_all_files_say(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    for name, ids in (("generation_config", [5, 6]), ("config", 7)):
        old = json.loads((model / f"{name}.json").read_text())
        (model / f"{name}.json").write_text(json.dumps({**old, "eos_token_id": ids}))
    with LLM(model, max_seq_len=64) as llm:
        assert llm.tokenizer is not None
        assert llm.eos_ids == {5, 6, 7} | llm.tokenizer.eos_ids
        assert llm.tokenizer.eos_ids
    (model / "tokenizer.json").unlink()
    with LLM(model, max_seq_len=64) as llm:
        assert llm.eos_ids == {5, 6, 7}


@pytest.mark.parametrize("prompt, message", [
    ([], "empty"), ([320], "token id 320"), ([-1], "token id -1"), ([1, 10**12], "token id 1000000000000"),
])  # fmt: skip
def test_bad_prompts_are_refused(llm: LLM, prompt: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        llm.generate([prompt], GREEDY)


@pytest.mark.parametrize("options, message", [
    ({"isa": "sse9"}, "this machine has"), ({"device": "tpu"}, "expected auto"), ({"dtype": "int3"}, "dtype"),
    ({"kv_dtype": "f8"}, "kv_dtype"), ({"attention": "psychic"}, "attention"), ({"threads": 0}, "threads"),
    ({"max_batch": 0}, "max_batch"), ({"max_seq_len": -1}, "max_seq_len"), ({"device": "numpy", "isa": "avx2"}, "isa"),
])  # fmt: skip
def test_bad_options_are_refused(tiny: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(tiny, **options)


def test_a_model_without_tokenizer_takes_token_ids_only(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "tokenizer.json").unlink()
    with LLM(bare, max_seq_len=64) as model:
        assert len(model.generate([1, 2], GREEDY).token_ids) == 12
        for call in (lambda: model.generate("hi"), lambda: model.stream([1]), lambda: model.chat([])):
            with pytest.raises(UsageError, match=r"tokenizer\.json or tokenizer\.model"):
                call()


def test_a_cache_that_cannot_fit_is_refused_before_anything_is_read(tiny: Path) -> None:
    with pytest.raises(RillError, match=r"needs .* GiB .* are free"):
        LLM(tiny, max_seq_len=40000, max_batch=1 << 20)


def test_an_embedding_smaller_than_the_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(RillError, match="the tokenizer has .* the model's embedding 200"):
        LLM(broken)


@pytest.mark.parametrize("device", ["cpu", "numpy"])
def test_weights_that_make_nan_are_named(tiny: Path, device: str) -> None:
    with LLM(tiny, device=device, max_seq_len=256, max_batch=2) as model:
        before = model.generate(PROMPTS[1], GREEDY)
        norm = model.runner.model.blocks[1].mlp_norm.weight
        good = norm.storage.copy()
        norm.storage[3] = np.nan
        with pytest.raises(RillError, match=r"not finite; first seen at node \d+ add_rmsnorm of "
                                            r"model\.layers\.1\.post_attention_layernorm"):  # fmt: skip
            model.generate(PROMPTS[1] + [1], GREEDY)
        norm.storage[...] = good
        assert model.generate(PROMPTS[1], GREEDY).token_ids == before.token_ids


def test_a_forked_child_is_told_so(llm: LLM) -> None:
    llm.generate([1], GREEDY)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            llm.generate([1], GREEDY)
        except RillError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert b"forked" in os.read(reader, 1000)


def test_a_closed_engine_says_so(tiny: Path) -> None:
    model = LLM(tiny, max_seq_len=64)
    model.close()
    with pytest.raises(RillError, match="closed"):
        model.generate([1], GREEDY)
