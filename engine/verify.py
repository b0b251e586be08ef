"""Holds a device to the oracle: node by node on the device's own inputs, and token by token on the oracle's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.abi import FLOAT32
from engine.device.numpy import evaluate
from engine.errors import UsageError
from engine.llm import LLM
from engine.plan import Node, label_of
from engine.runner import Runner
from engine.sampler import SamplingParams
from engine.step import Sampled, Segment, Want

# Bounds on the normalised mean square error of one op: float32 sums, and inputs rounded to bf16.
NODE_BOUND = {"float32": 1e-10, "bfloat16": 1e-5}
# Bounds on a logit's error after the whole model, in standard deviations of the logits. Products with quantised weights
# round to 8 bits, where the smallest difference before may become a whole step.
LOGIT_BOUND = {"float32": 1e-3, "bfloat16": 0.1, "quantised": 0.4}
SLICE = 4096  # rows of a weight that are compared at once


@dataclass
class Report:
    """What was compared, as lines for people, and whether all of it held."""

    passed: bool = True
    lines: list[str] = field(default_factory=list)

    def fail(self, line: str) -> None:
        self.passed = False
        self.lines.append(line)


def verify(model: str, token_ids: Sequence[int], gen_len: int = 0, **options: Any) -> Report:
    """Runs token ids and `gen_len` greedy tokens on a device (`options` are LLM's) and on the NumPy oracle.

    A token may differ only where the oracle's own two candidates are closer than the dtype's bound.
    """
    if not token_ids or gen_len < 0:
        raise UsageError("verify needs at least one token id and a gen_len of at least 0")
    alike = ("dtype", "kv_dtype", "attention", "sink", "window", "tp", "pp", "parallel")
    shared = {k: v for k, v in options.items() if k in alike}
    size: dict[str, Any] = {"max_seq_len": len(token_ids) + gen_len, "max_batch": 1}
    with LLM(model, **options, **size) as llm, LLM(model, device="numpy", **shared, **size) as oracle:
        comparison = Comparison(llm.runner, oracle.runner)
        comparison.run([llm.check_token(token) for token in token_ids], gen_len)
        return comparison.report


def bounds_of(runner: Runner) -> str:
    """Which bounds hold for a model."""
    matrices = [weight for weight in runner.weights if weight.layout == "matrix"]
    if any(weight.group for weight in matrices):
        return "quantised"
    exact = runner.kv_dtype == "float32" and all(weight.dtype == FLOAT32 for weight in matrices)
    return "float32" if exact else "bfloat16"


class Comparison:
    """Two runners of one checkpoint, fed alike."""

    def __init__(self, runner: Runner, oracle: Runner) -> None:
        self.runner, self.oracle = runner, oracle
        self.dtype = bounds_of(runner)
        self.report = Report()
        self.worst: dict[str, float] = {}

    def run(self, tokens: list[int], gen_len: int) -> None:
        self._compare_weights()
        generated: list[int] = []
        position = 0
        while self.report.passed and position < len(tokens):
            piece = tokens[position : position + self.runner.max_rows]
            device, oracle = self._step(position, piece)
            position += len(piece)
            if position == len(tokens) and len(generated) < gen_len:
                self._compare_token(position, device, oracle)
                generated.append(device.token)
                tokens = [*tokens, device.token]
        errors = ", ".join(f"{op} {error:.1e}" for op, error in sorted(self.worst.items()))
        self.report.lines.insert(0, f"{len(self.runner.plan.nodes)} nodes a step; largest error by op: {errors}")
        if self.report.passed:
            self.report.lines.append(f"PASS: {position} tokens, {gen_len} generated {generated}")

    def _compare_weights(self) -> None:
        """Every weight must be, number for number, what the oracle has read: nodes are compared on the device's own."""
        for mine, theirs in zip(self.runner.weights, self.oracle.weights, strict=True):
            found, expected = self.runner.device.download(mine), self.oracle.device.download(theirs)
            for start in range(0, mine.shape[0], SLICE):
                a, b = (np.asarray(array[start : start + SLICE], np.float64) for array in (found, expected))
                if not np.array_equal(a, b, equal_nan=True):
                    self.report.fail(f"FAIL: weight {mine.name} differs from what the oracle has read")
                    return

    def _step(self, position: int, tokens: list[int]) -> tuple[Sampled, Sampled]:
        results: list[Sampled] = []
        greedy = SamplingParams(temperature=0).resolve({})
        want = Want(len(tokens) - 1, lambda entry: greedy.fill(entry, index=0, history_start=0, history_length=0,
                    prompt_length=0), results.append, keep_logits=True)  # fmt: skip
        for runner in (self.runner, self.oracle):
            runner.run([Segment(0, position, tokens)], [want])
        device, oracle = results
        self._compare_nodes()
        assert device.logits is not None and oracle.logits is not None
        error = np.abs(device.logits - oracle.logits).max() / oracle.logits.std()
        self.worst["model"] = max(self.worst.get("model", 0.0), float(error))
        if self.report.passed and not error <= LOGIT_BOUND[self.dtype]:
            self.report.fail(f"FAIL: logits after position {position + len(tokens) - 1} differ by {error:.2e} standard "
                             f"deviations, more than {LOGIT_BOUND[self.dtype]:.0e}")  # fmt: skip
        return device, oracle

    def _compare_nodes(self) -> None:
        """Replays the step that has just run node by node; each node is computed again from the device's inputs."""
        runner = self.runner
        for i, node in enumerate(runner.plan.nodes):
            if not self.report.passed:
                return
            expected = {name: runner.device.download(tensor) for name, tensor in node.tensors.items()}
            runner.replay(i, i + 1)
            if node.op.collective:
                continue  # what one rank has does not tell what all have together
            evaluate(node, expected)
            for name, error, bound in self._errors(node, expected):
                self.worst[node.op.name] = max(self.worst.get(node.op.name, 0.0), error)
                if not error <= bound:
                    where = label_of(runner.plan.nodes, i)
                    self.report.fail(f"FAIL: {where}: {name} has error {error:.2e}, more than {bound:.0e}")

    def _errors(self, node: Node, expected: dict[str, np.ndarray]) -> Iterator[tuple[str, float, float]]:
        narrow = any(t.dtype.itemsize == 2 or t.group and not getattr(expected[name], "group", 0)
                     for name, t in node.tensors.items())  # fmt: skip
        bound = NODE_BOUND["bfloat16" if narrow else "float32"]
        for name in node.op.writes:
            found = self.runner.device.download(node.tensors[name])
            if found.dtype.kind == "i":
                yield name, float(np.mean(found != expected[name])), 0.0
            else:
                yield name, nmse(found, expected[name]), bound

    def _compare_token(self, position: int, device: Sampled, oracle: Sampled) -> None:
        assert oracle.logits is not None
        gap = float(oracle.logits[oracle.token] - oracle.logits[device.token]) / float(oracle.logits.std())
        if device.token != oracle.token and gap > LOGIT_BOUND[self.dtype]:
            self.report.fail(f"FAIL: token {position} is {device.token}, the oracle's {oracle.token} lies "
                             f"{gap:.2e} standard deviations above it")  # fmt: skip


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean square error over mean square. Infinities must agree; NaN counts as infinite error."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    infinite = np.isinf(expected)
    if not np.array_equal(found[infinite], expected[infinite]):
        return float("inf")
    difference = np.square(found[~infinite] - expected[~infinite]).sum()
    size = np.square(expected[~infinite]).sum()
    error = difference / size if size else difference
    return float("inf") if np.isnan(error) else float(error)
