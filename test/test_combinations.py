"""The table of methods and kinds of attention in README.md: what it says has run runs here, and nothing is left out."""

from __future__ import annotations

import json
import sys

import pytest
from test_ranks import MPIEXEC, finish, spawn
from test_ranks import pytestmark as needs_mpiexec

from engine import RillError
from engine.attention_choice import ATTENTION_KINDS
from tools import combinations
from tools.combinations import LACKING, METHODS, README, methods_here, replaced, row, run_all, table, written

WHOLE = "prefill, decode, verify"


@needs_mpiexec
def test_the_table_says_what_runs() -> None:
    """The rows of methods that this machine has; one that lacked them may have written it."""
    rows = written(README.read_text(encoding="utf-8"))
    assert list(rows) == list(METHODS), "python -m tools.combinations --write"
    ran = run_all(methods_here(), [str(MPIEXEC), "-launcher", "fork", "-iface", "lo", "-n", "2"])
    assert {method for method, _ in ran} == set(methods_here()) >= {"baseline", "mpi"}
    for method in methods_here():
        assert [", ".join(ran[method, kind]) for kind in ATTENTION_KINDS] == [WHOLE] * 3, method
        lacked = row(method, [LACKING] * len(ATTENTION_KINDS))
        own = row(method, [", ".join(ran[method, kind]) for kind in ATTENTION_KINDS])
        assert rows[method] in {own, lacked} - ({lacked} if method in ("baseline", "mpi") else set()), (
            f"README.md says {rows[method]}: python -m tools.combinations --write"
        )


def test_ranks_are_no_method_of_one_process() -> None:
    for method in METHODS:
        if method.startswith("mpi"):
            status, out, err = finish(spawn([sys.executable, "-m", "demo.benchmark", "--method", method]))
            assert (status, out) == (2, "") and f"--method {method}: there is one rank; mpiexec -n 2" in err


def test_what_does_not_run_is_not_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of another method or kind than was asked for does not count; a failure ends it."""
    rows = [{"isa": "baseline", "attention": kind, "test": test, "tokens_per_second": 1.0}
            for test in combinations.TIMED for kind in ("standard", "flash", "flash")]  # fmt: skip
    verified = [f"PASS {isa} {kind}, 1 threads: [1, 2]\n"
                for isa, kind in (("baseline", "standard"), ("avx2", "flash"), ("baseline", "streaming"))]  # fmt: skip
    outputs = [json.dumps(rows), "".join([*verified, "PASS: 3 of 3\n"])]
    monkeypatch.setattr(combinations, "_output", lambda _: outputs.pop(0))
    ran = run_all(["baseline"], [])
    assert [ran["baseline", kind] for kind in ATTENTION_KINDS] == [
        ["prefill", "decode", "verify"], ["prefill", "decode"], ["verify"]
    ]  # fmt: skip
    monkeypatch.undo()
    with pytest.raises(RillError, match="--method nonsense"):
        run_all(["nonsense"], [])


def test_rows_of_what_is_lacking_stay() -> None:
    ran = {(method, kind): ["prefill"] for method in ("baseline", "mpi") for kind in ATTENTION_KINDS}
    before = {"avx2": "| `avx2` | as it was |\n", "mpi": "| `mpi` | as it was |\n"}
    head, rule, *lines = table(ran, before)
    assert head == "| | standard | flash | streaming |\n" and rule.count("---") == 4
    text = f"above\n{combinations.BEGIN}old\n{combinations.END}below\n"
    rows = written(replaced(text, [head, rule, *lines]))
    assert list(rows) == list(METHODS)
    assert rows["avx2"] == before["avx2"] and rows["mpi"] == "| `mpi` | prefill | prefill | prefill |\n"
    assert rows["mpi+avx512"].count(LACKING) == 3
    assert replaced(replaced(text, [head, *lines]), ["old\n"]) == text
    with pytest.raises(RillError, match="expected one table"):
        written("no table")
