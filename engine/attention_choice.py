"""Which attention a model runs: what was asked for, checked, and what it means for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.abi import LAST_POS
from engine.attention_table import KV_BLOCKS, MAX_BLOCK, kinds_by_position
from engine.device import Device
from engine.errors import UsageError

ATTENTION_KINDS = ("standard", "flash", "streaming")
BLOCKED_KINDS = ("flash", "streaming")  # that go over queries and keys in blocks


class Policy(NamedTuple):
    """What a layer sees, and so what its cache keeps: the last `window` positions, a row's own included, and the first
    `sink`. window None: everything."""

    window: int | None = None
    sink: int = 0


@dataclass(frozen=True)
class AttentionChoice:
    """The kind of layer, why it is that one, and what the user adds to it."""

    kind: str
    why: str
    window: int | None = None
    sink: int = 0
    q_block: int | None = None
    kv_block: int | None = None

    def name(self, device: Device, kv_dtype: np.dtype, head_dim: int) -> str:
        """What tables call it: the kind that runs, for "auto" each kind and the position from which on it runs."""
        if self.kind != "auto":
            return f"{self.kind}+window" if self.is_endless else self.kind
        kinds = kinds_by_position(device, kv_dtype, head_dim)
        return ", ".join(f"{kind} from {start}" if start else kind for start, kind in kinds)

    @property
    def is_endless(self) -> bool:
        """Whether every layer forgets, so that a sequence has no end."""
        return self.window is not None

    @property
    def last_sink_pos(self) -> int:
        """Where the cache of sinks and window ends: from no further away is a sink seen."""
        return self.sink + (self.window or 0) - 1

    def policy(self, own_window: int | None) -> Policy:
        """What a layer sees to which its model gives a window of its own, perhaps: the smaller window counts, and
        there are sinks only before the user's."""
        if self.window is None or (own_window is not None and own_window < self.window):
            return Policy(own_window)
        return Policy(self.window, self.sink)

    def layer_options(self, own_window: int | None) -> dict[str, Any]:
        """What makes a layer of this kind."""
        window, sink = self.policy(own_window)
        options = {"window": window, "sink": sink, "q_block": self.q_block, "kv_block": self.kv_block}
        return {name: value for name, value in options.items() if value}


def choose_attention(
    wanted: str,
    device: Device,
    *,
    sink: int | None = None,
    window: int | None = None,
    q_block: int | None = None,
    kv_block: int | None = None,
) -> AttentionChoice:
    """The attention for what was asked. Raises UsageError for what cannot be or does not belong together."""
    if wanted not in ("auto", *ATTENTION_KINDS):
        raise UsageError(f"attention {wanted!r}: expected one of auto, {', '.join(ATTENTION_KINDS)}")
    _whole("sink", sink, 0)
    _whole("window", window, 1)
    if q_block is not None and not (type(q_block) is int and 1 <= q_block <= MAX_BLOCK):
        raise UsageError(f"q_block {q_block!r}: expected 1 to {MAX_BLOCK}")
    if kv_block is not None and kv_block not in KV_BLOCKS:
        raise UsageError(f"kv_block {kv_block!r}: expected one of {', '.join(map(str, KV_BLOCKS))}")
    if wanted != "streaming" and (sink is not None or window is not None):
        raise UsageError("sink and window belong to attention='streaming'")
    if wanted not in BLOCKED_KINDS and (q_block is not None or kv_block is not None):
        raise UsageError("q_block and kv_block belong to attention='flash' or 'streaming'")
    if sink is not None and window is None:
        raise UsageError(f"sink {sink} needs a window")
    if (sink or 0) + (window or 0) > LAST_POS:
        raise UsageError(f"sink {sink} and window {window}: together at most {LAST_POS} positions")
    why = "auto: the fastest here" if wanted == "auto" else "asked for"
    if wanted == "flash" and not device.runs("flash_attention"):
        wanted, why = "standard", "this build has no flash attention: USE_FLASH_ATTENTION=0"
    return AttentionChoice(wanted, why, window, sink or 0, q_block, kv_block)


def _whole(name: str, value: object, least: int) -> None:
    if value is not None and (type(value) is not int or not least <= value <= LAST_POS):
        raise UsageError(f"{name} {value!r}: expected a whole number from {least} to {LAST_POS}")
