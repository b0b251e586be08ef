"""logits: matmul for the rows that want it, with its own count of rows, over the embedding's table."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    WEIGHT_DTYPES,
    assert_close,
    assert_same_bits,
    cpu_devices,
    devices,
    error_limit,
    isa_pairs,
    normal,
    poison_scratch,
)

from engine.abi import FLOAT32
from engine.device import Device
from engine.errors import UsageError
from engine.ops.embedding import Embedding
from engine.ops.logits import Logits
from engine.ops.matmul import Linear
from engine.plan import Plan, Tensor
from engine.step import LOGIT_ROWS, Step


class Head:
    """A step whose rows feed logits of a tied table."""

    def __init__(self, device: Device, table: np.ndarray, max_rows: int = 40) -> None:
        self.device, self.plan = device, Plan(device)
        self.step = Step(device, self.plan, max_rows, slots=1, pages=1)
        embedding = Embedding(table, device=device)
        self.layer = Logits(embedding.table, "head", device)
        device.load([embedding.table])
        self.x = Tensor((max_rows, table.shape[1]), FLOAT32, "x", self.plan, self.step.tensors["rows"])
        device.upload(self.x, np.full(self.x.shape, np.nan, np.float32))
        self.out = self.plan.keep(self.layer.record(self.x, self.step.tensors["row_index"]))
        self.plan.lower()
        poison_scratch(self.plan)

    def run(self, x: np.ndarray, row_index: list[int]) -> np.ndarray:
        self.x.storage[...] = np.nan
        self.x.storage[: len(x)] = x
        self.step.set_rows([0] * len(x), [0] * len(x), [0] * len(x))
        self.step.arrays["row_index"][:] = -(2**30)
        self.step.set_logit_rows(row_index)
        self.out.storage[...] = np.nan
        self.plan.run()
        assert np.isnan(self.out.storage[len(row_index) :]).all(), "logits of rows that nobody asked for"
        return self.device.download(self.out)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_the_rows_asked_for_in_the_order_asked(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    most = [i % 5 for i in range(LOGIT_ROWS)]
    wanted: tuple[list[int], ...] = ([2], [], [0, 1, 2, 3, 4], [4, 0], [3, 3, 1], most)
    for hidden, vocab_size in ((33, 100), (72, 17), (128, 1000)):
        table, x = normal(rng, vocab_size, hidden, dtype=dtype), normal(rng, 5, hidden)
        exact = x.astype(np.float64) @ table.astype(np.float64).T
        for device in devices():
            head = Head(device, table)
            for rows in wanted:
                out, limit = head.run(x, rows), error_limit(device, dtype)
                assert_close(out, exact[rows], limit, (device.description, rows))


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_one_row_of_logits_has_the_bits_of_many_and_of_matmul(dtype: np.dtype) -> None:
    rng = np.random.default_rng(1)
    table, x = normal(rng, 77, 72, dtype=dtype), normal(rng, 37, 72)
    rows = [int(r) for r in rng.permutation(37)[:LOGIT_ROWS]]
    for device in cpu_devices():
        head = Head(device, table)
        many = head.run(x, rows)
        for i in (0, 5, 13, 31):
            assert_same_bits(head.run(x, [rows[i]])[0], many[i], (device.description, i))
        assert_same_bits(Linear([table], device=device).forward(x)[rows], many, device.description)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_two_threads_give_the_bits_of_one(dtype: np.dtype) -> None:
    rng = np.random.default_rng(2)
    table, x = normal(rng, 200, 33, dtype=dtype), normal(rng, 9, 33)
    for pair in isa_pairs():
        one, two = (Head(device, table).run(x, [8, 0, 5]) for device in pair)
        assert_same_bits(two, one, pair[0].description)


def test_an_input_of_another_width_is_refused() -> None:
    for device in devices():
        table = Embedding(np.ones((6, 5), np.float32), device=device).table
        with pytest.raises(UsageError, match="head: input width 4, expected 5"):
            Logits(table, "head", device).forward(np.ones((2, 4), np.float32), np.zeros(2, np.int32))
