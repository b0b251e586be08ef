"""Tensors, nodes and plans: a model is recorded once as a flat list of nodes and replayed for every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import RillError, UsageError

if TYPE_CHECKING:
    from engine.device import Device, Program
    from engine.profile import Profile


@dataclass(eq=False)
class Tensor:
    """A buffer on a device. Activations are [rows, width]: shape[0] is the most rows a step may have, `rows` counts
    those of the step at hand. A view (`base` set) is some columns of another tensor.

    `layout` is how a device may store it: "dense"; "matrix", packed for multiplication; "cache", pages of keys and
    values. The logical array is the same everywhere.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str = ""
    plan: Plan | None = None
    rows: Tensor | None = None
    base: Tensor | None = None
    column: int = 0
    layout: str = "dense"
    group: int = 0  # of a quantised matrix: inputs that share a scale
    storage: Any = None  # the device's own, set once

    @property
    def width(self) -> int:
        return self.shape[-1]

    @property
    def stride(self) -> int:
        """Elements from one row to the next."""
        return self.base.width if self.base else self.width

    @property
    def owner(self) -> Tensor:
        """The tensor whose storage this one lies in."""
        return self.base or self

    def columns(self, start: int, stop: int) -> Tensor:
        """A view of columns [start, stop)."""
        if not 0 <= start < stop <= self.width:
            raise UsageError(f"{self.name}: columns {start}..{stop} of {self.width}")
        return Tensor((*self.shape[:-1], stop - start), self.dtype, f"{self.name}[{start}:{stop}]", self.plan,
                      self.rows, self.owner, self.column + start)  # fmt: skip


@dataclass(frozen=True)
class Op:
    """What a node does. `meaning` is its NumPy definition: it gets the logical array of every tensor and every scalar
    by name, and writes into the arrays named in `writes`. Native code has a function of that name, which takes the
    struct of abi.h called `struct`, by default likewise."""

    name: str
    meaning: Callable[..., None]
    writes: tuple[str, ...]
    struct: str = ""
    collective: bool = False  # all ranks do it together, by Comm's method of that name or in native code (segments.py)


def op(*writes: str, collective: bool = False) -> Callable[[Callable[..., None]], Op]:
    """Makes an Op of its NumPy meaning."""
    return lambda meaning: Op(meaning.__name__, meaning, writes, collective=collective)


@dataclass(eq=False)
class Node:
    """One op with its tensors and scalars, the same on every device. `label` names the layer it belongs to."""

    op: Op
    tensors: dict[str, Tensor]
    scalars: dict[str, float]
    label: str = ""
    absent: frozenset[str] = frozenset()  # tensors that the op can do without

    @property
    def rows(self) -> Tensor:
        rows = self.tensors[self.op.writes[0]].rows or next(t.rows for t in self.tensors.values() if t.rows)
        assert rows is not None
        return rows

    @property
    def written(self) -> list[Tensor]:
        return [self.tensors[name] for name in self.op.writes]


@dataclass(eq=False)
class Plan:
    """The recorded nodes. `lower` binds them to a device, once; `run` replays them."""

    device: Device
    nodes: list[Node] = field(default_factory=list)
    kept: set[Tensor] = field(default_factory=set)
    program: Program | None = None
    profile: Profile | None = None  # times the replays while there is one

    def new(self, width: int, like: Tensor, name: str, dtype: np.dtype | None = None) -> Tensor:
        """An activation of as many rows as `like`. Its storage is chosen when the plan is lowered."""
        return Tensor((like.shape[0], width), dtype or np.dtype(np.float32), name, self, like.rows)

    def keep(self, tensor: Tensor) -> Tensor:
        """Makes a tensor outlive its last use in the plan: somebody reads it after the replay."""
        self.kept.add(tensor.owner)
        return tensor

    def record(self, op: Op, label: str, **arguments: Tensor | float | None) -> None:
        """Appends a node. Tensors and scalars are told apart here; None stands for an absent tensor."""
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        scalars = {k: v for k, v in arguments.items() if isinstance(v, (int, float))}
        absent = frozenset(k for k, v in arguments.items() if v is None)
        self.nodes.append(Node(op, tensors, scalars, label, absent))

    def lower(self) -> None:
        """Gives every activation its storage and binds the nodes to the device's kernels."""
        for buffer in self.share_buffers():
            self.device.allocate(buffer)
        self.program = self.device.lower(self)

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Replays nodes [first, last). Raises what the device reports (see Device.lower)."""
        if self.program is None:
            raise RillError("the plan has not been lowered")
        last = len(self.nodes) if last is None else last
        self.program.begin()
        profile = self.profile  # once: another thread may end it
        if profile is None:
            self.program.run(first, last)
        else:
            profile.replay(self.program, first, last)

    def users(self) -> dict[Tensor, list[int]]:
        """The nodes that read or write a tensor or views of it, by the tensor whose storage it is."""
        users: dict[Tensor, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for owner in dict.fromkeys(tensor.owner for tensor in node.tensors.values()):
                users.setdefault(owner, []).append(i)
        return users

    def share_buffers(self) -> list[list[Tensor]]:
        """Groups the activations without storage into buffers: two share one if they are never needed together."""
        last_use = {t.owner: i for i, node in enumerate(self.nodes) for t in node.tensors.values()}
        buffers: list[list[Tensor]] = []
        busy_until: list[int] = []
        placed: set[Tensor] = set()
        for i, node in enumerate(self.nodes):
            for tensor in (t.owner for t in node.tensors.values()):
                if tensor.storage is not None or tensor in placed:
                    continue
                placed.add(tensor)
                end = len(self.nodes) if tensor in self.kept else last_use[tensor]
                free = [b for b, until in enumerate(busy_until) if until < i]
                best = min(free, key=lambda b: abs(nbytes(buffers[b][0]) - nbytes(tensor)), default=None)
                if best is None:
                    buffers.append([tensor])
                    busy_until.append(end)
                else:
                    buffers[best].append(tensor)
                    busy_until[best] = end
        return buffers


def nbytes(tensor: Tensor) -> int:
    """Bytes of the logical array."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def label_of(nodes: Sequence[Node], index: int) -> str:
    return f"node {index} {nodes[index].op.name} of {nodes[index].label}"
