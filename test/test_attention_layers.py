"""The layers of attention by themselves: plain arrays in and out, what they refuse, and how "auto" chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    AttentionCase,
    AttentionRig,
    assert_close,
    assert_same_bits,
    cpu_devices,
    error_limit,
    host_devices,
    normal,
    sequences,
    softmax,
)

from engine import LLM, SamplingParams
from engine.abi import BFLOAT16, FLOAT16, FLOAT32
from engine.attention_choice import ATTENTION_KINDS
from engine.attention_table import KV_BLOCKS, TABLE, _table, kinds_by_position, kv_block_for
from engine.errors import UsageError
from engine.ops.attention import (
    KINDS,
    AutoAttention,
    FlashAttention,
    MultiHeadAttention,
    StreamingAttention,
)
from tools.tune_attention import dump

every_kind = pytest.mark.parametrize("kind", KINDS)
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 24


def test_every_kind_that_can_be_asked_for_has_a_layer() -> None:
    assert tuple(KINDS) == (*ATTENTION_KINDS, "auto")


def values(seed: int, batch: int, seq: int, keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = normal(rng, batch, seq, HEADS, HEAD_DIM)
    return q, normal(rng, batch, keys, KV_HEADS, HEAD_DIM), normal(rng, batch, keys, KV_HEADS, HEAD_DIM)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: list[int], window: int | None = None,
          scale: float = HEAD_DIM**-0.5) -> np.ndarray:  # fmt: skip
    """In float64, position by position."""
    out = np.empty(q.shape)
    for b, start in enumerate(first):
        for row in range(q.shape[1]):
            seen = slice(max(0, start + row - window + 1) if window else 0, start + row + 1)
            for head in range(q.shape[2]):
                keys, vectors = (x[b, seen, head * k.shape[2] // q.shape[2]].astype(np.float64) for x in (k, v))
                out[b, row, head] = softmax(keys @ q[b, row, head].astype(np.float64) * scale) @ vectors
    return out


@every_kind
def test_plain_arrays(kind: str) -> None:
    """Several sequences, each at a position of its own; the last query sees the last key by default."""
    q, k, v = values(0, batch=2, seq=5, keys=70)
    for device in host_devices():
        for dtype in (FLOAT32, BFLOAT16, FLOAT16):
            layer, limit = KINDS[kind](HEADS, device=device), error_limit(device, dtype)
            cache = k.astype(dtype), v.astype(dtype)
            assert_close(layer.forward(q, *cache), exact(q, *cache, [65, 65]), limit, (device.description, dtype))
            assert_close(layer.forward(q, *cache, pos=[3, 65]), exact(q, *cache, [3, 65]), limit, device.description)
            assert_close(layer.forward(q, *cache, pos=9), exact(q, *cache, [9, 9]), limit, device.description)


@every_kind
def test_a_layer_of_a_cache_of_several(kind: str) -> None:
    q, k, v = values(1, batch=1, seq=1, keys=66)
    k, v = (np.stack([np.full_like(x, np.nan), x, np.full_like(x, np.inf)]) for x in (k, v))
    for device in host_devices():
        out = KINDS[kind](HEADS, device=device).forward(q, k, v, layer_index=1)
        assert_close(out, exact(q, k[1], v[1], [65]), error_limit(device, FLOAT32), device.description)


def test_scale_window_and_contiguity() -> None:
    q, k, v = values(2, batch=1, seq=40, keys=40)
    wanted = exact(q, k, v, [0], window=7, scale=0.3)
    turned = tuple(np.asfortranarray(x) for x in (q, k, v))
    for device in host_devices():
        for kind in KINDS:
            layer = KINDS[kind](HEADS, 0.3, 7, device=device)
            assert_close(layer.forward(q, k, v), wanted, error_limit(device, FLOAT32), (device.description, kind))
            assert_same_bits(layer.forward(*turned), layer.forward(q, k, v), (device.description, kind))


def test_the_layers_know_where_they_run() -> None:
    for device in host_devices():
        assert MultiHeadAttention(1, device=device).device_type == device.type


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), r"queries of shape \(5, 6, 24\), expected \[batch, seq, heads, head_dim\]"),
        (lambda q, k, v: (q.astype(np.float16), k, v), "queries float16, expected float32"),
        (lambda q, k, v: (q, k.astype(int), v.astype(int)), "keys int64, expected float32, bfloat16 or float16"),
        (lambda q, k, v: (q, k, v[:, 1:]), r"keys .* and values .* differ in shape"),
        (lambda q, k, v: (q, k, v.astype(np.float16)), "keys float32 and values float16 differ in dtype"),
        (lambda q, k, v: (q, k[0], v[0]), r"keys of shape .*, expected \[batch, keys, kv_heads, head_dim\]"),
        (lambda q, k, v: (q, k[:1], v[:1]), "queries .* do not fit keys"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), "queries .* do not fit keys"),
        (lambda q, k, v: (q[:, :, :5], k, v), "5 heads, expected 6"),
        (lambda q, k, v: (q, k[:, :3], v[:, :3]), "5 queries from position -2 on, 3 keys"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "nothing to compute"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "nothing to compute"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    arrays = change(*values(3, batch=2, seq=5, keys=20))
    for kind in KINDS:
        with pytest.raises(UsageError, match=f"attn: .*{message}"):
            KINDS[kind](HEADS, name="attn", device=host_devices()[0]).forward(*arrays)


def test_positions_and_layers_that_are_not_there_are_refused() -> None:
    q, k, v = values(4, batch=1, seq=5, keys=20)
    layer = FlashAttention(HEADS, name="attn", device=host_devices()[0])
    for pos in (-1, 16, [99], 2**31 - 2, 2**40):
        with pytest.raises(UsageError, match="attn: 5 queries from position"):
            layer.forward(q, k, v, pos=pos)
    wrong: Any
    for wrong in (1.5, [1, 2], "1"):
        with pytest.raises(UsageError, match="attn: pos .*, expected a whole number or one for each of 1 sequences"):
            layer.forward(q, k, v, pos=wrong)
    for index in (-1, 1):
        with pytest.raises(UsageError, match=f"attn: layer_index {index}, the cache has 1 layers"):
            layer.forward(q, k, v, layer_index=index)


def test_layers_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({"heads": 0}, "0 heads, expected at least 1"),
        ({"window": 2**31}, "window 2147483648, expected 1 to 2147483647"),
        ({"window": 2.5}, "window 2.5, expected 1 to"),
        ({"scale": np.inf}, "scale inf, expected a positive number"),
        ({"sink": -1, "window": 4}, "sink -1, expected 0 to"),
        ({"sink": 1.0, "window": 4}, "sink 1.0, expected 0 to"),
        ({"sink": 5, "window": 2**31 - 5}, "together at most 2147483647"),
    ):
        with pytest.raises(UsageError, match=f"attn: {message}|attn: sink .*{message}"):
            StreamingAttention(**{"heads": 4, "name": "attn"} | options)  # type: ignore[arg-type]


# What suits a machine.


def test_auto_changes_the_kind_with_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has the bits of the kind that its position has, in whatever chunks a prompt comes."""
    kinds = [(0, "standard"), (50, "flash"), (130, "streaming")]
    monkeypatch.setattr("engine.ops.attention.kinds_by_position", lambda *_: kinds)
    case = AttentionCase(4, 2, 16, (200, 60))
    data = sequences(case)
    for device in cpu_devices():
        found = AttentionRig(device, replace(case, kind="auto"), FLOAT32)
        names = [node.op.name for node in found.plan.nodes[1:]]
        assert names == ["attention", "flash_attention", "streaming_attention"]
        for outputs in (found.run_whole(data), found.run_chunks(data, 70)):
            for start, kind in kinds:
                expected = AttentionRig(device, replace(case, kind=kind), FLOAT32).run_whole(data)
                end = next((later for later, _ in kinds if later > start), 200)
                for output, other in zip(outputs, expected, strict=True):
                    assert_same_bits(output[start:end], other[start:end], (device.description, kind))


def test_the_table_has_what_every_device_asks_for() -> None:
    assert TABLE.exists() and "other" in _table()["other"]
    for device in host_devices():
        for dtype in (FLOAT32, BFLOAT16, FLOAT16, np.dtype(np.int8)):
            for head_dim in (8, 64, 96, 128, 384):
                for kind in ("flash", "streaming"):
                    assert kv_block_for(kind, device, dtype, head_dim) in KV_BLOCKS
                starts, kinds = zip(*kinds_by_position(device, dtype, head_dim), strict=True)
                assert starts[0] == 0 and list(starts) == sorted(set(starts)) and set(kinds) <= set(KINDS) - {"auto"}


def test_without_its_kernel_flash_is_standard(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """Bit for bit, by itself and in a model, which says so."""
    q, k, v = values(5, batch=1, seq=20, keys=90)
    device = cpu_devices()[0]
    expected = MultiHeadAttention(HEADS, device=device).forward(q, k, v)
    with LLM(tiny, attention="standard", max_seq_len=64) as llm:
        text = llm.generate([1, 2, 3], SamplingParams(max_tokens=5, temperature=0)).token_ids
    monkeypatch.setattr(type(device), "runs", lambda self, name: name != "flash_attention")
    assert_same_bits(FlashAttention(HEADS, device=device).forward(q, k, v), expected, device.description)
    with LLM(tiny, attention="flash", max_seq_len=64) as llm:
        assert llm.attention == "standard" and "USE_FLASH_ATTENTION=0" in llm.attention_why
        assert llm.generate([1, 2, 3], SamplingParams(max_tokens=5, temperature=0)).token_ids == text


def test_kinds_are_layers_of_their_own() -> None:
    names = {kind: KINDS[kind].op.name for kind in ("standard", "flash", "streaming")}
    assert names == {"standard": "attention", "flash": "flash_attention", "streaming": "streaming_attention"}
    assert issubclass(StreamingAttention, MultiHeadAttention) and issubclass(AutoAttention, MultiHeadAttention)


def test_the_table_is_written_as_it_is_read() -> None:
    table: dict[str, Any] = {
        "choices": {
            "a": {"float32": {"64": {"kv_block": {"flash": 64}, "auto": [[0, "flash"]]}, "128": {"auto": []}}},
            "other": {"other": {"128": {"kv_block": {"flash": 256, "streaming": 128}, "auto": [[0, "streaming"]]}}},
        }
    }
    assert json.loads(dump(table)) == table
    assert dump(json.loads(TABLE.read_text("utf-8"))) == TABLE.read_text("utf-8")
