"""tools.cuda_bench: what it keeps, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import cuda_bench

ROW = {"case": "o", "by": "cuBLAS", "seconds": 0.5, "flops": 2e12, "times_ours": 0.25}


@pytest.mark.parametrize("beside", [{"rows": [ROW], "method": "Median"}, {"rows": [], "absent": "no PyTorch: none"}])
def test_pytorchs_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], beside: dict[str, Any]
) -> None:
    device = SimpleNamespace(description="GPU", read_limit=lambda: 1.0)
    monkeypatch.setattr(cuda_bench, "open_device", lambda name: device)
    monkeypatch.setattr(cuda_bench, "run", lambda command: SimpleNamespace(returncode=0, stdout="", stderr=""))
    monkeypatch.setattr(cuda_bench, "beside_pytorch", lambda asked: beside if asked is device else None)
    assert cuda_bench.main([str(tmp_path)]) == 0
    assert json.loads((tmp_path / "cuda.json").read_text())["beside_pytorch"] == beside
    table = tmp_path / "cuda-pytorch.md"
    assert table.exists() == bool(beside["rows"])
    line = "| o | cuBLAS | 500.0000 | 2.0 | 0.25 |" if beside["rows"] else "no PyTorch: none"
    assert line in capsys.readouterr().out and (not beside["rows"] or line in table.read_text())
