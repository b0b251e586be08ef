"""attention as a GPU in emulation computes it: few cases, since every thread is a fibre."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulated_cuda import EmulatedDriver, emulated_devices
from harness import (
    CACHE_DTYPES,
    AttentionCase,
    AttentionRig,
    Part,
    assert_close,
    assert_same_bits,
    error_limit,
    exact_attention,
    sequences,
)

from engine.abi import BFLOAT16, INT8
from engine.device.cuda import CUDADevice

CASES = (
    AttentionCase(4, 2, 8, (5, 1, 66)),
    AttentionCase(6, 2, 24, (65,)),
    AttentionCase(2, 1, 64, (64, 3), scale=0.3),
    AttentionCase(3, 1, 80, (20, 9)),
    AttentionCase(1, 1, 128, (70,)),
    AttentionCase(8, 1, 40, (12,)),
    AttentionCase(2, 1, 256, (9,)),
    AttentionCase(2, 2, 16, (130,), window=5),
    AttentionCase(2, 1, 32, (140,), window=70),
)
SINKS = (
    AttentionCase(4, 2, 16, (100, 3), window=20, sink=4, kind="streaming"),
    AttentionCase(2, 1, 40, (150,), window=70, sink=64, kind="streaming"),
)
LONG = (
    AttentionCase(3, 1, 40, (1100,), kind="streaming"),
    AttentionCase(5, 1, 8, (1200,), window=1050, sink=70, kind="streaming"),
    AttentionCase(1, 1, 384, (1030,), kind="streaming"),
)
devices = pytest.mark.parametrize("device", emulated_devices()[1:], ids=lambda device: device.description)
every_dtype = pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)


def assert_exact(device: CUDADevice, case: AttentionCase, dtype: np.dtype) -> None:
    data = sequences(case)
    whole = AttentionRig(device, case, dtype).run_whole(data)
    for output, sequence in zip(whole, data, strict=True):
        assert_close(output, exact_attention(case, sequence, dtype), error_limit(device, dtype), case)


@devices
@every_dtype
@pytest.mark.parametrize("kind", ["standard", "flash"])
def test_every_kind(device: CUDADevice, dtype: np.dtype, kind: str) -> None:
    """More than SPLIT_ROWS rows, and few."""
    for case in CASES:
        assert_exact(device, replace(case, kind=kind), dtype)


@devices
@every_dtype
def test_sinks(device: CUDADevice, dtype: np.dtype) -> None:
    for case in SINKS:
        assert_exact(device, case, dtype)


@devices
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 96, 128, 200, 256])
def test_flash_by_tensor_cores(device: CUDADevice, head_dim: int) -> None:
    """Rows of several sequences in a tile, tiles that begin within a sequence, windows."""
    for window in (None, 30):
        case = AttentionCase(2, 1, head_dim, (70, 5, 66), window, kind="flash")
        assert_exact(device, case, BFLOAT16)
        assert isinstance(device.driver, EmulatedDriver)
        assert device.driver.launched[-1].kernel.startswith("flash_attention_")


@devices
@every_dtype
def test_decode_over_ranges(device: CUDADevice, dtype: np.dtype) -> None:
    """One row of a long sequence: its ranges lie in blocks of their own. The cache is stored by steps of many rows."""
    for case in LONG:
        data, length = sequences(case), case.lengths[0]
        rig = AttentionRig(device, case, dtype)
        rig.store(data, [Part(0, 0, length)])
        exact = exact_attention(case, data[0], dtype)
        for first in (length - 1, 1024, 3):
            output = rig.run(data, [Part(0, first, first + 1)])[0]
            assert_close(output, exact[first : first + 1], error_limit(device, dtype), (case, first))


@pytest.mark.skipif(not emulated_devices(), reason="no C++ compiler for the emulation")
@pytest.mark.parametrize("dtype", [BFLOAT16, INT8], ids=str)
def test_the_order_of_threads_does_not_matter(dtype: np.dtype) -> None:
    forwards, backwards = emulated_devices()
    for case in (*(replace(case, kind=kind) for case in CASES[1:3] for kind in ("standard", "flash")), *SINKS):
        one, other = (AttentionRig(device, case, dtype).run_whole(sequences(case)) for device in (forwards, backwards))
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b, case)
