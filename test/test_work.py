"""What nodes have to do: counted here one by one, and by engine.work in formulas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import LLM
from engine.abi import BFLOAT16, FLOAT32
from engine.plan import Node
from engine.work import (
    Limits,
    PlanWork,
    Work,
    count_scores,
    positions_read,
    spans_of,
    work_of,
)

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, INTERMEDIATE, BF16 = 64, 4, 2, 32, 2, 160, 2
POSITION = 2 * KV_HEADS * HEAD_DIM * BF16  # bytes of a position in a layer


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, max_seq_len=64, max_batch=4, attention="flash") as model:
        config = model.config
        assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (HIDDEN, HEADS, KV_HEADS)
        assert (config.head_dim, config.num_hidden_layers, config.intermediate_size) == (HEAD_DIM, LAYERS, INTERMEDIATE)
        yield model


def total(llm: LLM, spans: list[range], logit_rows: int = 1) -> Work:
    return PlanWork(llm.runner.plan, llm.runner.step).total(spans, logit_rows)


def at(*positions: int) -> list[range]:
    return [range(p, p + 1) for p in positions]


@given(st.integers(0, 40), st.integers(0, 12), st.integers(0, 9), st.integers(0, 5))
def test_what_rows_see_is_counted_row_by_row(start: int, length: int, window: int, sink: int) -> None:
    sink = sink if window else 0
    span = range(start, start + length)
    seen = [{p for p in range(row + 1) if not window or p > row - window or p < sink} for row in span]
    assert count_scores(span, window, sink) == sum(map(len, seen))
    assert positions_read(span, window, sink) == len(set().union(*seen))


def test_a_step_reads_every_matrix_once_and_the_positions_that_it_sees(llm: LLM, tiny: Path) -> None:
    stored = (tiny / "model.safetensors").stat().st_size
    assert 0.95 * stored < total(llm, at(0)).memory < 1.05 * stored
    first = total(llm, at(0)).memory
    assert total(llm, at(9)).memory - first == 9 * POSITION * LAYERS
    row = llm.device.weight_bytes(llm.runner.model.embedding.table) / llm.config.vocab_size
    assert total(llm, at(9, 4, 5)).memory - first == (10 + 5 + 6 - 1) * POSITION * LAYERS + 2 * row
    assert total(llm, [range(4, 10)]).memory - first == 9 * POSITION * LAYERS + 5 * row
    with LLM(tiny, attention="streaming", window=6, sink=2, max_batch=1) as endless:
        first = total(endless, at(0)).memory
        assert total(endless, at(1000)).memory - first == 7 * POSITION * LAYERS


def test_operations_are_those_of_the_products(llm: LLM) -> None:
    heads, kv_heads, vocab = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, llm.config.vocab_size
    row = 2 * LAYERS * (HIDDEN * (heads + 2 * kv_heads) + heads * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    scores = sum(range(4, 8))
    work = total(llm, [range(3, 7), range(0, 1)], 2)
    assert work.operations == {BFLOAT16: 5 * row + 2 * 2 * HIDDEN * vocab + 4 * LAYERS * heads * (scores + 1)}
    assert work.flops == sum(work.operations.values())


def test_kinds_by_position_share_the_work(llm: LLM) -> None:
    """Nodes that leave rows outside [from_pos, until_pos) alone do what one node would."""
    node = next(n for n in llm.runner.plan.nodes if n.op.name == "flash_attention")
    spans = [range(3, 20)]
    whole = work_of(node, 17, spans, llm.device)
    parts = [Node(node.op, node.tensors, {**node.scalars, "from_pos": a, "until_pos": b}) for a, b in ((0, 8), (8, 99))]
    works = [work_of(part, 17, spans, llm.device) for part in parts]
    assert sum(work.flops for work in works) == whole.flops
    assert [work.memory for work in works] == [8 * POSITION, 20 * POSITION] and whole.memory == 20 * POSITION


def test_rows_that_pass_are_counted_apart(llm: LLM) -> None:
    nodes = {node.op.name: node for node in llm.runner.plan.nodes}
    swiglu = work_of(nodes["swiglu"], 3, [range(3)], llm.device)
    assert (swiglu.memory, swiglu.activations, swiglu.flops) == (0, 3 * 3 * INTERMEDIATE * 4, 0)
    store = work_of(nodes["kv_store"], 3, [range(3)], llm.device)
    kv = KV_HEADS * HEAD_DIM
    assert store.memory == 0 and store.activations == 3 * (POSITION + 2 * kv * 4 + 2 * 4)  # k, v, pos and seq


def test_works_add_up_and_take_the_longer_of_two_times() -> None:
    a, b = Work(10, 1, {FLOAT32: 100}), Work(20, 2, {FLOAT32: 50, BFLOAT16: 8})
    assert a + b * 2 == Work(50, 5, {FLOAT32: 200, BFLOAT16: 16})
    limits = Limits(11.0, {FLOAT32: 100.0, BFLOAT16: 4.0})
    assert limits.seconds(a) == 1.0 and limits.seconds(b) == 2.5 and limits.seconds(Work(22)) == 2.0


def test_sequences_of_a_step_are_told_apart() -> None:
    pos, seq = np.array([5, 6, 7, 8, 0, 1], np.int32), np.array([2, 2, 2, 1, 3, 3], np.int32)
    assert spans_of(pos, seq) == [range(5, 8), range(8, 9), range(0, 2)]
