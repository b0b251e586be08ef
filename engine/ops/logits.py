from __future__ import annotations

import numpy as np

from engine.device import Device
from engine.layer import Layer, Weight
from engine.ops.matmul import multiply
from engine.plan import Tensor, op


@op("out")
def logits(x: np.ndarray, row_index: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    multiply(x[row_index], weight, out)


class Logits(Layer):
    """The scores of every token of the vocabulary, for the rows that want them only.

    weight: [vocab_size, hidden], the embedding's own where a model ties them.
    forward: x [rows, hidden], row_index [logit rows] -> [logit rows, vocab_size].
    """

    def __init__(self, weight: Weight, name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.weight = weight

    def record(self, x: Tensor, row_index: Tensor) -> Tensor:
        vocab_size, hidden = self.weight.shape
        self.check(x.width == hidden, f"input width {x.width}, expected {hidden}")
        plan = self.plan_of(x)
        out = plan.new(vocab_size, row_index, f"{self.name}.out")
        plan.record(logits, self.name, x=x, row_index=row_index, weight=self.weight, out=out)
        return out
