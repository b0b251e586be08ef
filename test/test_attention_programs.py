"""The programs over one attention node: the rig that they share, demo.attention and demo.benchmark_plot."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import CACHE_DTYPES, host_devices, rounds_to_bf16

from demo import attention, attention_sweep, benchmark_plot
from demo.attention_rig import AttentionRig, AttentionShape, scratch_bytes
from engine.abi import FLOAT32, INT8
from engine.device.cpu import available_isas
from engine.errors import UsageError

Out = pytest.CaptureFixture[str]
SHAPES = (
    AttentionShape(4, 2, 16, (130,)),
    AttentionShape(3, 1, 24, (70, 5, 129), window=20),
    AttentionShape(4, 4, 32, (200, 40), window=30, sink=7),
)


# The rig.


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["full", "window", "sinks"])
def test_the_rig_computes_what_numpy_means(shape: AttentionShape, dtype: np.dtype) -> None:
    for device in host_devices():
        for kind in ["streaming"] if shape.sink else ["standard", "flash", "streaming"]:
            rig = AttentionRig(device, shape, kind, dtype)
            rig.store()
            limit = 1e-5 if dtype == FLOAT32 else 0.02 if rounds_to_bf16(device, dtype) else 1e-4
            limit = 3e-4 if dtype == INT8 else limit  # queries and weights are rounded to 16 bits
            assert rig.error() <= limit, (device.description, kind)
            assert len(rig.output()) == sum(shape.lengths)
            rig.select(3)
            assert rig.error() <= limit and len(rig.output()) == 3 * len(shape.lengths)


def test_the_rig_attends_to_what_it_stored_in_parts() -> None:
    """A cache longer than a step: every position counts, and is random."""
    device = host_devices()[-1]
    shape = AttentionShape(2, 1, 16, (1200,))
    rig = AttentionRig(device, shape, "flash", rows=1)
    rig.store()
    keys = device.download(rig.kv)[:, 0].reshape(-1, 16)[:1200]
    assert rig.capacity == 512 and len(np.unique(keys[:, 0])) == 1200
    assert rig.error() <= 1e-5 and rig.output().shape == (1, 32)


def test_the_rig_finds_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = AttentionRig(host_devices()[-1], AttentionShape(2, 2, 16, (40,)))
    rig.store()
    assert rig.error() <= 1e-5
    rig.out.storage[17, 3] += 0.5
    monkeypatch.setattr(rig, "attend", lambda: None)
    assert rig.error() == pytest.approx(0.5, abs=1e-4)
    rig.out.storage[5, 5] = np.nan
    assert rig.error() == np.inf


@pytest.mark.parametrize("shape", SHAPES, ids=["full", "window", "sinks"])
def test_scores_are_counted(shape: AttentionShape) -> None:
    for rows in (None, 1, 33):
        count = 0
        for length in shape.lengths:
            for row in range(max(0, length - (rows or length)), length):
                near = [p for p in range(row + 1) if shape.window is None or row - p < shape.window]
                count += len({*near, *range(min(shape.sink, row + 1))})
        assert shape.scores(rows) == count


def test_sinks_are_for_streaming() -> None:
    with pytest.raises(UsageError, match="sink 2: belongs to streaming"):
        AttentionRig(host_devices()[0], AttentionShape(2, 2, 16, (9,), window=4, sink=2), "flash")


def test_scratch_is_the_attention_nodes_share_of_a_thread() -> None:
    def scratch(kind: str, length: int) -> int:
        found = scratch_bytes(AttentionRig(host_devices()[-1], AttentionShape(2, 2, 16, (length,)), kind).plan)
        assert found is not None
        return found

    assert scratch("standard", 4096) > scratch("standard", 1024) + 4 * 3072
    assert scratch("flash", 4096) == scratch("flash", 1024) > 0
    assert scratch_bytes(AttentionRig(host_devices()[0], AttentionShape(2, 2, 16, (9,))).plan) is None


# demo.attention.


def test_dense_and_streaming_are_compared_and_checked(capsys: Out) -> None:
    assert attention.main(["200", "16", "4", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "-r", "1"]) == 0
    first, *_, verdict = capsys.readouterr().out.splitlines()
    assert first.startswith("4 heads of 32 on 2, 200 positions, window 16, sinks 4; cpu ")
    assert verdict.startswith("PASS: largest difference from NumPy over 128 rows and the last one alone: dense ")


def test_the_work_ratio_and_speed_up_belong_to_the_times(capsys: Out) -> None:
    assert attention.main(["128", "16", "16", "--heads", "2", "--head-dim", "16", "-r", "2"]) == 0
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "ms" in line]
    assert [c[0] for c in cells] == ["| 128 rows in one step", "| the last row alone"]
    assert [c[4] for c in cells] == [f"{128 * 129 / 2 / (32 * 33 / 2 + 96 * 32):.1f}× |", "4.0× |"]
    for _, *times, speed_up, _ in cells:  # times are printed to the microsecond, the speed-up to a tenth
        dense, streaming = (float(time.removesuffix(" ms")) for time in times)
        least, most = (dense - 6e-4) / (streaming + 6e-4), (dense + 6e-4) / max(streaming - 6e-4, 1e-9)
        assert least - 0.06 <= float(speed_up.removesuffix("×")) <= most + 0.06


def test_a_wrong_result_fails(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    right = AttentionRig.output
    monkeypatch.setattr(AttentionRig, "attend", lambda self: self.kind == "flash" and self.plan.run(self.first))
    assert attention.main(["100", "16", "4", "--heads", "2", "--head-dim", "16", "-r", "1"]) == 1
    assert "\nFAIL: largest difference from NumPy" in capsys.readouterr().out and right is AttentionRig.output


# demo.benchmark_plot.

SMALL = ("--T-min", "32", "--T-max", "150", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "-r", "1")


def test_a_sweep_leaves_a_table_a_plot_and_its_numbers(tmp_path: Path, capsys: Out) -> None:
    prefix = tmp_path / "sweep.v1"
    arguments = [*SMALL, "--window", "16", "--sink", "4", "-t", "1", "-o", str(prefix)]
    assert benchmark_plot.main(arguments) == 0
    out, err = capsys.readouterr()
    content = json.loads((tmp_path / "sweep.v1.json").read_text())
    assert [point["T"] for point in content["points"]] == [32, 64, 128]
    for point, line in zip(content["points"], out.splitlines()[2:], strict=True):
        assert point["speed_up"] == pytest.approx(point["dense"] / point["streaming"])
        numbers = [float(text) for text in re.findall(r"[\d.]+", line)]
        expected = [point["T"], point["dense"] * 1e3, point["streaming"] * 1e3, point["speed_up"]]
        assert numbers == pytest.approx(expected, abs=0.006)
    assert content["settings"] == {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 16, "sink": 4, "iters": 1}
    assert content["machine"]["threads"] == 1 and {"rill", "python", "numpy"} <= content["versions"].keys()
    assert (tmp_path / "sweep.v1.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["sweep.v1.json", "sweep.v1.png"]
    assert err.splitlines() == [f"demo.benchmark_plot: T = {T}" for T in (32, 64, 128)]


def test_what_takes_too_long_is_not_run(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock ticks once a score, so that dense attention of 128 rows takes 8256 seconds, and of 32 rows 528."""
    monkeypatch.setattr(benchmark_plot, "PATIENCE", 3000.0)
    monkeypatch.setattr(benchmark_plot, "seconds", lambda attend: attend.__self__.shape.scores())
    assert benchmark_plot.main([*SMALL, "--window", "16", "-o", str(tmp_path / "sweep")]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    streaming = [AttentionShape(lengths=(T,), window=16).scores() for T in (32, 64, 128)]
    assert lines == [
        f"| 32 | 528000.000 | {streaming[0]}000.000 | {528 / streaming[0]:.2f}× |",
        f"| 64 | 2080000.000 | {streaming[1]}000.000 | {2080 / streaming[1]:.2f}× |",
        f"| 128 | not run | {streaming[2]}000.000 |  |",
    ]
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [point["dense"] for point in points] == [528, 2080, None] and points[2]["speed_up"] is None


def test_the_first_point_is_predicted_too(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_plot, "PATIENCE", 0.0)
    arguments = ["--T-min", "128", "--T-max", "128", "--heads", "2", "--head-dim", "16", "-o", str(tmp_path / "sweep")]
    assert benchmark_plot.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "| 128 | not run | not run |  |" in out and err.endswith("no plot: not one point was run\n")


def test_a_plot_of_one_curve_alone(tmp_path: Path) -> None:
    benchmark_plot.plot([benchmark_plot.Point(64, None, 0.5)], "streaming", "title", tmp_path / "alone.png")
    assert (tmp_path / "alone.png").exists()


def test_without_matplotlib_the_table_is_there(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert benchmark_plot.main([*SMALL, "-o", str(tmp_path / "sweep")]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5 and (tmp_path / "sweep.json").exists()
    assert err.splitlines()[-1] == (
        "demo.benchmark_plot: error: no plot without matplotlib: pip install 'rill-engine[plot]'"
    )
    assert not (tmp_path / "sweep.png").exists()


@pytest.mark.parametrize(
    ("program", "arguments", "status", "fragment"),
    [
        (attention, ["0"], 2, "T: expected a positive number, got 0"),
        (attention, ["64", "x"], 2, "WINDOW: expected a whole number"),
        (attention, ["64", "8", "-1"], 2, "-1"),
        (attention, ["64", "--heads", "6", "--kv-heads", "4"], 2, "6 heads do not divide by 4"),
        (attention, ["64", "--isa", "mmx"], 2, "isa 'mmx'"),
        (benchmark_plot, ["--T-min", "64", "--T-max", "32"], 2, "--T-max: 32 is less than --T-min 64"),
        (benchmark_plot, ["--sink", "4"], 2, "--sink: needs --window"),
        (benchmark_plot, ["--device", "tpu"], 2, "device 'tpu'"),
        (benchmark_plot, [*SMALL, "-o", "/nowhere/at/all"], 2, "--output /nowhere/at/all: /nowhere/at is no directory"),
    ],
)
def test_misuse_is_one_line(program: object, arguments: list[str], status: int, fragment: str, capsys: Out) -> None:
    assert program.main(arguments) == status  # type: ignore[attr-defined]
    errors = [line for line in capsys.readouterr().err.splitlines() if ": T = " not in line]
    assert len(errors) == 1 and "error: " in errors[0] and fragment in errors[0]


# demo.attention_sweep.


def test_the_sweep_measures_every_kind_and_what_would_take_too_long_is_not_run(
    capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    isa = available_isas()[-1]
    assert attention_sweep.main(["--lengths", "4,70", "--isa", isa, "--kv-dtype", "bfloat16", "-r", "1", "-t", "1",
                                 "-o", "json"]) == 0  # fmt: skip
    points = json.loads(capsys.readouterr().out)
    assert {(p["test"], p["length"], p["attention"]) for p in points} == {
        (test, length, kind) for test in ("prefill", "decode") for length in (4, 70)
        for kind in ("standard", "flash", "streaming")
    }  # fmt: skip
    assert all(p["isa"] == isa and p["share"] == p["rate"] / p["limit"] > 0 for p in points)
    bytes_read = 70 * 2 * 16 * 128 * 2
    assert [p["rate"] * p["seconds"] for p in points if p["test"] == "decode"][-1] == pytest.approx(bytes_read)
    monkeypatch.setattr(attention_sweep, "TOO_LONG", 0.0)
    assert attention_sweep.main(["--lengths", "4", "--isa", isa, "--kv-dtype", "int8", "-t", "1"]) == 0
    assert capsys.readouterr().out.count("not run") == 6


@pytest.mark.parametrize("arguments", [["--isa", "z80"], ["--lengths", "many"]])
def test_the_sweep_refuses_in_one_line(arguments: list[str], capsys: Out) -> None:
    assert attention_sweep.main(["-t", "1", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
