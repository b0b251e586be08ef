"""How ranks share a model: each layer (tensor parallelism, Megatron-LM: Shoeybi et al., 2019), or the layers (pipeline
parallelism, GPipe: Huang et al., 2019).

Where one matrix follows another, y = B · f(A · x), the first is split by its outputs and the second by its inputs. A
rank that holds some rows of A and those columns of B computes f of its part alone, and the sum over all ranks of what
comes out of B is y. So attention takes one sum (A is q, k and v, of whole heads; B the output) and so does the MLP (A
is gate and up, B is down). The vocabulary is split by ids: a rank looks up those that it holds, and makes their logits.

In a pipeline, a stage holds some layers and hands its rows on to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.errors import UsageError
from engine.files.checkpoint import StoredTensor
from engine.quantised import Format, QuantisedMatrix

MOST_RANKS = 1024  # that an error message tries out


@dataclass(frozen=True)
class Split:
    """The part of a model that rank `rank` of `ranks` holds. Alone, it holds everything."""

    rank: int = 0
    ranks: int = 1

    def part(self, count: int) -> range:
        """This rank's heads, neurons or ids of `count`. Where ranks outnumber KV heads, neighbours hold the same."""
        first = self.rank * count // self.ranks
        return range(first, max(first + 1, (self.rank + 1) * count // self.ranks))

    def outputs(self, source: Any, unit: int = 1) -> Any:
        """This rank's rows of a matrix or of a bias: of whole units of so many."""
        if self.ranks == 1:
            return source
        part = self.part(source.shape[0] // unit)
        return rows_of(source, part.start * unit, part.stop * unit)

    def inputs(self, source: Any, unit: int = 1) -> Any:
        """This rank's columns of a matrix."""
        if self.ranks == 1:
            return source
        part = self.part(source.shape[1] // unit)
        return Columns(source, part.start * unit, part.stop * unit)

    def once(self, sources: Sequence[Any]) -> Sequence[Any]:
        """Biases of what is summed over the ranks: one rank adds them."""
        return sources if self.rank == 0 else ()

    def check(self, heads: int, kv_heads: int, least: int) -> None:
        """Raises UsageError where the ranks cannot share so many heads, or have less than one each of anything else,
        of which there are at least `least`."""

        def fits(ranks: int) -> bool:
            return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0) and ranks <= least

        if not fits(self.ranks):
            numbers = ", ".join(str(n) for n in range(1, min(heads, MOST_RANKS) + 1) if fits(n))
            raise UsageError(f"{self.ranks} ranks cannot share {heads} heads on {kv_heads} of keys and values: "
                             f"expected {numbers}")  # fmt: skip


WHOLE = Split()


@dataclass(frozen=True)
class Stage:
    """The layers of a model that stage `index` of `count` holds. The first one embeds, the last one makes the logits.
    Alone, it holds everything."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, count: int) -> range:
        """This stage's layers of `count`: as many as any other's. Those that are left over go to the stages that hold
        neither embedding nor logits, then to the first, whose embedding costs memory but no time."""
        each, left = divmod(count, self.count)
        larger = [*range(1, self.count - 1), 0][:left]
        sizes = [each + (stage in larger) for stage in range(self.count)]
        start = sum(sizes[: self.index])
        return range(start, start + sizes[self.index])

    def check(self, layers: int) -> None:
        """Raises UsageError where a stage would have no layer."""
        if self.count > layers:
            raise UsageError(f"pp {self.count}: the model has {layers} layers, and a stage needs one")


ALL_LAYERS = Stage()


def share_ranks(tp: int | None, pp: int | None, ranks: int) -> tuple[int, int]:
    """How many ranks share a layer, and how many stages there are, of what was asked for: by default, all ranks and one
    stage. Raises UsageError where that is another number of ranks than there are."""
    stages = pp or 1
    if tp is None and ranks % stages == 0:
        return ranks // stages, stages
    wanted = (tp or 1) * stages
    if wanted != ranks:
        asked = " × ".join(f"{name} {value}" for name, value in (("tp", tp), ("pp", pp)) if value is not None)
        raise UsageError(f"{asked}: there {'are' if ranks > 1 else 'is'} {ranks} rank{'s' * (ranks > 1)}; "
                         f"mpiexec -n {wanted} starts as many as that")  # fmt: skip
    return tp or 1, stages


def rows_of(source: Any, start: int, stop: int) -> Any:
    """Rows [start, stop) of a source. Those of a plain stored tensor are one again, at another place of its file."""
    if isinstance(source, StoredTensor):
        row = source.nbytes // source.shape[0]
        return replace(source, shape=(stop - start, *source.shape[1:]), offset=source.offset + start * row,
                       nbytes=(stop - start) * row)  # fmt: skip
    return Rows(source, start, stop) if hasattr(source, "rows") else source[start:stop]


@dataclass(frozen=True)
class Part:
    """Some rows or columns, [start, stop), of a source."""

    source: Any
    start: int
    stop: int

    @property
    def name(self) -> str:
        return str(self.source.name)

    @property
    def dtype(self) -> Any:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class Rows(Part):
    """Some rows of a source that is decoded as it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *self.source.shape[1:]

    @property
    def format(self) -> Format | None:
        return getattr(self.source, "format", None)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.source.rows(self.start + start, self.start + stop))

    def quantised_rows(self, start: int, stop: int) -> QuantisedMatrix:
        found: QuantisedMatrix = self.source.quantised_rows(self.start + start, self.start + stop)
        return found


@dataclass(frozen=True)
class Columns(Part):
    """Some columns of a matrix. Of a plain stored tensor, nothing else is read. One that is quantised stays so where
    its groups are not cut."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[0], self.stop - self.start

    @property
    def format(self) -> Format | None:
        found: Format | None = getattr(self.source, "format", None)
        ends = (self.start, self.stop if self.stop < self.source.shape[1] else 0)
        return found if found and not any(end % found.group for end in ends) else None

    def quantised_rows(self, start: int, stop: int) -> QuantisedMatrix:
        whole: QuantisedMatrix = self.source.quantised_rows(start, stop)
        columns = slice(self.start, self.stop)
        groups = slice(self.start // whole.group, -(-self.stop // whole.group))
        minimums = None if whole.minimums is None else whole.minimums[:, groups]
        return QuantisedMatrix(whole.format, whole.quants[:, columns], whole.scales[:, groups], minimums)

    def rows(self, start: int, stop: int) -> np.ndarray:
        if isinstance(self.source, StoredTensor):
            return self.source.columns(range(start, stop), range(self.start, self.stop))
        whole = self.source.rows(start, stop) if hasattr(self.source, "rows") else np.asarray(self.source)[start:stop]
        return np.asarray(whole)[:, self.start : self.stop]
