from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer, Weight
from engine.ops.gather import Gather
from engine.ops.matmul import multiply
from engine.plan import Tensor, op
from engine.ranks.split import WHOLE, Split


@op("out")
def logits(x: np.ndarray, row_index: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    multiply(x[row_index], weight, out)


class Logits(Layer):
    """The scores of every token of the vocabulary, for the rows that want them only.

    weight: [vocab_size, hidden], the embedding's own where a model ties them.
    Split, a rank holds the rows of its ids of a vocabulary of vocab_size, and rank 0 gets the scores of all.
    forward: x [rows, hidden], row_index [logit rows] -> [logit rows, vocab_size].
    """

    def __init__(
        self, weight: Weight, name: str = "", device: Device | None = None, split: Split = WHOLE, vocab_size: int = 0
    ) -> None:
        super().__init__(name, device)
        self.weight = weight
        self.vocab_size = vocab_size or weight.shape[0]
        self.ids = split.part(self.vocab_size)
        self.gather = Gather(split, f"{self.name}.gather", device)

    def record(self, x: Tensor, row_index: Tensor) -> Tensor:
        ids, hidden = self.weight.shape
        self.check(x.width == hidden, f"input width {x.width}, expected {hidden}")
        self.check(ids == len(self.ids), f"{ids} rows for {len(self.ids)} ids")
        plan = self.plan_of(x)
        out = plan.new(self.vocab_size, row_index, f"{self.name}.out")
        mine = out if ids == self.vocab_size else out.columns(self.ids.start, self.ids.stop)
        plan.record(logits, self.name, x=x, row_index=row_index, weight=self.weight, out=mine)
        return self.gather.forward(out)
