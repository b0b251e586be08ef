"""Gate and up followed by swiglu, which CPUs do at once in steps of many rows: the same bits as one after the other."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Bench, assert_same_bits, isa_pairs, normal, poison_scratch

from engine.abi import BFLOAT16, FLOAT16, FLOAT32
from engine.cpu.program import find_gated
from engine.device import Device
from engine.ops.matmul import Linear
from engine.ops.rmsnorm import rmsnorm
from engine.ops.swiglu import swiglu
from engine.plan import Tensor
from engine.profile import TIMES

STORED = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": FLOAT32, "int4-64": FLOAT32}
INPUTS = 200
AT_ONCE = 16  # rows, from which on gate and up are not written


def record(device: Device, x: np.ndarray, layer: Linear, width: int) -> tuple[Bench, Tensor, Tensor]:
    """A bench with both nodes, the output of the first one full of NaN, and that of the second."""
    bench = Bench(device, rows=len(x))
    gate_up, out = layer.record(bench.view(x)), bench.output(width)
    device.load(list(layer.weights()))
    bench.plan.record(swiglu, "swiglu", x=gate_up, out=out)
    return bench, gate_up, out


def linear(device: Device, name: str, width: int, biased: bool) -> Linear:
    rng = np.random.default_rng(width)
    weights = [normal(rng, width, INPUTS, dtype=STORED[name]) for _ in range(2)]
    biases = [normal(rng, width) for _ in range(2)] if biased else []
    return Linear(weights, biases, dtype=name if name.startswith("int") else "auto", device=device)


@pytest.mark.parametrize("name", STORED)
def test_bits_of_one_node_after_the_other(name: str) -> None:
    x = normal(np.random.default_rng(0), 130, INPUTS)
    for pair in isa_pairs():
        for width, biased in (16, True), (48, False), (96, True):
            alone = None
            for device in pair:
                layer = linear(device, name, width, biased)
                for rows in (130, 37, AT_ONCE, AT_ONCE - 1, 1):
                    bench, gate_up, out = record(device, x[:rows], layer, width)
                    bench.plan.lower()
                    poison_scratch(bench.plan)
                    if alone is None:  # node by node
                        bench.plan.run(0, 1)
                        bench.plan.run(1, 2)
                        alone = bench.result(out)
                    gate_up.storage[...] = np.nan
                    bench.run()
                    what = (device.description, width, rows)
                    assert_same_bits(bench.result(out), alone[:rows], what)
                    assert np.isnan(gate_up.storage).all() == (rows >= AT_ONCE), what


def test_what_is_not_done_at_once() -> None:
    """Half a panel of gates; somebody else who reads them; somebody who wants to see them after the replay."""
    device, x = isa_pairs()[0][0], normal(np.random.default_rng(1), 20, INPUTS)
    for case, width in ("", 32), ("half a panel", 40), ("read", 32), ("kept", 32):
        bench, gate_up, _ = record(device, x, linear(device, "bfloat16", width, False), width)
        if case == "read":
            weight, out = linear(device, "float32", width, True).biases[0], bench.output(2 * width)
            device.load([weight])
            bench.plan.record(rmsnorm, "norm", x=gate_up, weight=weight, out=out, eps=1e-6, groups=1)
        if case == "kept":
            bench.plan.keep(gate_up)
        assert find_gated(bench.plan) == (set() if case else {0}), case


def test_where_times_are_wanted_each_node_has_its_own() -> None:
    device, x = isa_pairs()[-1][1], normal(np.random.default_rng(2), 40, INPUTS)
    bench, gate_up, out = record(device, x, linear(device, "bfloat16", 64, False), 64)
    bench.run()
    together, times = bench.result(out), np.zeros((2, 2), TIMES)
    gate_up.storage[...] = np.nan
    assert bench.plan.program is not None
    bench.plan.program.run(0, 2, times)
    assert (times["begin"] < times["end"]).all() and (times["end"] <= times["passed"]).all()
    assert np.isfinite(gate_up.storage[:40]).all(), "gate and up were written"
    assert_same_bits(bench.result(out), together, "and came to the same")
