"""Threads share out what follows each other in memory: each its own part, then what others have not come to."""

from __future__ import annotations

import threading
from collections.abc import Collection
from itertools import groupby
from typing import Any

import pytest

from engine import abi
from engine.device.cpu import CPUDevice, available_isas

native = type(abi.ffi)()  # what native.h has for ops
native.cdef("""
struct range { int64_t begin, end; };
void share_out(void *me);
bool take_next(void *me, int64_t count, int64_t most, struct range *taken);
bool team_wait(void *me);
""")
Taken = dict[int, list[range]]  # by each thread, named by the first thing it took


def share_out(
    threads: int,
    count: int,
    most: int,
    domains: int = 0,
    stuck: Collection[int] = (),
    cancelled: bool = False,
) -> tuple[int, Taken]:
    """The status of a plan whose node takes everything, and what each thread took. stuck: threads whose first piece
    begins there are at it until everything is taken. cancelled: by whoever has taken something."""
    device = CPUDevice(available_isas()[-1], threads)
    path = abi.LIBRARIES / f"libengine_{device.isa}.so"
    library = native.dlopen(str(path))
    taken: Taken = {}
    begun, over = threading.Barrier(threads, timeout=20), threading.Event()

    def run(op: Any, me: Any) -> None:
        worker, some, mine = native.cast("void *", int(abi.ffi.cast("uintptr_t", me))), native.new("struct range *"), []
        library.share_out(worker)
        if not library.team_wait(worker):
            return
        while library.take_next(worker, count, most, some):
            mine.append(range(some.begin, some.end))
            if len(mine) == 1:
                taken[some.begin] = mine
                if count >= threads * most:
                    begun.wait()  # nobody is done before everybody has begun
            if sum(len(piece) for each in list(taken.values()) for piece in each) == count:
                over.set()
            if mine[0].start in stuck:
                over.wait(20)
            control.cancel = cancelled

    callback = abi.ffi.callback("void (const void *, struct worker *)", run)
    node = abi.ffi.new("struct node[1]")
    node[0].run = callback
    control = abi.ffi.new("struct control *")
    return device.library.plan_run(node, 1, threads, domains, control, abi.ffi.NULL, abi.ffi.NULL), taken


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "most"), [(0, 1), (1, 1), (2, 3), (64, 1), (64, 3), (257, 4), (1000, 100)])
def test_everything_is_taken_once(threads: int, count: int, most: int) -> None:
    status, taken = share_out(threads, count, most)
    assert status == 0
    pieces = [piece for mine in taken.values() for piece in mine]
    assert sorted(i for piece in pieces for i in piece) == list(range(count))
    assert all(len(piece) <= most for piece in pieces)


def test_each_begins_with_its_own_share_and_walks_straight() -> None:
    _, taken = share_out(4, 400, 7)
    assert sorted(taken) == [0, 100, 200, 300]
    for first, mine in taken.items():
        own = [piece for piece in mine if first <= piece.start < first + 100]
        assert own == mine[: len(own)] and [piece.start for piece in own] == sorted(piece.start for piece in own)


def test_who_is_done_helps_who_is_not() -> None:
    _, taken = share_out(3, 30, 1, stuck=[10])
    assert len(taken[10]) == 1 and len(taken[0]) + len(taken[20]) == 29


@pytest.mark.parametrize(("domains", "order"), [(1, [100, 200, 300, 0]), (2, [100, 0, 200, 300])])
def test_near_memory_comes_before_far(domains: int, order: list[int]) -> None:
    """Thread 1 does what the others have not come to. With two NUMA nodes, 0 is its neighbour."""
    _, taken = share_out(4, 400, 10, domains, stuck=[0, 200, 300])
    assert [first for first, _ in groupby(piece.start // 100 * 100 for piece in taken[100])] == order


def test_a_cancelled_plan_hands_out_no_more() -> None:
    status, taken = share_out(1, 100, 1, cancelled=True)
    assert status == abi.constants.STATUS_CANCELLED and [len(mine) for mine in taken.values()] == [1]
