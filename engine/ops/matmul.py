from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from engine.device import Device
from engine.layer import Layer, Source, Weight, matrix, stored_alike, vector
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

    weights: one or several [outputs, inputs], stacked into one matrix, so that q, k and v are one multiplication, or
    into as few as there can be where neighbours are stored differently; biases: as many [outputs]. dtype: "auto" keeps
    the stored one, "float32" widens, "int8" and "int4" quantise. forward: x [rows, inputs] -> [rows, all outputs].

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
        outputs = [source.shape[0] for source in weights]
        matching = not biases or [source.shape[0] for source in biases] == outputs
        self.check(matching, f"biases do not match {sum(outputs)} outputs")
        self.matrices: list[Weight] = []
        self.biases: list[Weight] = []
        for run in stored_alike(weights, dtype):
            part = f"[{sum(outputs[: run.start])}:{sum(outputs[: run.stop])}]" if len(run) < len(weights) else ""
            self.matrices.append(matrix(f"{self.name}.weight{part}", weights[run.start : run.stop], dtype))
            if biases:
                self.biases.append(vector(f"{self.name}.bias{part}", *biases[run.start : run.stop]))

    def record(self, x: Tensor) -> Tensor:
        inputs = self.matrices[0].width
        self.check(x.width == inputs, f"input width {x.width}, expected {inputs}")
        plan = self.plan_of(x)
        out = plan.new(sum(weight.shape[0] for weight in self.matrices), x, f"{self.name}.out")
        start = 0
        for weight, bias in zip_longest(self.matrices, self.biases):
            stop = start + weight.shape[0]
            part = out if len(self.matrices) == 1 else out.columns(start, stop)
            plan.record(matmul, self.name, x=x, weight=weight, bias=bias, out=part)
            start = stop
        return out
