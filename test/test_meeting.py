"""The ranks of one machine sum up and gather in native code. Here they are threads of a process that share a memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from harness import isa_pairs

from engine import abi
from engine.cpu.program import function
from engine.device.cpu import CPUDevice
from engine.ranks.comm import sum_pairwise
from engine.ranks.split import Split

HALF = 600
ROUNDS = 7  # so that each half is written again and again


class Ranks:
    """Each with its own struct, all over the same memory."""

    def __init__(self, count: int) -> None:
        self.arrived = np.zeros((count, 8), np.int64)
        self.halves = np.full((2, HALF), np.nan, np.float32)
        self.meetings = [abi.ffi.new("struct meeting *") for _ in range(count)]
        for rank, meeting in enumerate(self.meetings):
            meeting.rank, meeting.ranks, meeting.half, meeting.patience = rank, count, HALF, 20
            meeting.arrived = abi.ffi.cast("int64_t *", abi.address(self.arrived))
            meeting.halves = abi.ffi.cast("float *", abi.address(self.halves))

    def run(self, device: CPUDevice, name: str, arrays: list[list[np.ndarray]], rows: int) -> None:
        """arrays: for each rank, what its nodes, one after the other, are about."""

        def one(meeting: Any, mine: list[np.ndarray]) -> int:
            count, control = abi.ffi.new("int32_t *", rows), abi.ffi.new("struct control *")
            nodes, structs = abi.ffi.new("struct node[]", len(mine)), []
            for node, x in zip(nodes, mine, strict=True):
                structs.append(abi.ffi.new(f"struct {name} *"))
                node.run, node.op = function(device.library, name, "run"), structs[-1]
                structs[-1].rows, structs[-1].x, structs[-1].x_width = count, pointer(x), x.shape[1]
                structs[-1].meeting = meeting
                if name == "gather":
                    structs[-1].x_stride = x.strides[0] // 4
            rest = control, abi.ffi.NULL, abi.ffi.NULL
            return int(device.library.plan_run(nodes, len(mine), device.threads, 0, *rest))

        with ThreadPoolExecutor(len(arrays)) as pool:
            assert not any(pool.map(one, self.meetings, arrays))
        assert all(meeting.waits % 2 == 0 for meeting in self.meetings)


def pointer(array: np.ndarray) -> Any:
    return abi.ffi.cast("float *", abi.address(array))


DEVICES = [device for pair in isa_pairs() for device in pair]
each_device = pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.isa}-{device.threads}")


@each_device
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 96), (3, 37), (15, 8)])
def test_sums_are_those_of_long_collectives_bit_for_bit(device: CPUDevice, count: int, rows: int, width: int) -> None:
    rng = np.random.default_rng(count)
    arrays = [[rng.standard_normal((rows + 2, width), np.float32) for _ in range(ROUNDS)] for _ in range(count)]
    expected = [[x.copy() for x in mine] for mine in arrays]  # of the rows that the step does not have
    for same in zip(*expected, strict=True):
        out = np.empty((rows, width), np.float32)
        sum_pairwise([x[:rows] for x in same], out)
        for x in same:
            x[:rows] = out
    Ranks(count).run(device, "all_reduce", arrays, rows)
    np.testing.assert_array_equal(arrays, expected)


@each_device
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (1, HALF), (4, 101)])
def test_rank_0_gathers_everyones_columns(device: CPUDevice, count: int, rows: int, width: int) -> None:
    rng = np.random.default_rng(count)
    arrays, expected = [], []
    whole = [rng.standard_normal((rows, width), np.float32) for _ in range(ROUNDS)]
    for rank in range(count):
        own = Split(rank, count).part(width)
        mine = [np.full((rows, width + 3), np.nan, np.float32)[:, :width] for _ in range(ROUNDS)]
        for x, right in zip(mine, whole, strict=True):
            x[:, own.start : own.stop] = right[:, own.start : own.stop]
        arrays.append(mine)
    expected = [x.copy() for x in arrays[1]]
    Ranks(count).run(device, "gather", arrays, rows)
    for x, right in zip(arrays[0], whole, strict=True):
        np.testing.assert_array_equal(x, right)
    for x, right in zip(arrays[1], expected, strict=True):
        np.testing.assert_array_equal(x, right)  # the others' stay as they are
