from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.device import Device
from engine.layer import Layer, Source, matrix, vector
from engine.plan import Tensor, op
from engine.quantised import round_inputs

SLICE = 4096  # rows of a weight that are widened at once


def multiply(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """out = x · weightᵀ in float32, the weight widened slice by slice. One that has groups rounds x, too."""
    if group := getattr(weight, "group", 0):
        x = round_inputs(x, group)
    for start in range(0, weight.shape[0], SLICE):
        piece = np.asarray(weight[start : start + SLICE], np.float32)
        out[:, start : start + len(piece)] = x @ piece.T


@op("out")
def matmul(x: np.ndarray, weight: np.ndarray, out: np.ndarray, bias: np.ndarray | None = None) -> None:
    multiply(x, weight, out)
    if bias is not None:
        out += bias


class Linear(Layer):
    """x · weightᵀ + bias.

    weights: one or several [outputs, inputs], stacked into one matrix, so that q, k and v are one multiplication;
    biases: as many [outputs]. dtype: "auto" keeps the stored one, "float32" widens, "int8" and "int4" quantise.
    forward: x [rows, inputs] -> [rows, all outputs].

    Arithmetic, the same for one row and many: sums in float32, in order of the inputs. bf16 weights take inputs
    rounded to bf16 where the CPU has the bf16 dot instruction (isa avx512_bf16), float32 inputs elsewhere; quantised
    ones take inputs rounded to 8 bits, and their groups are summed one after the other. A GPU differs: docs/cuda.md.
    """

    def __init__(
        self,
        weights: Sequence[Source],
        biases: Sequence[Source] = (),
        dtype: str = "auto",
        name: str = "",
        device: Device | None = None,
    ) -> None:
        super().__init__(name, device)
        self.weight = matrix(f"{self.name}.weight", weights, dtype)
        self.bias = vector(f"{self.name}.bias", *biases) if biases else None
        outputs = self.weight.shape[0]
        self.check(self.bias is None or self.bias.width == outputs, f"biases do not match {outputs} outputs")

    def record(self, x: Tensor) -> Tensor:
        outputs, inputs = self.weight.shape
        self.check(x.width == inputs, f"input width {x.width}, expected {inputs}")
        plan = self.plan_of(x)
        out = plan.new(outputs, x, f"{self.name}.out")
        plan.record(matmul, self.name, x=x, weight=self.weight, bias=self.bias, out=out)
        return out
