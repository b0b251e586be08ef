from __future__ import annotations

import numpy as np

from engine.device import Device, TokenError
from engine.layer import Layer, Source, matrix
from engine.ops.all_reduce import AllReduce
from engine.plan import Tensor, op
from engine.ranks.split import WHOLE, Split


@op("out")
def embedding(
    token: np.ndarray, table: np.ndarray, out: np.ndarray, *, vocab_size: int, first_id: int, ids: int
) -> None:  # fmt: skip
    bad = np.flatnonzero((token < 0) | (token >= vocab_size))
    if len(bad):
        raise TokenError(int(bad[0]))
    here = (token >= first_id) & (token < first_id + ids)
    out[~here] = 0
    if here.any():
        out[here] = np.asarray(table[token[here] - first_id], np.float32)


class Embedding(Layer):
    """Rows of a table [vocab_size, hidden]. forward: token [rows] int32 -> [rows, hidden]. Where dtype asks for 4 bits
    it has 8, which the logits need that are made of the same table.

    Split, a rank holds the rows of its ids, gives zeros for others, and all ranks' are summed. Raises TokenError when
    a plan meets an id outside the table.
    """

    def __init__(
        self, table: Source, dtype: str = "auto", name: str = "", device: Device | None = None, split: Split = WHOLE
    ) -> None:
        super().__init__(name, device)
        self.vocab_size, self.first_id = table.shape[0], split.part(table.shape[0]).start
        self.table = matrix(f"{self.name}.weight", [split.outputs(table)], dtype.replace("int4", "int8"))
        self.all_reduce = AllReduce(split, f"{self.name}.all_reduce", device)

    def record(self, token: Tensor) -> Tensor:
        self.check(token.dtype == np.int32, f"token ids are {token.dtype}, expected int32")
        ids, hidden = self.table.shape
        plan = self.plan_of(token)
        out = plan.new(hidden, token, f"{self.name}.out")
        plan.record(embedding, self.name, token=token, table=self.table, out=out, vocab_size=self.vocab_size,
                    first_id=self.first_id, ids=ids)  # fmt: skip
        return self.all_reduce.forward(out)
