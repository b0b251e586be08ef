from __future__ import annotations

import numpy as np

from engine.device import Device, TokenError
from engine.layer import Layer, Source, matrix
from engine.plan import Tensor, op


@op("out")
def embedding(token: np.ndarray, table: np.ndarray, out: np.ndarray, *, vocab_size: int) -> None:
    bad = np.flatnonzero((token < 0) | (token >= vocab_size))
    if len(bad):
        raise TokenError(f"row {bad[0]} holds a token id outside the vocabulary")
    out[...] = np.asarray(table[token], np.float32)


class Embedding(Layer):
    """Rows of a table [vocab_size, hidden]. forward: token [rows] int32 -> [rows, hidden]. Where dtype asks for 4 bits
    it has 8, which the logits need that are made of the same table.

    Raises TokenError when a plan meets an id outside the table.
    """

    def __init__(self, table: Source, dtype: str = "auto", name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.table = matrix(f"{self.name}.weight", [table], dtype.replace("int4", "int8"))

    def record(self, token: Tensor) -> Tensor:
        self.check(token.dtype == np.int32, f"token ids are {token.dtype}, expected int32")
        vocab_size, hidden = self.table.shape
        plan = self.plan_of(token)
        out = plan.new(hidden, token, f"{self.name}.out")
        plan.record(embedding, self.name, token=token, table=self.table, out=out, vocab_size=vocab_size)
        return out
