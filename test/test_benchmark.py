"""The benchmark program: every row it promises, with a limit beside it, and tokens that are NumPy's."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from demo import benchmark, same_tokens, timed_model
from demo.methods import Method, open_model
from demo.timed_model import TimedModel, Trial
from demo.timing import enough_rounds, interleaved, medians
from engine import LLM, Timings
from engine.abi import BFLOAT16
from engine.device.cpu import available_isas
from engine.files.checkpoint import read_header
from engine.verify import LOGIT_BOUND
from engine.work import Limits, PlanWork

FIELDS = {"model", "dtype", "isa", "attention", "threads", "batch", "depth", "test", "tokens_per_second", "stddev",
          "limit", "limit_share"}  # fmt: skip
Out = pytest.CaptureFixture[str]


def rows(capsys: Out, *arguments: object) -> list[dict[str, Any]]:
    assert benchmark.main([*map(str, arguments), "-o", "json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert all(row.keys() >= FIELDS for row in found)
    return found


def test_rows_come_with_the_share_of_the_limit(tiny: Path, capsys: Out) -> None:
    isa = available_isas()[0]
    found = rows(capsys, tiny, "-p", 20, "-n", 4, "-r", 2, "-t", 1, "--method", isa, "--load")
    assert [(r["test"].split()[0], r["isa"], r["threads"]) for r in found] == [
        ("load", isa, 1), ("pp20", isa, 1), ("tg4", isa, 1)
    ]  # fmt: skip
    load, prompt, generated = found
    assert load["bytes_per_second"] > 0
    assert all(r["limit"] > 0 and r["limit_share"] > 0 and r["stddev"] > 0 for r in found)
    assert [r["limit_unit"] for r in found] == ["byte/s", "flop/s", "byte/s"]
    assert prompt["tokens_per_second"] > 0 and (prompt["prompt_len"], prompt["gen_len"]) == (20, None)
    assert generated["tokens_per_second"] > 0 and (generated["prompt_len"], generated["gen_len"]) == (None, 4)
    assert [(r["batch"], r["depth"]) for r in found] == [(None, None), (1, 0), (1, 0)]
    assert (generated["model"], generated["dtype"], generated["kv_dtype"]) == ("model", "bfloat16", "bfloat16")


def test_lists_multiply_and_rows_name_what_ran(tiny: Path, capsys: Out) -> None:
    isas = available_isas()[:2]
    chosen = ["--method", ",".join([*isas, "numpy"]), "-t", "1,2", "--dtype", "auto,float32"]
    windowed = ["--attention", "standard,streaming", "--window", 8, "--sink", 2]
    found = rows(capsys, "--model", tiny, *chosen, *windowed, "-p", "5,9", "-n", 2, "-r", 1)
    dtypes, kinds = ("bfloat16", "float32"), ("standard", "streaming+window")
    pairs = [(isa, dtype, kind, t) for isa in isas for dtype in dtypes for kind in kinds for t in (1, 2)]
    pairs += [("numpy", dtype, kind, 1) for dtype in dtypes for kind in kinds]  # its threads are its own
    seen = [(r["isa"], r["dtype"], r["attention"], r["threads"]) for r in found]
    assert seen == pairs * 3
    assert [r["test"] for r in found] == ["pp5"] * len(pairs) + ["pp9"] * len(pairs) + ["tg2"] * len(pairs)
    assert all((r["limit"] is None) == (r["isa"] == "numpy") for r in found)


def test_depths_and_batches_multiply(tiny: Path, capsys: Out) -> None:
    found = rows(capsys, tiny, "-p", 3, "-n", 2, "-d", "0,70", "-b", "1,3", "-r", 1)
    assert [(r["depth"], r["batch"], r["test"]) for r in found] == [
        (depth, batch, test) for depth in (0, 70) for batch in (1, 3) for test in ("pp3", "tg2")
    ]


@pytest.mark.parametrize("window", [{}, {"attention": "streaming", "window": 8, "sink": 2}])
def test_only_what_comes_after_the_depth_is_timed(tiny: Path, window: dict[str, Any]) -> None:
    """Every sequence finds its own tokens in the cache, and the steps are those of the test alone."""
    with LLM(tiny, max_seq_len=128, max_batch=3, **window) as llm:
        steps = [Trial(depth, batch, gen_len=4) for depth, batch in ((70, 1), (0, 2), (70, 2))]
        for test in (Trial(70, 3, prompt_len=5), *steps):
            timed = TimedModel(llm, Method("auto", "auto"), test)
            timed.sample()
            with llm.profile(keep_trace=True) as profile:
                timed.sample()
            spans = [step.spans for step in profile.trace if len(step.spans) == test.batch][bool(test.depth) :]
            length = test.prompt_len or 1
            starts = range(test.depth, test.depth + (test.gen_len or 1))
            assert spans == [[range(start, start + length)] * test.batch for start in starts], test


def test_rates_count_all_sequences_and_shares_what_they_need(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [Timings(prompt_tokens=9, cached_tokens=4, generated_tokens=6, prompt_seconds=1, generate_seconds=t)
               for t in (2.0, 3.0)]  # fmt: skip
    with LLM(tiny, max_seq_len=64, max_batch=2) as llm:
        monkeypatch.setattr(TimedModel, "_generate", lambda *_: timings)
        limits = Limits(1e9, {BFLOAT16: 2e9})
        monkeypatch.setattr(timed_model, "measure_limits", lambda *_, **__: limits)
        kinds = PlanWork(llm.runner.plan, llm.runner.step)
        prompt = TimedModel(llm, Method("auto", "auto"), Trial(4, 2, prompt_len=5)).sample()
        flops = kinds.total([range(4, 9)] * 2, 2).flops
        assert astuple(prompt) == pytest.approx((10 / 4, 2e9, flops / 2e9 / 4))
        steps = TimedModel(llm, Method("auto", "auto"), Trial(4, 2, gen_len=6)).sample()
        memory = sum(kinds.total([range(4 + i, 5 + i)] * 2, 2).memory for i in range(6))
        assert astuple(steps) == pytest.approx((12 / 4, 1e9, memory / 1e9 / 4))


def test_rows_are_means_with_the_spread_and_medians_of_the_share(tiny: Path) -> None:
    samples = [timed_model.Sample(rate, limit, share) for rate, limit, share in
               ((10.0, 5.0, 0.1), (20.0, 7.0, 0.4), (60.0, 6.0, 0.2))]  # fmt: skip
    with LLM(tiny, max_seq_len=64, max_batch=2) as llm:
        row = TimedModel(llm, Method("auto", "auto", dtype="int4"), Trial(0, 2, gen_len=6)).row(samples)
    assert (row.tokens_per_second, row.limit, row.limit_share, row.dtype) == (30.0, 6.0, 0.2, "int4")
    assert row.stddev == pytest.approx(700**0.5)


def test_the_table_has_a_line_a_row(tiny: Path, capsys: Out) -> None:
    assert benchmark.main([str(tiny), "-p", "5,6", "-r", "1", "--phase", "prefill", "--attention", "flash"]) == 0
    out, err = capsys.readouterr()
    head, _, *lines = out.splitlines()
    assert [re.findall(r"pp\d+ \| [\d.]+ ± 0.00 tokens/s", line) != [] for line in lines] == [True, True]
    assert all(line.count("|") == head.count("|") and "| flash |" in line for line in lines)
    assert err.startswith("demo.benchmark: cpu ") and err.count("\n") == 1


def test_rounds_go_through_all_works() -> None:
    seen: list[str] = []

    def work(name: str) -> int:
        seen.append(name)
        return len(seen)

    kept = interleaved([partial(work, name) for name in "abc"], 2)
    assert "".join(seen) == "abc" * 3 and kept == [[4, 7], [5, 8], [6, 9]]


def test_medians_are_of_the_rounds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 60, 0, 50, 0, 1, 0, 5, 0, 3])  # seconds before and after; the first two calls warm up
    monkeypatch.setattr("demo.timing.time.perf_counter", lambda: float(next(clock)))
    assert medians([lambda: None], 3) == [3.0]


def test_short_rounds_are_many() -> None:
    assert [enough_rounds(time, 5) for time in (1.0, 0.05, 0.02, 0.0001, 0.0)] == [5, 5, 10, 100, 100]


def test_comma_separated_values_come_with_their_names(tiny: Path, capsys: Out) -> None:
    assert benchmark.main([str(tiny), "-p", "5,6", "-r", "1", "--phase", "prefill", "-o", "csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["test"] for row in found] == ["pp5", "pp6"] and all(float(row["limit_share"]) > 0 for row in found)
    assert found[0].keys() >= FIELDS


# --verify.


def verify(tiny: Path, *arguments: str) -> int:
    methods = ",".join([*available_isas(), "numpy"])
    return benchmark.main([str(tiny), "--verify", "104,105,106", "--gen-len", "4", "--method", methods, *arguments])


@pytest.mark.parametrize("window", [[], ["--window", "2", "--sink", "1"]])
def test_every_pair_gives_the_tokens_of_numpy(tiny: Path, capsys: Out, window: list[str]) -> None:
    assert verify(tiny, "--attention", "standard,flash,streaming", *window) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    count = 3 * (len(available_isas()) + 1)
    assert len(lines) == count and last == f"PASS: {count} of {count} give NumPy's tokens"
    tokens = {re.sub(r".*: ", "", line) for line in lines if not window or "window" in line}
    assert len(tokens) == 1 and re.fullmatch(r"\[(\d+, ){3}\d+\]", tokens.pop())


def test_a_pair_that_differs_fails(tiny: Path, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair reads a copy of the model whose last norm is nought: its logits are all alike."""
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    norm = read_header(broken / "model.safetensors")["model.norm.weight"]
    with norm.file.open("r+b") as file:
        file.seek(norm.offset)
        file.write(bytes(norm.nbytes))
    isa = available_isas()[-1]

    def open_pair(options: argparse.Namespace, method: Method, max_seq_len: int) -> LLM:
        wrong = (method.name, method.attention) == (isa, "streaming")
        changed = {**vars(options), "model": broken if wrong else tiny}
        return open_model(argparse.Namespace(**changed), method, max_seq_len)

    monkeypatch.setattr(same_tokens, "open_model", open_pair)
    assert verify(tiny, "--attention", "standard,streaming") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == 1 and failed[0].startswith(f"FAIL {isa} streaming")
    assert "token 0 is 0, NumPy's" in failed[0] and "standard deviations of the logits above it" in failed[0]
    assert last == f"FAIL: {len(lines) - 1} of {len(lines)} give NumPy's tokens"


def test_tokens_may_differ_where_numpy_has_them_close(tiny: Path) -> None:
    options = argparse.Namespace(model=tiny, kv_dtype="auto", window=None, sink=None)
    with open_model(options, Method("numpy", "standard", dtype="float32"), 8) as oracle:
        reference = same_tokens.Reference(oracle, [104, 105], 2)
        scores = oracle.logits([104, 105])[-1]
        second = int(scores.argsort()[-2])
        gap = float((scores.max() - scores[second]) / scores.std())
        other = [second, int(oracle.logits([104, 105, second])[-1].argmax())]
        for limit, allowed in ((gap * 1.01, True), (gap * 0.99, False)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(LOGIT_BOUND, "float32", limit)
                assert (list(reference.objections(oracle, other)) == []) == allowed
        assert list(reference.objections(oracle, [second])) == ["; 1 tokens instead of 2"]


# Misuse.


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--method", "nope"], "--method 'nope': this machine has auto, baseline"),
        (["--method", "avx2,"], "--method: expected names"),
        (["-r", "0"], "--iters: expected a positive number"),
        (["-b", "0"], "--batch: expected positive whole numbers"),
        (["-d", "-1"], "--depth: expected"),
        (["-d", "1,"], "--depth: expected whole numbers like 0,4096"),
        (["-d", "9999999"], "this needs 10000"),
        (["--dtype", "auto,int3"], "dtype 'int3'"),
        (["-o", "xml"], "--output: invalid choice"),
        (["-p", "x"], "--prompt-len: expected positive whole numbers"),
        (["-n", "4,5"], "--gen-len: expected a whole number"),
        (["--attention", "flash,sparse"], "--attention 'sparse': expected"),
        (["--attention", "flash", "--window", "9"], "--window: belongs to --attention streaming"),
        (["--attention", "streaming", "--sink", "9"], "--sink: needs --window"),
        (["--phase", "both"], "--phase: invalid choice"),
        (["--verify", "1,x"], "--verify: expected token ids"),
        (["--verify", "5000"], "token id 5000"),
        (["--kv-dtype", "int3"], "kv_dtype 'int3'"),
        (["--model", "elsewhere"], "--model: the model is named already"),
    ],
)
def test_misuse_is_one_line(tiny: Path, arguments: list[str], fragment: str, capsys: Out) -> None:
    assert benchmark.main([str(tiny), *arguments]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("demo.benchmark: cpu")]
    assert out == "" and len(errors) == 1 and errors[0].startswith("demo.benchmark: error: ") and fragment in errors[0]


def test_a_model_that_is_not_there_fails(tmp_path: Path, capsys: Out) -> None:
    assert benchmark.main([str(tmp_path)]) == 1
    assert "has no weights" in capsys.readouterr().err
