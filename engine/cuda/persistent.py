"""Launches of few rows as one: what a persistent kernel (native/cuda/persistent.cuh) goes through is a list of stages.

A stage is a launch as data: which of the kernel's functions, the structs it takes, its blocks. Launches that no stage
can be stand between two lists, each by itself. Lists are made when a shape of step is first met; what changes from step
to step is in the step's mirror, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine import abi
from engine.cuda.device_array import DeviceArray
from engine.cuda.launches import DTYPES, Launch, ceil_div, n, row_bytes
from engine.cuda.panels import Panels
from engine.quantised import Format

if TYPE_CHECKING:
    from engine.cuda.program import Bound
    from engine.device.cuda import CUDADevice

    Bind = Callable[..., Bound | None]

# Weights -> cache, of the kernels that there are: native/cuda/persistent_<weights>.cu.
CACHE_OF = {"f32": "f32", "bf16": "bf16", "f16": "f16", "i8": "bf16", "i4": "bf16"}
STORED = {code: dtype for dtype, code in abi.DTYPE_CODES.items()}


class Stage(NamedTuple):
    """kind: enum stage_kind of launch.h. kernels: those that have it, by their weights."""

    kind: int
    kernels: frozenset[str]
    launch: Launch
    structs: tuple[Any, ...]


def stage_of(launch: Any, structs: tuple[Any, ...]) -> Stage | None:
    """A launch as a stage; None where no kernel has it."""
    if not isinstance(launch, Launch):
        return None
    name, _, dtype = launch.kernel.rpartition("_")
    if dtype not in DTYPES.values():
        name, dtype = launch.kernel, ""
    if name == "streaming_attention_four":  # two at a time take fewer registers; the bits of a head are the same
        name, op = "streaming_attention_two", structs[0]
        pairs = op.kv_heads * ceil_div(op.heads // op.kv_heads, 2)
        launch = launch._replace(grid=(launch.grid[0], pairs, launch.grid[2]))
    kind, attends = getattr(n, f"STAGE_{name}", None), name.startswith("streaming_attention")
    kernels = [weights for weights, cache in CACHE_OF.items() if dtype in ("", cache if attends else weights)]
    return Stage(kind, frozenset(kernels), launch, structs) if kind is not None else None


class Persistent:
    """Merges the launches of a program."""

    def __init__(self, device: CUDADevice) -> None:
        self.device = device
        self.barrier = device.zeroed(4)
        self.lists: list[DeviceArray] = []  # recorded launches read them, too

    def merge(self, launches: Iterable[Bound], bind: Bind) -> list[Callable[[], None]]:
        """What makes all these launches, in order. bind: makes the program's launches."""
        calls: list[Callable[[], None]] = []
        run: list[tuple[Bound, Stage]] = []
        kernels = frozenset(CACHE_OF)  # that have all stages of the run
        for bound in launches:
            stage = stage_of(bound.launch, bound.structs)
            if stage is None or not kernels & stage.kernels:
                calls += self._calls(run, kernels, bind)
                run, kernels = [], frozenset(CACHE_OF)
            if stage is None or not stage.kernels:
                calls.append(bound.call)
            else:
                run.append((bound, stage))
                kernels &= stage.kernels
        return calls + self._calls(run, kernels, bind)

    def _calls(
        self, run: Sequence[tuple[Bound, Stage]], kernels: frozenset[str], bind: Bind
    ) -> list[Callable[[], None]]:
        """One launch for all stages of a run, where that is fewer and the GPU can."""
        kernel = f"persistent_{min(kernels)}"
        blocks = self.device.driver.blocks_together(kernel) if len(run) > 1 else 0
        if not blocks:
            return [bound.call for bound, _ in run]
        stages = stage_list([stage for _, stage in run])
        self.lists.append(self.device.zeroed(len(stages)))
        self.lists[-1][:] = np.frombuffer(stages, np.uint8)
        struct = abi.ffi.new("struct persistent *")
        struct.stages = abi.ffi.cast("struct stage *", self.lists[-1].address)
        struct.barrier, struct.count = abi.ffi.cast("uint32_t *", self.barrier.address), len(run)
        merged = bind(Launch(kernel, (blocks, 1, 1), n.THREADS, together=True), struct)
        return [merged.call] if merged else []


def stage_list(stages: Sequence[Stage]) -> bytes:
    """The stages as structs of launch.h. Before a product begins, what each block reads first of its matrix is fetched,
    from where the product before it ends."""
    entries = abi.ffi.new("struct stage[]", len(stages))
    for entry, stage in zip(entries, stages, strict=True):
        entry.kind, entry.threads, entry.grid = stage.kind, min(stage.launch.threads, n.THREADS), stage.launch.grid
        entry.share = stage.launch.share
        op = struct_bytes(stage.structs)
        assert len(op) <= abi.ffi.sizeof(entry.op)
        abi.ffi.memmove(entry.op, op, len(op))
    matrices = [(i, matrix) for i, stage in enumerate(stages) if (matrix := matrix_of(stage))]
    for before, (i, matrix) in zip([0, *(i for i, _ in matrices)], matrices, strict=False):
        if before < i:
            entry, gated = entries[before], "swiglu" in stages[i].launch.kernel
            entry.ahead = int(abi.ffi.cast("intptr_t", matrix.weight))
            entry.ahead_blocks, entry.ahead_bytes, entry.ahead_further = first_reads(matrix, gated)
    return bytes(abi.ffi.buffer(entries))


def matrix_of(stage: Stage) -> Any:
    """The struct with the matrix of a product, if it is one."""
    return next((struct for struct in stage.structs if hasattr(struct, "weight_dtype")), None)


def first_reads(matrix: Any, gated: bool) -> tuple[int, int, int]:
    """Of a product of few rows: blocks that read a whole share of the matrix, bytes of it, and how far behind them as
    many more are read."""
    dtype, group, outputs = STORED[matrix.weight_dtype], matrix.weight_group, matrix.out_width // (1 + gated)
    together = n.PANEL if group else n.THREADS // n.WARP
    if group:
        size = Panels(Format(dtype, group), matrix.x_width).bytes
    else:
        size = together * row_bytes(matrix.x_width, dtype.itemsize)
    return outputs // together, size, outputs * size // together if gated else 0


def struct_bytes(structs: Iterable[Any]) -> bytes:
    """Structs as a kernel takes them: one after the other."""
    return b"".join(bytes(abi.ffi.buffer(struct)) for struct in structs)
