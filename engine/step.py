"""The step: everything that changes from one replay to the next, in one flat buffer at a fixed address.

A step is a list of rows; a row is one token at one position of one sequence. Prefill (many rows of a sequence),
decode (one row) and batched decode (one row of each of many) are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.abi import constants, struct_dtype
from engine.device import Device
from engine.plan import Plan, Tensor

LOGIT_ROWS = int(constants.LOGIT_ROWS)


class Segment(NamedTuple):
    """Consecutive tokens of one sequence, to be put through the model in a step."""

    slot: int
    first_pos: int
    tokens: Sequence[int]


class Want(NamedTuple):
    """Logits wanted of one row of a step. `prepare` fills the row's entry of step.arrays["sampling"]; `accept` gets
    what came of it once the whole step has happened."""

    row: int
    prepare: Callable[[Any], None]
    accept: Callable[[Sampled], None]
    keep_logprobs: bool = False
    keep_logits: bool = False


class Sampled(NamedTuple):
    """What a row came to: its token and, where they are kept, logprobs and logits."""

    token: int
    logprobs: Logprobs | None = None
    logits: np.ndarray | None = None


class Logprobs(NamedTuple):
    """The log probability of a row's token, and the likeliest alternatives."""

    own: float
    top_token: np.ndarray
    top_logprob: np.ndarray


def pieces(segments: Sequence[Segment], most: int) -> Iterator[list[Segment]]:
    """The segments in their order, cut where it takes that to have at most so many tokens in each piece."""
    piece: list[Segment] = []
    room = most
    for segment in segments:
        slot, pos, tokens = segment.slot, segment.first_pos, segment.tokens
        while len(tokens) >= room:
            yield [*piece, Segment(slot, pos, tokens[:room])]
            pos, tokens, piece, room = pos + room, tokens[room:], [], most
        if tokens:
            piece.append(Segment(slot, pos, tokens))
            room -= len(tokens)
    if piece:
        yield piece


class History:
    """The last `reach` tokens of each slot's sequence, which penalties look at: array [slots · 2 · reach]. A token
    stands at its position modulo reach and once more `reach` further on, so that the last ones always lie in a row.
    """

    def __init__(self, array: np.ndarray, reach: int) -> None:
        self.reach = reach
        self.slots = array.reshape(-1, 2 * reach) if reach else array

    def write(self, slot: int, position: int, tokens: Sequence[int]) -> None:
        """Notes tokens of a slot's sequence from a position on."""
        if len(tokens) == 1:  # of every step
            place = position % self.reach
            self.slots[slot, place] = self.slots[slot, place + self.reach] = tokens[0]
            return
        last = tokens[-self.reach :]
        at = np.arange(position + len(tokens) - len(last), position + len(tokens)) % self.reach
        self.slots[slot, at] = self.slots[slot, at + self.reach] = last

    def span(self, slot: int, length: int) -> tuple[int, int]:
        """Where the last tokens of a sequence of that length start, and how many they are."""
        count = min(length, self.reach)
        return 2 * self.reach * slot + (length - count) % self.reach, count


class Step:
    """Arrays to fill before a replay, and the tensors that the plan reads them by.

    rows, logit_rows [1]        how many rows, and how many of them want logits in this replay
    token, pos, seq [max_rows]  per row; seq is a slot of the cache
    row_index [LOGIT_ROWS]      which rows want logits
    page_table [slots, pages]   pages of each slot's sequence: side by side, the table of each group of layers
    sampling [LOGIT_ROWS]       what the logits are for (struct sampling of abi.h)
    history                     tokens of each slot's sequence, at most `reach` (class History)

    `shared` are the bytes of all but the last two: what every rank has to know. Sampling is rank 0's.
    """

    def __init__(self, device: Device, plan: Plan, max_rows: int, slots: int, pages: int, reach: int = 0) -> None:
        int32 = np.dtype(np.int32)
        layout = {
            "rows": ((1,), int32), "logit_rows": ((1,), int32),
            "token": ((max_rows,), int32), "pos": ((max_rows,), int32), "seq": ((max_rows,), int32),
            "row_index": ((LOGIT_ROWS,), int32), "page_table": ((slots, pages), int32),
            "sampling": ((LOGIT_ROWS,), struct_dtype("sampling")), "history": ((slots * 2 * reach,), int32),
        }  # fmt: skip
        self.max_rows = max_rows
        sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in layout.items()}
        offsets = np.concatenate([[0], np.cumsum([-(-size // 64) * 64 for size in sizes.values()])])
        unaligned = np.zeros(offsets[-1] + 64, np.uint8)
        start = -unaligned.__array_interface__["data"][0] % 64
        self.buffer = unaligned[start : start + offsets[-1]]
        self.shared = self.buffer[: offsets[list(layout).index("sampling")]]
        self.tensors: dict[str, Tensor] = {}
        self.arrays: dict[str, np.ndarray] = {}
        counts = {"token": "rows", "pos": "rows", "seq": "rows", "row_index": "logit_rows", "sampling": "logit_rows"}
        for (name, (shape, dtype)), offset in zip(layout.items(), offsets, strict=False):
            array = self.buffer[offset : offset + sizes[name]].view(dtype).reshape(shape)
            rows = self.tensors[counts[name]] if name in counts else None
            tensor = Tensor(shape, dtype, f"step.{name}", plan, rows)
            device.share(tensor, array)
            self.arrays[name], self.tensors[name] = array, tensor
        self.history = History(self.arrays["history"], reach)

    def set_rows(self, token: list[int], pos: list[int], seq: list[int]) -> None:
        """The rows of the next replay; rows of one sequence stand together, in order of position."""
        count = len(token)
        self.arrays["rows"][0] = count
        self.arrays["token"][:count], self.arrays["pos"][:count], self.arrays["seq"][:count] = token, pos, seq

    def set_logit_rows(self, row_index: list[int]) -> None:
        """The rows whose logits the next replay makes, at most LOGIT_ROWS."""
        self.arrays["logit_rows"][0] = len(row_index)
        self.arrays["row_index"][: len(row_index)] = row_index
