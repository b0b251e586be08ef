"""Attention of many rows as a Hopper GPU in emulation computes it, and when it does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated_cuda import EmulatedDriver, emulated_hopper, library
from harness import (
    AttentionCase,
    AttentionRig,
    Part,
    assert_close,
    assert_same_bits,
    error_limit,
    exact_attention,
    sequences,
)

from engine import abi
from engine.abi import BFLOAT16, FLOAT32
from engine.cuda import hopper
from engine.cuda.launches import TensorMap, row_bytes
from engine.device.cuda import CUDADevice
from engine.errors import RillError
from engine.kvcache import PAGE
from engine.ops.kv_store import Ring

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler for the emulation")
devices = pytest.mark.parametrize("device", emulated_hopper(), ids=lambda device: device.description)


def kernel(device: CUDADevice) -> str:
    """What the last node became."""
    assert isinstance(device.driver, EmulatedDriver)
    return device.driver.launched[-1].kernel


def assert_exact(device: CUDADevice, case: AttentionCase) -> list[np.ndarray]:
    data = sequences(case)
    outputs = AttentionRig(device, case, BFLOAT16).run_whole(data)
    assert kernel(device) == f"flash_attention_hopper_{64 if case.head_dim <= 64 else 128}", case
    for output, sequence in zip(outputs, data, strict=True):
        assert_close(output, exact_attention(case, sequence, BFLOAT16), error_limit(device, BFLOAT16), case)
    return outputs


@devices
@pytest.mark.parametrize("head_dim", [8, 40, 63, 64, 65, 80, 96, 128])
def test_every_width(device: CUDADevice, head_dim: int) -> None:
    """Rows of several sequences in a tile, tiles that begin within a sequence."""
    assert_exact(device, AttentionCase(2, 1, head_dim, (70, 5, 66), kind="flash"))
    assert isinstance(device.driver, EmulatedDriver)
    cache = device.driver.launched[-1].map
    assert cache and cache.columns * 2 == cache.stride == row_bytes(head_dim, 2), "the next position is outside"


@devices
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (8, 2), (8, 1)], ids=str)
def test_groups_of_heads(device: CUDADevice, heads: tuple[int, int]) -> None:
    assert_exact(device, AttentionCase(*heads, 64, (20, 50), kind="flash"))


@devices
@pytest.mark.parametrize("lengths", [(17,), (63,), (64,), (65,), (127,), (128,), (129,), (64, 64, 1), (63, 1, 65),
                                     (300,), (1,) * 140, (3, 600)],
                         ids=lambda lengths: f"{len(lengths)} of {max(lengths)}")  # fmt: skip
def test_lengths(device: CUDADevice, lengths: tuple[int, ...]) -> None:
    """Around tiles, warpgroups and pages; more pages than the ring has room for; sequences of one row."""
    assert_exact(device, AttentionCase(1, 1, 128, lengths, kind="flash"))


@devices
@pytest.mark.parametrize("window", [1, 2, 30, 63, 64, 65, 128, 150])
def test_windows(device: CUDADevice, window: int) -> None:
    assert_exact(device, AttentionCase(1, 1, 64, (330, 40), window, kind="flash"))


@devices
@pytest.mark.parametrize("window", [None, 90])
def test_chunks_have_the_bits_of_the_whole(device: CUDADevice, window: int | None) -> None:
    """Positions that begin anywhere, and pages that take turns."""
    ring = Ring(0, -(-(90 + 100) // PAGE) + 1) if window else Ring(0, 0)
    case = AttentionCase(1, 1, 64, (350, 130), window, kind="flash")
    data, whole = sequences(case), assert_exact(device, case)
    for chunk in (100, 64):
        chunks = AttentionRig(device, replace(case, ring=ring), BFLOAT16).run_chunks(data, chunk)
        for output, expected in zip(chunks, whole, strict=True):
            assert_same_bits(output, expected, (window, chunk))


@devices
def test_rows_in_any_order(device: CUDADevice) -> None:
    """Sequences that come back in a tile, later positions first."""
    case = AttentionCase(2, 1, 40, (100, 40), kind="flash")
    data = sequences(case)
    rig = AttentionRig(device, case, BFLOAT16)
    rig.store(data, [Part(slot, 0, length) for slot, length in enumerate(case.lengths)])
    parts = [Part(0, 60, 100), Part(1, 10, 40), Part(0, 0, 60), Part(1, 0, 10)]
    exact = [exact_attention(case, sequence, BFLOAT16) for sequence in data]
    for part, output in zip(parts, rig.run(data, parts), strict=True):
        assert_close(output, exact[part.slot][part.start : part.stop], error_limit(device, BFLOAT16), part)


@devices
def test_scores_of_any_size(device: CUDADevice) -> None:
    """Maxima that rise from page to page, to where an exponential alone would overflow, and scores all below -5e4."""
    case = AttentionCase(1, 1, 64, (200,), scale=1.0, kind="flash")
    for sign in (1, -1):
        (sequence,) = sequences(case)
        size = np.linspace(1, 90, 200, dtype=np.float32)[:, None, None]
        sequence = replace(sequence, q=np.full_like(sequence.q, 16 * sign), k=np.ones_like(sequence.k) * np.round(size))
        output = AttentionRig(device, case, BFLOAT16).run_whole([sequence])[0]
        assert_close(output, exact_attention(case, sequence, BFLOAT16), error_limit(device, BFLOAT16), sign)


def test_the_order_of_threads_does_not_matter() -> None:
    for case in (AttentionCase(2, 1, 80, (70, 5, 130), 50), AttentionCase(1, 1, 64, (400,))):
        case = replace(case, kind="flash")
        one, other = (assert_exact(device, case) for device in emulated_hopper())
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b, case)


def test_what_goes_to_other_kernels() -> None:
    """Few rows, sinks, wide heads, a cache of another dtype; everything where nobody asked for Hopper's."""
    device, flash = emulated_hopper()[0], AttentionCase(2, 1, 64, (20,), kind="flash")
    cases = [(replace(flash, lengths=(16,)), BFLOAT16), (replace(flash, head_dim=136), BFLOAT16), (flash, FLOAT32),
             (replace(flash, kind="streaming", window=8, sink=4), BFLOAT16)]  # fmt: skip
    for case, dtype in cases:
        AttentionRig(device, case, dtype).run_whole(sequences(case))
        assert "hopper" not in kernel(device), case
    assert_exact(device, replace(flash, kind="streaming", window=8))
    plain = CUDADevice(EmulatedDriver(library()))
    AttentionRig(plain, flash, BFLOAT16).run_whole(sequences(flash))
    assert kernel(plain) == "flash_attention_64"


def test_it_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = EmulatedDriver(library())
    for value, wanted in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("RILL_CUDA_HOPPER", value)
        device = CUDADevice(driver)
        assert device.hopper == wanted and ("attention by wgmma" in device.description) == wanted
    driver.hopper = False
    with pytest.raises(RillError, match=r"RILL_CUDA_HOPPER=1 is for GPUs of compute capability 9\.0.*: emulated GPU$"):
        CUDADevice(driver)


GOOD = TensorMap(address=1 << 20, rows=128, columns=64, stride=128, box_rows=64, box_columns=64)


@pytest.mark.parametrize(
    "change", [{"address": 8}, {"rows": 0}, {"stride": 24}, {"box_rows": 257}, {"box_columns": 72}], ids=str
)
def test_a_tensor_map_that_is_refused(change: dict[str, Any]) -> None:
    assert len(hopper.encode(library(), GOOD)) == 128
    with pytest.raises(RillError, match="a tensor map of .*: the driver reports error 1"):
        hopper.encode(library(), GOOD._replace(**change))


def test_what_the_driver_is_told() -> None:
    """Rows and columns, and numbers of cuda.h."""
    told: list[Any] = []

    def note(at: Any, *rest: Any) -> int:
        told.extend([int(abi.ffi.cast("uintptr_t", at)) % 64, *rest])
        return 0

    hopper.encode(SimpleNamespace(cuTensorMapEncodeTiled=note), GOOD)
    aligned, dtype, rank, start, sizes, strides, box, steps, *modes = told
    assert (aligned, dtype, rank, int(abi.ffi.cast("uintptr_t", start))) == (0, 9, 2, 1 << 20)
    assert ([*sizes], [*strides], [*box], [*steps]) == ([64, 128], [128], [64, 64], [1, 1])
    assert modes == [0, 3, 3, 0]
