"""attention and sampling as a GPU in emulation computes them: few cases, since every thread is a fibre."""

from __future__ import annotations

import numpy as np
import pytest
from emulated_cuda import emulated_devices
from harness import (
    CACHE_DTYPES,
    AttentionCase,
    AttentionRig,
    assert_close,
    error_limit,
    exact_attention,
    sequences,
)

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
devices = pytest.mark.parametrize("device", emulated_devices(), ids=lambda device: device.description)
every_dtype = pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)


def assert_exact(device: CUDADevice, case: AttentionCase, dtype: np.dtype) -> None:
    data = sequences(case)
    whole = AttentionRig(device, case, dtype).run_whole(data)
    for output, sequence in zip(whole, data, strict=True):
        assert_close(output, exact_attention(case, sequence, dtype), error_limit(device, dtype), case)


@devices
@every_dtype
def test_standard(device: CUDADevice, dtype: np.dtype) -> None:
    for case in CASES:
        assert_exact(device, case, dtype)
