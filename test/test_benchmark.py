"""The benchmark program: every row it promises, with a limit beside it, and tokens that are NumPy's."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from demo import benchmark, same_tokens
from demo.methods import Method, open_model
from demo.timing import enough_rounds, interleaved, medians
from engine import LLM
from engine.checkpoint import read_header
from engine.device.cpu import available_isas
from engine.verify import LOGIT_BOUND

FIELDS = {"model", "dtype", "isa", "attention", "threads", "test", "tokens_per_second", "stddev", "limit",
          "limit_share", "prompt_len", "gen_len"}  # fmt: skip
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
    assert load["bytes_per_second"] > 0 and load["limit"] > 0 and load["limit_share"] > 0
    assert prompt["tokens_per_second"] > 0 and prompt["limit"] is None
    assert generated["tokens_per_second"] > 0 and generated["limit"] > 0 and generated["limit_share"] > 0
    assert (generated["model"], generated["dtype"], generated["prompt_len"]) == ("model", "bfloat16", 20)


def test_lists_multiply_and_rows_name_what_ran(tiny: Path, capsys: Out) -> None:
    isas = available_isas()[:2]
    chosen = ["--method", ",".join([*isas, "numpy"]), "-t", "1,2"]
    windowed = ["--attention", "standard,streaming", "--window", 8, "--sink", 2]
    work = ["-p", "5,9", "-n", 2, "-r", 1, "--phase", "decode"]
    found = rows(capsys, "--model", tiny, *chosen, *windowed, *work)
    pairs = [(isa, kind, t) for isa in isas for kind in ("standard", "streaming+window") for t in (1, 2)]
    pairs += [("numpy", kind, 1) for kind in ("standard", "streaming+window")]  # its threads are its own
    seen = [(r["isa"], r["attention"], r["threads"]) for r in found]
    assert seen == pairs * 2 and {r["test"] for r in found} == {"tg2"}
    assert [r["prompt_len"] for r in found] == [5] * len(pairs) + [9] * len(pairs)


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


def test_a_token_reads_every_matrix_once_and_the_positions_that_it_sees(tiny: Path) -> None:
    heads, head_dim, layers, bf16 = 2, 32, 2, 2
    position = 2 * heads * head_dim * layers * bf16
    with LLM(tiny, max_seq_len=64, max_batch=1) as llm:
        stored = (tiny / "model.safetensors").stat().st_size
        weights = benchmark.bytes_per_token(llm, 0)
        assert 0.95 * stored < weights < stored
        assert benchmark.bytes_per_token(llm, 10) - weights == 10 * position
    with LLM(tiny, attention="streaming", window=6, sink=2, max_batch=1) as llm:
        assert benchmark.bytes_per_token(llm, 5) - weights == 5 * position
        assert benchmark.bytes_per_token(llm, 1000) - weights == 8 * position


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
    options = argparse.Namespace(model=tiny, dtype="float32", kv_dtype="auto", window=None, sink=None)
    with open_model(options, Method("numpy", "standard"), 8) as oracle:
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
