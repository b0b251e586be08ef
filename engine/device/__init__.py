"""What a device is. Each one lives in a file of this folder named after its type and is found by that name."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine import abi
from engine.errors import RillError, UsageError

if TYPE_CHECKING:
    from engine.layer import Weight
    from engine.plan import Node, Plan, Tensor

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Place(NamedTuple):
    """A process among the ranks of its machine: the how-manieth of how many. sharing: those that run on its cores, this
    one included."""

    rank: int = 0
    ranks: int = 1
    sharing: int = 1


ALONE = Place()


class TokenError(RillError):
    """Row `row` of the step holds a token id outside the vocabulary."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} holds a token id outside the vocabulary")
        self.row = row


class NotFiniteError(RillError):
    """Row `row` of the logits holds NaN or infinity."""

    def __init__(self, row: int) -> None:
        super().__init__(f"logits row {row} is not finite")
        self.row = row


class Cancelled(Exception):
    """The replay was stopped by Device.cancel; its step did not happen."""


def failure(status: int, detail: int) -> Exception:
    """The exception for a status of abi.h."""
    if status == abi.constants.STATUS_CANCELLED:
        return Cancelled()
    if status == abi.constants.STATUS_TOKEN:
        return TokenError(detail)
    if status == abi.constants.STATUS_NOT_FINITE:
        return NotFiniteError(detail)
    return RillError(f"native status {status}, detail {detail}")


class Program(ABC):
    """A lowered plan."""

    whole = False  # whether to cut a segment between two collectives costs something, and is of no use

    def begin(self) -> None:  # noqa: B027 - most devices read the host's own
        """From now on, what the host has written into shared tensors counts."""

    @abstractmethod
    def run(self, first: int, last: int, times: np.ndarray | None = None) -> None:
        """Replays nodes [first, last), and notes when in `times`: struct node_times of abi.h, [threads, nodes]. Raises
        TokenError, NotFiniteError or Cancelled."""

    def meet(self, meeting: Any) -> Sequence[int]:
        """Which collectives it does by itself from now on, in the memory that a `struct meeting` of abi.h is of."""
        return ()


class Device(ABC):
    """Allocates, uploads, lowers and replays. How it lays out a tensor is its secret."""

    type: str
    description: str  # one phrase for people: what was chosen and why
    notes: list[str]  # and what else they should know, each a line
    details: list[str]  # or may want to know
    adapts = False  # whether plans lowered from now on take fewer threads where there is little to do

    @abstractmethod
    def allocate(self, tensors: Sequence[Tensor]) -> None:
        """One zeroed buffer, large enough for the largest, that all these tensors share."""

    @abstractmethod
    def load(self, weights: Sequence[Weight], progress: Progress | None = None, cache: bool = False) -> None:
        """Reads weights into the device's own layout. cache: quantised ones may be kept in the user's cache directory,
        and taken from there. Raises RillError naming the source that cannot be read."""

    @abstractmethod
    def weight_bytes(self, weight: Weight) -> int:
        """Bytes that `load` will take for a weight."""

    @abstractmethod
    def cache_bytes(self, dtype: np.dtype, head_dim: int) -> int:
        """Bytes of one page of one KV head."""

    @abstractmethod
    def upload(self, tensor: Tensor, array: np.ndarray) -> None:
        """Gives a tensor storage, unless it has some, and these values."""

    @abstractmethod
    def download(self, tensor: Tensor) -> np.ndarray:
        """A copy of the logical array, of a row tensor the rows of the last step."""

    def view(self, tensor: Tensor) -> np.ndarray:
        """A dense tensor in the host's reach, to read and write in place."""
        raise UsageError(f"device {self.type!r}: its memory is out of the host's reach")

    @contextmanager
    def exchanged(self, node: Node) -> Iterator[dict[str, np.ndarray]]:
        """A collective's tensors in the host's reach, each by its name there; what is written into them by the end of
        this is what they hold. Raises as the replay of the nodes before."""
        yield {name: self.view(tensor) for name, tensor in node.tensors.items()}

    @abstractmethod
    def share(self, tensor: Tensor, array: np.ndarray) -> None:
        """Makes a tensor of an array that the host goes on writing into between replays: the step."""

    def runs(self, op_name: str) -> bool:
        """Whether the device has a kernel for an op: some can be left out of a build."""
        return True

    @abstractmethod
    def lower(self, plan: Plan) -> Program:
        """Binds a plan whose tensors have storage."""

    @abstractmethod
    def cancel(self, flag: bool) -> None:
        """Stops the replay that is running (True), or allows replays again (False). From any thread."""


def device_types() -> list[str]:
    """The devices that this installation has code for."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def open_device(type: str = "auto", *, isa: str = "auto", threads: int | None = None, place: Place = ALONE) -> Device:
    """Opens a device. "auto" is the CPU, or NumPy where the native libraries have not been built."""
    if type == "auto":
        type = _best_type()
    if type not in device_types():
        raise UsageError(f"device {type!r}: expected auto or one of {', '.join(device_types())}")
    device: Any = importlib.import_module(f"engine.device.{type}").open(isa=isa, threads=threads, place=place)
    return device


def _best_type() -> str:
    cpu: Any = importlib.import_module("engine.device.cpu")
    if cpu.available_isas():
        return "cpu"
    print(f"rill: {cpu.abi.why_no_libraries()}; NumPy runs everything, slowly", file=sys.stderr)
    return "numpy"


@cache
def default_device() -> Device:
    return open_device()
