"""demo.arrivals: requests come at their times, all are answered, and what goes wrong is said."""

from __future__ import annotations

import time

import numpy as np
import pytest

from demo import arrivals
from demo.arrivals import Arrival
from engine import LLM, UsageError
from engine.default_model import default_model

SMALL = ["--requests", "6", "-p", "8", "-n", "4"]


def test_a_row_for_each_batch_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert arrivals.main([*SMALL, "--rate", "100,all", "-b", "1,3"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["1", "100"], ["1", "all"], ["3", "100"], ["3", "all"]]
    assert all(float(row[3]) > 0 for row in rows)


def test_times_and_lengths_are_those_asked_for() -> None:
    options = arrivals.parse(["--requests", "2000", "-p", "9", "-n", "1", "--rate", "4"])
    asked, again = (arrivals.arrivals(options, rate, 100) for rate in (4.0, np.inf))
    assert {len(a.prompt) for a in asked} == {5, 6, 7, 8, 9} and {a.generate for a in asked} == {1}
    assert asked[0].seconds == 0 and 450 < asked[-1].seconds < 550 and {a.seconds for a in again} == {0.0}
    assert [len(a.prompt) for a in asked] == [len(a.prompt) for a in again]
    assert all(0 <= token < 100 for a in asked for token in a.prompt)
    assert [a.prompt for a in asked] != [a.prompt for a in again]


def test_a_request_waits_for_its_time_and_for_no_other() -> None:
    with LLM(default_model(), max_batch=2, max_seq_len=64) as llm:
        start = time.perf_counter()
        seconds, (late, early) = arrivals.serve(llm, [Arrival(0.3, [5, 6, 7], 2), Arrival(0.0, [5, 6], 3)])
        assert 0.3 < seconds <= time.perf_counter() - start
        assert len(late.token_ids) == 2 and len(early.token_ids) == 3
        assert late.timings.first_token_seconds < 0.3, "counted from its arrival"


def test_what_goes_wrong_in_a_request_is_raised() -> None:
    start = time.perf_counter()
    with LLM(default_model(), max_batch=1, max_seq_len=8) as llm, pytest.raises(UsageError, match="the prompt has 9"):
        arrivals.serve(llm, [Arrival(60.0, [1], 1), Arrival(0.0, [1] * 9, 1)])
    assert time.perf_counter() - start < 60, "before the last one has arrived"


def test_a_single_token_has_none_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert arrivals.main(["--requests", "2", "-p", "4", "-n", "1", "--rate", "all", "-b", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| – |")


@pytest.mark.parametrize("arguments", [
    ["--rate", "0"], ["--rate", "1,-2"], ["--rate", "inf"], ["--rate", "nan"], ["--rate", "1e400"], ["--rate", "often"],
    ["--rate", ""], ["--requests", "0"], ["-b", "0"], ["-p", "0"], ["-n", "1000000"],
])  # fmt: skip
def test_misuse_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert arrivals.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo.arrivals: error: ") and error.count("\n") == 1
