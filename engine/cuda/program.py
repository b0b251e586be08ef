"""A lowered plan on a GPU: launches, recorded or not, one after the other on the device's stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine import abi
from engine.cuda import cublas, hopper, launches
from engine.cuda.cublas import Gemm
from engine.cuda.fusion import Group, find_groups
from engine.cuda.launches import Launch
from engine.cuda.persistent import Persistent, struct_bytes
from engine.device import Program
from engine.plan import nbytes

if TYPE_CHECKING:
    from engine.device.cuda import CUDADevice
    from engine.plan import Node, Plan, Tensor

MAX_RECORDED = 256  # steps of different shapes that are recorded, in each segment


class Bound(NamedTuple):
    """A launch, what it takes, and what makes it."""

    launch: Launch | Gemm
    structs: tuple[Any, ...]
    call: Callable[[], None]


class Piece(NamedTuple):
    """Launches in place of `nodes`. main: the node that their time is noted at."""

    nodes: range
    main: int
    launches: list[Bound]


class CUDAProgram(Program):
    """Every node's launches, made when a number of rows is first met. Of few rows, groups of nodes are fused.
    Collectives are the host's, and what is replayed ends before them."""

    whole = True  # nodes are fused and recorded together, and a segment is soon over

    def __init__(self, device: CUDADevice, plan: Plan) -> None:
        self.device, self.driver, self.nodes = device, device.driver, plan.nodes
        self.structs = [None if node.op.collective else abi.fill_struct(node, device.address) for node in plan.nodes]
        groups = find_groups(plan, self.structs, device.address) if device.fuses else []
        self.groups = {group.nodes.start: group for group in groups}
        self.counts = list({node.rows: None for node in plan.nodes})
        self.mirrors = {device.mirrors[t] for node in plan.nodes for t in [*node.tensors.values(), node.rows]
                        if t in device.mirrors}  # fmt: skip
        self.cublas, self.hopper = device.cublas, device.hopper
        self.scratch = device.scratch(max(self._scratch_bytes(), 1))
        collectives = [node for node in plan.nodes if node.op.collective]
        self.max_recorded = MAX_RECORDED * (1 + len(collectives))
        if collectives:  # no step has to wait for more memory
            self.driver.staging(max(map(exchanged_bytes, collectives)))
        self.alone: dict[tuple[int, int], Piece] = {}  # (node, rows) -> piece
        self.fused: dict[tuple[int, int], list[Piece]] = {}  # (first node of a group, rows) -> pieces
        self.persistent = Persistent(device) if device.persists else None
        self.merged: dict[Any, list[Callable[[], None]]] = {}  # by shapes of steps
        self.met: set[Any] = set()  # shapes of steps that have been seen once
        self.recorded: dict[Any, Callable[[], None]] = {}

    def _scratch_bytes(self) -> int:
        """The most that any launch needs: of all rows, or of as many as are still cut into ranges."""
        most = 0
        own = [(i, node) for i, node in enumerate(self.nodes) if not node.op.collective]
        for i, node in own:
            for rows in {max_rows(node), min(max_rows(node), int(launches.n.SPLIT_ROWS))}:
                most = max(most, *(launch.share * launch.shares for launch in self._launches(i, rows)))
        return most

    def _launches(self, index: int, rows: int) -> list[Launch | Gemm]:
        name, struct = self.nodes[index].op.name, self.structs[index]
        if self.cublas and name == "matmul" and cublas.takes(struct, rows):
            return cublas.matmul(struct, rows)
        if self.hopper and hopper.takes(name, struct, rows):
            return [*hopper.flash_attention(struct, rows)]
        found: list[Launch | Gemm] = getattr(launches, name)(struct, rows)
        return found

    def _pieces(self, first: int, last: int, rows: dict[Tensor, int]) -> Iterator[Piece]:
        """Of nodes [first, last): a group is fused if all of it is among them."""
        while first < last:
            group, count = self.groups.get(first), rows[self.nodes[first].rows]
            fused = group is not None and count <= launches.n.FEW and group.nodes.stop <= last
            pieces = self._fused(group, count) if group and fused else [self._alone(first, count)]
            yield from pieces
            first = pieces[-1].nodes.stop

    def _alone(self, index: int, rows: int) -> Piece:
        key = index, rows
        if key not in self.alone:
            bound = [self._bind(launch, self.structs[index]) for launch in self._launches(index, rows)]
            self.alone[key] = Piece(range(index, index + 1), index, [each for each in bound if each])
        return self.alone[key]

    def _fused(self, group: Group, rows: int) -> list[Piece]:
        key = group.nodes.start, rows
        if key not in self.fused:
            bound = [(part, self._bind(part.launch(rows), *part.structs)) for part in group.parts]
            self.fused[key] = [Piece(part.nodes, part.main, [each] if each else []) for part, each in bound]
        return self.fused[key]

    def _bind(self, launch: Launch | Gemm, *structs: Any) -> Bound | None:
        """A launch, ready to be called; None where it has no blocks."""
        if isinstance(launch, Gemm):
            call = self.cublas.bind(launch, structs[0], self.scratch.address)  # type: ignore[union-attr]
            return Bound(launch, structs, call)
        if min(launch.grid) == 0:
            return None
        team = np.array([self.device.control.address, self.scratch.address, launch.share], np.uint64)  # of common.cuh
        return Bound(launch, structs, self.driver.bind(launch, struct_bytes(structs) + team.tobytes()))

    def begin(self) -> None:
        for mirror in self.mirrors:
            mirror.send()

    def run(self, first: int, last: int, times: np.ndarray | None = None) -> None:
        """Before a collective, it is left to Device.exchanged to wait, and to raise."""
        rows = {tensor: int(tensor.storage[0]) for tensor in self.counts}
        if times is not None:
            self._run_timed(first, last, rows, times)
        else:
            self._replay(first, last, rows)
        if last == len(self.nodes) or not self.nodes[last].op.collective:
            self.device.wait()

    def _replay(self, first: int, last: int, rows: dict[Tensor, int]) -> None:
        """Launches; what is asked for a second time is recorded, where the driver can, and from then on one launch."""
        key = (first, last, *rows.values())
        if key in self.recorded:
            self.recorded[key]()
        elif key in self.met and self.driver.records and len(self.recorded) < self.max_recorded:
            # All of it, whatever becomes of this step: it is for later ones, too.
            self.recorded[key] = self.driver.record(lambda: self._launch(self._calls(first, last, rows)))
            self.recorded[key]()
        else:
            self._launch(takewhile(lambda _: not self.device.stop, self._calls(first, last, rows)))
            if len(self.met) >= self.max_recorded:
                self.met.clear()
            if not self.device.stop:  # all launches have been made once, and what they load is loaded
                self.met.add(key)

    def _calls(self, first: int, last: int, rows: dict[Tensor, int]) -> Iterable[Callable[[], None]]:
        """All launches, as they are bound one after the other, or merged."""
        bound = (each for piece in self._pieces(first, last, rows) for each in piece.launches)
        if not self.persistent or max(rows.values()) > launches.n.FEW:
            return (each.call for each in bound)
        key = (first, last, *rows.values())
        if key not in self.merged:
            self.merged[key] = self.persistent.merge(bound, self._bind)
        return self.merged[key]

    def _launch(self, calls: Iterable[Callable[[], None]]) -> None:
        for call in calls:
            call()

    def _run_timed(self, first: int, last: int, rows: dict[Tensor, int], times: np.ndarray) -> None:
        """The nodes before and after the main one of a piece take no time, since they have none of their own."""
        pieces, marks = list(self._pieces(first, last, rows)), [self.driver.mark()]
        for piece in pieces:
            for bound in [] if self.device.stop else piece.launches:
                bound.call()
            marks.append(self.driver.mark())
        at = self.driver.nanoseconds(marks)
        for piece, begin, end in zip(pieces, at, at[1:], strict=False):
            for i in piece.nodes:
                started, ended = end if i > piece.main else begin, begin if i < piece.main else end
                times[0, i - first] = started, ended, ended  # nobody to wait for


def exchanged_bytes(node: Node) -> int:
    """What a collective's tensors take at most."""
    return sum(nbytes(tensor) for tensor in node.tensors.values())


def max_rows(node: Node) -> int:
    return max((t.shape[0] for t in node.tensors.values() if t.rows is node.rows), default=1)
