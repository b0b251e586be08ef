"""A plan as the native library runs it: a list of functions and their arguments, handed over in one call."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import abi
from engine.cpu import huge_pages
from engine.device import Program, failure
from engine.errors import RillError

if TYPE_CHECKING:
    from engine.device.cpu import CPUDevice
    from engine.plan import Node, Plan


PANEL = int(abi.constants.PANEL)


class NativeProgram(Program):
    """The addresses of functions and argument structs, in order, and the scratch memory they share."""

    def __init__(self, device: CPUDevice, plan: Plan) -> None:
        self.device, self.plan = device, plan
        library, ffi = device.library, abi.ffi
        own = [(i, node) for i, node in enumerate(plan.nodes) if not node.op.collective]
        self.structs = [abi.fill_struct(node, device.pointer) for _, node in own]  # keeps them alive
        self.nodes = ffi.new("struct node[]", max(1, len(plan.nodes)))
        gated, scratch = find_gated(plan), 1
        for (i, node), struct in zip(own, self.structs, strict=True):
            self._bind(i, node, struct)
            name = "matmul_swiglu" if i in gated else node.op.name
            if i in gated:
                self.nodes[i].run_with_next = function(library, name, "run_with_next")
            if measure := getattr(library, f"{name}_scratch", None):
                rows = max((t.shape[0] for t in node.tensors.values() if t.rows is node.rows), default=1)
                scratch = max(scratch, measure(struct, device.threads, rows))
        self.scratch = huge_pages.reserve(scratch)
        self.scratch_pointer = ffi.cast("void *", abi.address(self.scratch))

    def _bind(self, i: int, node: Node, struct: Any) -> None:
        entry = self.nodes[i]
        entry.run = function(self.device.library, node.op.name, "run")
        entry.op = struct
        if self.device.adapts and hasattr(self.device.library, f"{node.op.struct or node.op.name}_work"):
            entry.work = function(self.device.library, f"{node.op.struct or node.op.name}_work", "work")

    def meet(self, meeting: Any) -> list[int]:
        collectives = [(i, node) for i, node in enumerate(self.plan.nodes) if node.op.collective]
        met = [(i, node) for i, node in collectives if self.device.runs(node.op.name)]
        for i, node in met:
            struct = abi.fill_struct(node, self.device.pointer)
            struct.meeting = meeting
            self.structs.append(struct)
            self._bind(i, node, struct)
        return [i for i, _ in met]

    def run(self, first: int, last: int, times: np.ndarray | None = None) -> None:
        device = self.device
        check_not_forked()
        filled = abi.ffi.NULL if times is None else abi.ffi.cast("struct node_times *", abi.address(times))
        status = device.library.plan_run(self.nodes + first, last - first, device.threads, 0, device.control,
                                         self.scratch_pointer, filled)  # fmt: skip
        if status:
            raise failure(status, device.control.detail)


def find_gated(plan: Plan) -> set[int]:
    """The products that are gate and up of a swiglu that comes next, whole panels of each, and of nothing else."""
    users, found = plan.users(), set()
    for i, (node, after) in enumerate(pairwise(plan.nodes)):
        if (node.op.name, after.op.name) == ("matmul", "swiglu"):
            out, gates = node.tensors["out"], after.tensors["out"].width
            alone = users[out.owner] == [i, i + 1] and out.owner not in plan.kept
            if alone and after.tensors["x"] is out and gates % PANEL == 0:
                found.add(i)
    return found


def function(library: Any, name: str, field: str) -> Any:
    """A function of the library as a field of struct node takes it."""
    return abi.ffi.cast(dict(abi.ffi.typeof("struct node").fields)[field].type, abi.ffi.addressof(library, name))


_thread_owner: int | None = None  # the process that has started OpenMP's threads


def check_not_forked() -> None:
    """Raises RillError in a child of a process that has used the engine: OpenMP would wait for ever for
    threads that the child does not have, even with a device of its own."""
    global _thread_owner
    if _thread_owner is None:
        _thread_owner = os.getpid()
    if os.getpid() != _thread_owner:
        raise RillError("this process was forked after the engine had started its threads: use the engine in the "
                        "child only, or start it with the spawn method")  # fmt: skip
