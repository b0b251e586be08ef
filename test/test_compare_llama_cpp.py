"""The comparison with llama.cpp: what its benchmark program says is read, paired and printed."""

from __future__ import annotations

import json
import re
import stat
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo import compare_llama_cpp
from demo.llama_bench import LlamaBench, parse_bench
from demo.peer_rows import HEAD, Pair, Round
from demo.timed_model import Trial
from demo.timing import OthersUse, taking_turns
from engine import RillError

# `llama-bench -m tiny.gguf -p 4 -n 2 -d 0,3 -t 2 -r 2 -o json`, on tools.random_model's preset "tiny" in bf16.
RECORDED = Path(__file__).resolve().parent / "llama_bench.json"
STANDIN = """#!{python}
import json, sys
if "--help" in sys.argv: sys.exit()
value = {{key: int(sys.argv[sys.argv.index(key) + 1]) for key in ("-p", "-n", "-d", "-t")}}
(row,) = [r for r in json.load(open({recorded!r})) if [r["n_prompt"], r["n_gen"], r["n_depth"], r["n_threads"]]
          == [*value.values()]]
print(json.dumps([row]))
"""
Out = pytest.CaptureFixture[str]


def recorded(**wanted: int) -> list[dict[str, Any]]:
    return [row for row in json.loads(RECORDED.read_text()) if wanted.items() <= row.items()]


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    """A program that answers as llama-bench did."""
    return program(tmp_path / "llama-bench", STANDIN.format(python=sys.executable, recorded=str(RECORDED)))


def test_a_recorded_run_is_read() -> None:
    rows = recorded(n_prompt=0, n_gen=2, n_depth=3)
    sample, ran = parse_bench(json.dumps(rows))
    assert sample.tokens_per_second == pytest.approx(rows[0]["avg_ts"], rel=1e-4)
    assert (sample.weights, sample.kv_dtype) == ("qwen3 ?B (guessed) BF16", "f16")
    assert sample.build["backends"] == "CPU" and sample.build.keys() == {
        "build_commit", "build_number", "backends", "flash_attn"}  # fmt: skip
    assert ran == {"n_prompt": 0, "n_gen": 2, "n_depth": 3, "n_threads": 2}


def test_pairs_are_of_the_same_test(standin: Path, tiny: Path, tmp_path: Path, capsys: Out) -> None:
    (file := tmp_path / "some.gguf").touch()
    chosen = [str(standin), f"{file}=auto", f"{file}=int8", "--model", str(tiny), "-p", "4", "-n", "2", "-d", "0,3",
              "-t", "2", "-r", "3", "-o", str(tmp_path / "out")]  # fmt: skip
    assert compare_llama_cpp.main(chosen) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    pairs = content["pairs"]
    assert [(p["test"], p["depth"], p["dtype"]) for p in pairs] == [
        (test, depth, dtype) for test, depth in (("pp4", 0), ("tg2", 0), ("tg2", 3)) for dtype in ("bfloat16", "int8")
    ]
    for pair in pairs:
        prompt = pair["test"] == "pp4"
        (row,) = recorded(n_prompt=4 * prompt, n_gen=2 * (not prompt), n_depth=pair["depth"])
        assert [r["peer"] for r in pair["rounds"]] == [pytest.approx(row["avg_ts"], rel=1e-4)] * 3
        assert all(r["rill"] > 0 and r["share"] > 0 for r in pair["rounds"])
        assert (pair["threads"], pair["peer_weights"]) == (2, row["model_type"])
    out, err = capsys.readouterr()
    head, _, *lines = out.splitlines()
    assert head == HEAD and len(lines) == len(pairs) and err == ""
    assert all(line.count("|") == HEAD.count("|") for line in lines)


def test_ratios_are_of_rounds_and_of_the_fastest() -> None:
    rounds = [Round(10.0, 0.5, 5.0, 1.0), Round(30.0, 0.9, 10.0, 3.0), Round(8.0, 0.4, 8.0, 2.0)]
    pair = Pair("tg8", 4096, 2, "avx2", "model", "int8", "float16", "Q8_0", "f16", {}, rounds)
    summary = pair.summary()
    assert [summary[name] for name in ("ratio", "ratio_least", "ratio_greatest", "ratio_of_fastest")] == [2, 1, 3, 3]
    assert (summary["rill"], summary["share"], summary["others"]) == (16.0, 0.5, 2.0)
    assert summary["peer_stddev"] == pytest.approx(19**0.5 / 3**0.5)
    assert pair.line().startswith("| tg8 @ 4096 | 2 | avx2 | int8 | 16.0 ± 12.2 | 50% | Q8_0 | 7.7 ± 2.5 | ")
    assert pair.line().endswith(" | 2.00 (1.00–3.00) | 3.00 | 2.0 |")
    assert pair.content()["rounds"][0] == {"rill": 10.0, "share": 0.5, "peer": 5.0, "others": 1.0}


def test_only_the_time_of_others_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, own, used = iter([10.0, 14.0]), iter([(1, 0, 0, 0, 9), (1, 1, 1, 1, 13)]), iter([100, 1100])
    monkeypatch.setattr("demo.timing.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    fake_os = SimpleNamespace(times=lambda: next(own), sysconf={"SC_CLK_TCK": 100}.__getitem__)
    monkeypatch.setattr("demo.timing.os", fake_os)
    stat = "cpu  {} 0 0 5000 5000 0 0 0 0 0\ncpu0 1 1 1 1\n"
    monkeypatch.setattr(Path, "read_text", lambda _: stat.format(next(used)))
    assert OthersUse().since() == (10 - 3) / 4


def test_which_runs_first_alternates() -> None:
    seen: list[str] = []

    def note(name: str) -> str:
        seen.append(name)
        return name

    given = list(taking_turns(partial(note, "a"), partial(note, "b"), 3))
    assert "".join(seen) == "abbaab" and given == [("a", "b")] * 3


@pytest.mark.parametrize(
    "broken",
    ["[]", "{}", "no JSON", '[{"samples_ts": [1.0]}]', '[{"samples_ts": [], "model_type": "m", "type_k": "f16"}]'],
)
def test_an_answer_of_another_kind_is_an_error(broken: str) -> None:
    with pytest.raises(ValueError, match="expected the JSON of one test"):
        parse_bench(broken)


def test_another_test_than_the_one_asked_for_is_an_error(tmp_path: Path) -> None:
    (row,) = recorded(n_prompt=4, n_depth=0)
    other = program(tmp_path / "bench", f"#!/bin/sh\necho '{json.dumps([row])}'\n")
    with pytest.raises(RillError, match="was asked for .*5.* and ran .*4"):
        LlamaBench(other).sample(Path("tiny.gguf"), Trial(0, 1, prompt_len=5), 2)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["absent", "FILE"], 2, "absent: No such file or directory"),
        (["plain", "FILE"], 2, "plain: Permission denied"),
        (["fails", "FILE"], 1, "fails ended with status 3: what went wrong"),
        (["bench", "missing.gguf"], 2, "missing.gguf: no such file"),
        (["bench", "FILE=int8"], 2, "which model in int8? --model names it"),
        (["bench", "FILE", "-o", "nowhere/out"], 2, "nowhere is no directory"),
        (["bench"], 2, "FILE.gguf"),
        (["bench", "FILE", "-p", "0", "-n", "0"], 2, "nothing to do: --prompt-len or --gen-len of more than 0"),
    ],
)
def test_misuse_is_one_line(arguments: list[str], status: int, said: str, standin: Path, tmp_path: Path, capsys: Out,
                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("FILE", "plain"):
        Path(name).touch()
    program(Path("fails"), "#!/bin/sh\necho 'what went wrong' >&2\nexit 3\n")
    standin.rename("bench")
    assert compare_llama_cpp.main(arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"demo.compare_llama_cpp: error: [^\n]*{re.escape(said)}[^\n]*\n", err)
