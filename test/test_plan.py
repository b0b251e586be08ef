"""Plans: views, the buffers that activations share, the filling of argument structs, replay, eager use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import (
    FLOAT32_LIMIT,
    AttentionCase,
    assert_close,
    assert_same_bits,
    devices,
    error_limit,
    exact_attention,
    host_devices,
    isa_pairs,
    normal,
    sequences,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import BFLOAT16, FLOAT16, FLOAT32, fill_struct
from engine.device import Cancelled, Device, TokenError
from engine.errors import RillError, UsageError
from engine.kvcache import PAGE
from engine.layer import Layer, matrix, plan_input
from engine.ops.add_rmsnorm import AddRMSNorm
from engine.ops.attention import MultiHeadAttention
from engine.ops.embedding import Embedding
from engine.ops.kv_store import KVStore
from engine.ops.logits import Logits
from engine.ops.matmul import Linear
from engine.ops.rmsnorm import RMSNorm, rmsnorm
from engine.ops.rope import RoPE
from engine.ops.rope_angles import RoPEAngles
from engine.ops.swiglu import SwiGLU, swiglu
from engine.plan import Node, Op, Plan, Tensor, label_of, nbytes


class Block(Layer):
    """Gated MLPs with their norms, as models have them: x updated in place, buffers that can be shared."""

    def __init__(self, width: int, seed: int, device: Device) -> None:
        super().__init__("block", device)
        rng = np.random.default_rng(seed)
        self.norm = RMSNorm(normal(rng, width), 1e-6, "block.norm", device)
        self.up = Linear([normal(rng, width, width)] * 2, name="block.up", device=device)
        self.act = SwiGLU("block.act", device)
        self.down = Linear([normal(rng, width, width)], name="block.down", device=device)
        self.last = AddRMSNorm(normal(rng, width), 1e-6, "block.last", device)

    def record(self, x: Tensor) -> Tensor:
        hidden = self.norm.record(x)
        for _ in range(3):
            hidden = self.last.record(x, self.down.record(self.act.record(self.up.record(hidden))))
        return hidden


def lowered_block(device: Device, max_rows: int = 6, width: int = 40) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """The block's plan and its tensors: rows, input, output."""
    block, plan = Block(width, 0, device), Plan(device)
    device.load(list(block.weights()))
    rows = plan_input(plan, np.array([max_rows], np.int32), None, "rows")
    x = Tensor((max_rows, width), FLOAT32, "x", plan, rows)
    device.upload(x, np.zeros(x.shape, np.float32))
    out = plan.keep(block.record(x))
    plan.lower()
    return plan, rows, x, out


def test_a_plan_is_replayed_with_any_number_of_rows() -> None:
    """Sharing buffers and leftovers of longer steps change no bit."""
    values = normal(np.random.default_rng(1), 6, 40)
    reference = Block(40, 0, devices()[0]).forward(values)
    for device in (*devices(), isa_pairs()[-1][1]):
        alone = Block(40, 0, device).forward(values)
        assert_close(alone, reference, FLOAT32_LIMIT, device.description)
        plan, rows, x, out = lowered_block(device)
        for count in (6, 1, 4, 6):
            rows.storage[0] = count
            x.storage[:] = values
            plan.run()
            if device.type == "cpu":
                assert_same_bits(device.download(out), alone[:count], (device.description, count))
            assert device.download(out).shape == (count, 40)


def test_part_of_a_plan_is_replayed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node by node gives what one call gives."""
    values = normal(np.random.default_rng(2), 6, 40)
    for device in devices():
        if device.type == "cuda":  # nodes that are launched together round otherwise: test_cuda_fusion.py
            monkeypatch.setattr(device, "fuses", False)
        plan, _, x, out = lowered_block(device)
        x.storage[:] = values
        plan.run()
        whole = device.download(out)
        x.storage[:] = values
        for i in range(len(plan.nodes)):
            plan.run(i, i + 1)
        assert_same_bits(device.download(out), whole, device.description)


def test_a_cancelled_replay_says_so_and_can_be_repeated() -> None:
    values = normal(np.random.default_rng(3), 6, 40)
    for device in (*devices(), isa_pairs()[-1][1]):
        plan, _, x, out = lowered_block(device)
        device.cancel(True)
        with pytest.raises(Cancelled):
            plan.run()
        device.cancel(False)
        x.storage[:] = values
        plan.run()
        assert np.isfinite(device.download(out)).all()


def test_nodes_after_a_failed_one_do_not_run() -> None:
    for device in (*host_devices(), isa_pairs()[-1][1]):
        embedding = Embedding(np.ones((4, 8), np.float32), device=device)
        norm = RMSNorm(np.ones(8, np.float32), 1e-6, device=device)
        device.load([embedding.table, norm.weight])
        plan = Plan(device)
        rows = plan_input(plan, np.array([2], np.int32), None, "rows")
        token = plan_input(plan, np.array([1, 4], np.int32), rows, "token")
        out = plan.keep(norm.record(embedding.record(token)))
        plan.lower()
        out.storage[...] = 7
        with pytest.raises(TokenError, match="row 1 "):
            plan.run()
        assert (out.storage == 7).all(), device.description


def test_a_plan_must_be_lowered_before_it_runs() -> None:
    with pytest.raises(RillError, match="the plan has not been lowered"):
        Plan(devices()[0]).run()


def test_nodes_are_named_by_index_op_and_layer() -> None:
    plan = lowered_block(devices()[0])[0]
    assert label_of(plan.nodes, 0) == "node 0 rmsnorm of block.norm"
    assert label_of(plan.nodes, 4) == "node 4 add_rmsnorm of block.last"


# Views.


def test_a_view_of_a_view_lies_in_the_same_buffer() -> None:
    values = np.arange(60, dtype=np.float32).reshape(3, 20)
    for device in devices():
        plan = Plan(device)
        rows = plan_input(plan, np.array([2], np.int32), None, "rows")
        whole = Tensor((3, 20), FLOAT32, "qkv", plan, rows)
        device.upload(whole, values)
        inner = whole.columns(4, 16).columns(3, 8)
        assert (inner.width, inner.stride, inner.owner, inner.rows) == (5, 20, whole, rows)
        assert_same_bits(device.download(inner), values[:2, 7:12], device.description)


@pytest.mark.parametrize("start, stop", [(-1, 3), (3, 3), (4, 2), (0, 21)])
def test_columns_outside_a_tensor_are_refused(start: int, stop: int) -> None:
    with pytest.raises(UsageError, match=f"qkv: columns {start}..{stop} of 20"):
        Tensor((3, 20), FLOAT32, "qkv").columns(start, stop)


# Shared buffers.


def test_meaningless_plan_shares_as_said() -> None:
    """a is free once b has been made of it, and c takes its place; a kept tensor is never free."""
    plan, node = Plan(devices()[0]), Op("any", lambda: None, ("out",))
    a, b, c, d = (Tensor((4, width), FLOAT32, name) for name, width in zip("abcd", (8, 6, 7, 8), strict=True))
    for x, out in ((a, b), (b, c), (c, d)):
        plan.record(node, "layer", x=x, out=out)
    assert plan.share_buffers() == [[a, c], [b, d]]
    plan.keep(a.columns(0, 2))
    assert plan.share_buffers() == [[a], [b, d], [c]]


@st.composite
def random_plans(draw: st.DrawFn) -> Plan:
    """Nodes that each read some earlier tensors, or views of them, and write one."""
    plan = Plan(devices()[0])
    tensors = [Tensor((4, draw(st.integers(2, 9))), FLOAT32, "0")]
    for i in range(1, draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3))
        read = [t.columns(0, 1) if draw(st.booleans()) else t for t in read]
        new = draw(st.booleans())
        out = Tensor((4, draw(st.integers(2, 9))), FLOAT32, str(i)) if new else draw(st.sampled_from(tensors))
        inputs = {f"x{j}": t for j, t in enumerate(read)}
        plan.record(Op("any", lambda: None, ("out",)), "layer", out=out, **inputs)
        tensors.append(out)
    for tensor in draw(st.lists(st.sampled_from(tensors), max_size=2)):
        plan.keep(tensor)
    return plan


@settings(max_examples=100, deadline=None)
@given(random_plans())
def test_tensors_that_share_a_buffer_are_never_needed_together(plan: Plan) -> None:
    needed: dict[Tensor, list[int]] = {}
    for i, node in enumerate(plan.nodes):
        for tensor in node.tensors.values():
            needed.setdefault(tensor.owner, []).append(i)
    buffers = plan.share_buffers()
    assert sorted(t.name for b in buffers for t in b) == sorted(t.name for t in needed)
    for buffer in buffers:
        ends = {t: len(plan.nodes) if t in plan.kept else max(needed[t]) for t in buffer}
        in_order = sorted(buffer, key=lambda t: min(needed[t]))
        for tensor, following in zip(in_order, in_order[1:], strict=False):
            assert ends[tensor] < min(needed[following]), f"{tensor.name} and {following.name} overlap"


def test_tensors_with_storage_keep_it() -> None:
    for device in devices():
        plan, _, x, _ = lowered_block(device)
        before = x.storage
        assert all(x not in buffer for buffer in plan.share_buffers())
        plan.lower()
        assert x.storage is before


def test_a_buffer_holds_its_largest_tensor() -> None:
    for device in devices()[1:]:
        tensors = [Tensor((3, width), FLOAT32) for width in (5, 40, 7)]
        device.allocate(tensors)
        for tensor in tensors:
            assert tensor.storage.shape == tensor.shape and tensor.storage.nbytes == nbytes(tensor)
            tensor.storage[...] = tensor.width
        assert (tensors[0].storage == 7).all(), "one buffer for all"


# Argument structs.


def struct_of(op: Op, **arguments: Any) -> Any:
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    scalars = {k: v for k, v in arguments.items() if not isinstance(v, Tensor)}
    return fill_struct(Node(op, tensors, scalars, "layer"), lambda tensor: id(tensor))


def test_a_struct_is_filled_by_the_names_of_its_fields() -> None:
    rows = Tensor((1,), np.dtype(np.int32), "rows")
    x = Tensor((4, 20), FLOAT32, "x", rows=rows).columns(5, 15)
    out, weight = Tensor((4, 10), FLOAT32, "out", rows=rows), Tensor((5,), FLOAT32, "weight")
    struct = struct_of(rmsnorm, x=x, weight=weight, out=out, groups=2, eps=0.5)
    assert (struct.x_stride, struct.out_stride, struct.weight_width) == (20, 10, 5)
    assert (struct.groups, struct.eps) == (2, 0.5)


def test_a_node_and_a_struct_that_differ_are_refused() -> None:
    rows = Tensor((1,), np.dtype(np.int32), "rows")
    x, out = (Tensor((4, 8), FLOAT32, name, rows=rows) for name in ("x", "out"))
    with pytest.raises(RillError, match="swiglu: abi.h has no field beta, gamma"):
        struct_of(swiglu, x=x, out=out, gamma=x, beta=1.0)
    with pytest.raises(RillError, match="swiglu: nothing to fill abi.h's field x_stride with"):
        struct_of(swiglu, out=out)
    with pytest.raises(RillError, match="rmsnorm: nothing to fill abi.h's field eps with"):
        struct_of(rmsnorm, x=x, weight=x, out=out, groups=1)


# Eager use.


def test_arrays_compute_at_once_and_stay_as_they_are() -> None:
    values = normal(np.random.default_rng(4), 5, 40)
    for device in devices():
        layer = Block(40, 0, device)
        before = values.copy()
        first = layer.forward(values)
        assert_same_bits(values, before, "in-place nodes work on a copy")
        assert_same_bits(layer.forward(values), first, device.description)
        assert_same_bits(layer.forward(np.asfortranarray(values)), first, "any memory layout")
        half = values.astype(np.float16)
        assert_same_bits(layer.forward(half), layer.forward(half.astype(np.float32)), "float16 is widened")


def test_any_float_is_taken_as_float32() -> None:
    values = normal(np.random.default_rng(5), 3, 8)
    for device in devices():
        norm = RMSNorm(np.ones(8, np.float32), 1e-6, device=device)
        for dtype in (np.float64, np.float16, BFLOAT16):
            expected = norm.forward(values.astype(dtype).astype(np.float32))
            assert_same_bits(norm.forward(values.astype(dtype)), expected, (device.description, dtype))


def test_attention_over_a_plain_cache_computes_at_once() -> None:
    """KVStore fills pages given as an array, MultiHeadAttention reads them; the array stays as it is."""
    case = AttentionCase(4, 2, 24, (70,))
    data = sequences(case)[0]
    q, k, v = (x.reshape(70, -1) for x in (data.q, data.k, data.v))
    pos, seq = np.arange(70, dtype=np.int32), np.zeros(70, np.int32)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        empty, table = np.zeros((3, 2, 2, PAGE, 24), dtype), np.array([[2, 0]], np.int32)
        for device in devices():
            kv = KVStore(device=device).forward(k, v, empty, pos, seq, table)
            assert kv.dtype == dtype and not empty.astype(np.float32).any()
            out = MultiHeadAttention(4, device=device).forward(q, kv, pos, seq, table)
            exact, limit = exact_attention(case, data, dtype), error_limit(device, dtype)
            assert_close(out, exact, limit, device.description)


def test_logits_of_fewer_rows_than_there_are() -> None:
    x, table = normal(np.random.default_rng(6), 5, 8), normal(np.random.default_rng(7), 20, 8)
    for device in devices():
        out = Logits(matrix("head", [table]), device=device).forward(x, np.array([4, 1], np.int32))
        assert_close(out, x[[4, 1]].astype(np.float64) @ table.T, FLOAT32_LIMIT, device.description)


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    for device in devices():
        norm, rope = AddRMSNorm(np.ones(8, np.float32), 1e-6, "norm", device), RoPE("rope", device)
        with pytest.raises(UsageError, match="norm: inputs of different numbers of rows"):
            norm.forward(np.ones((5, 8), np.float32), np.ones((2, 8), np.float32))
        with pytest.raises(UsageError, match="rope: inputs of different numbers of rows"):
            rope.forward(np.ones((5, 8), np.float32), np.ones((2, 4), np.float32))
        with pytest.raises(UsageError, match=r"norm: input 0 of shape \(8,\), expected \[rows, width\]"):
            norm.forward(np.ones(8, np.float32), np.ones(8, np.float32))
        with pytest.raises(UsageError, match="angles: input 0: int64, expected int32"):
            RoPEAngles(np.ones(4), name="angles", device=device).forward(np.arange(3, dtype=np.int64))


def test_a_layer_without_a_device_takes_the_best_one() -> None:
    layer = SwiGLU()
    assert layer.device_type == ("cpu" if isa_pairs() else "numpy")
    assert layer.forward(np.zeros((2, 6), np.float32)).shape == (2, 3)


def test_weights_are_listed_once_in_order() -> None:
    block = Block(8, 0, devices()[0])
    block.again = block.down  # type: ignore[attr-defined]
    names = [weight.name for weight in block.weights()]
    assert names == ["block.norm.weight", "block.up.weight", "block.down.weight", "block.last.weight"]


def test_tensors_of_two_plans_do_not_mix() -> None:
    device = devices()[0]
    x, y = (plan_input(Plan(device), np.ones((2, 8), np.float32), None, "x") for _ in range(2))
    with pytest.raises(UsageError, match="post_norm: inputs of 2 plans"):
        AddRMSNorm(np.ones(8, np.float32), 1e-6, "post_norm", device).forward(x, y)
