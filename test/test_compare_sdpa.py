"""tools.compare_sdpa, with a stand-in where PyTorch would be."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tools import compare_sdpa


def standin(calls: list[tuple[Any, ...]]) -> Any:
    """As much of PyTorch as the program asks for. Notes the shapes and dtypes that it is to attend to."""

    def attend(*inputs: Any, is_causal: bool) -> None:
        assert is_causal
        calls.append(inputs)

    return SimpleNamespace(
        __version__="2.0", float32="f32", bfloat16="bf16", set_num_threads=calls.append, get_num_threads=lambda: 1,
        randn=lambda *shape, dtype: (shape, dtype), inference_mode=contextlib.nullcontext,
        nn=SimpleNamespace(functional=SimpleNamespace(scaled_dot_product_attention=attend)),
    )  # fmt: skip


def test_both_attend_to_the_same_shapes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "torch", standin(calls))
    assert compare_sdpa.main(["--lengths", "8,20", "-t", "1", "-r", "2"]) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if " ms " in line]
    assert rows == [["| float32", "8"], ["| float32", "20"], ["| bfloat16", "8"], ["| bfloat16", "20"]]
    assert calls[0] == 1, "as many threads"
    asked = [inputs[0] for inputs in calls[1:]]
    expected = [((1, 16, n, 128), dtype) for dtype in ("f32", "bf16") for n in (8, 20)]
    assert asked == [each for each in expected for _ in range(3)], "one round to warm up and two"


def test_without_pytorch_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert compare_sdpa.main([]) == 1
    assert "there is no PyTorch to compare with" in capsys.readouterr().err


def test_a_dtype_that_pytorch_does_not_attend_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_sdpa.main(["--kv-dtype", "int8"]) == 2
    assert "expected float32, bfloat16 or float16, got 'int8'" in capsys.readouterr().err
