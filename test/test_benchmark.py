"""The benchmark program: every row it promises, with a limit beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import benchmark
from engine.device.cpu import available_isas


def test_rows_come_with_the_share_of_the_limit(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    isa = available_isas()[0]
    arguments = [str(tiny), "-p", "20", "-n", "4", "-r", "2", "-t", "1", "--isa", isa, "--load", "-o", "json"]
    assert benchmark.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["test"].split()[0], r["isa"], r["threads"]) for r in rows] == [
        ("load", isa, 1), ("pp20", isa, 1), ("tg4", isa, 1)
    ]  # fmt: skip
    assert all(r["rate"] > 0 for r in rows)
    assert rows[0]["limit"] > 0 and rows[2]["limit"] > 0 and rows[2]["limit_share"] > 0


def test_a_token_reads_every_matrix_once_and_its_positions(tiny: Path) -> None:
    from engine import LLM

    with LLM(tiny, max_seq_len=64, max_batch=1) as llm:
        stored = (tiny / "model.safetensors").stat().st_size
        weights = benchmark.bytes_per_token(llm, 0)
        assert 0.95 * stored < weights < stored
        heads, head_dim, layers, bf16 = 2, 32, 2, 2
        assert benchmark.bytes_per_token(llm, 10) - weights == 10 * 2 * heads * head_dim * layers * bf16


@pytest.mark.parametrize("arguments, status", [(["--isa", "nope"], 2), (["-r", "0"], 2), (["-p", "x"], 2)])
def test_misuse_is_one_line(
    tiny: Path, arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert benchmark.main([str(tiny), *arguments]) == status
    except SystemExit as exit:
        assert exit.code == status
    assert "Traceback" not in capsys.readouterr().err
