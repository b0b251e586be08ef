"""What suits a machine: block sizes and kinds of attention, as `make tune` measured them.

The block of keys decides the bits of a row, and so does the kind. Both depend on position, head_dim, dtype and ISA
alone, never on what else a step holds, so that a row has the same bits in any company.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.device import Device

MAX_BLOCK = 1024  # queries
KV_BLOCKS = (64, 128, 256, 512, 1024)  # whole pages that divide a range of streaming attention
TABLE = Path(__file__).with_suffix(".json")


@cache
def _table() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))["choices"]
    return table


def entry(device: Device, dtype: np.dtype, head_dim: int) -> dict[str, Any]:
    """The measured choices for the nearest head_dim: {"kv_block": {kind: keys}, "auto": [[from position, kind], …]}. A
    device or a dtype that has not been measured has those of "other"."""
    table = _table()
    dtypes = table.get(getattr(device, "isa", device.type), {})
    sizes = dtypes.get(dtype.name, table["other"]["other"])
    return sizes[min(sizes, key=lambda size: abs(int(size) - head_dim))]


def kv_block_for(kind: str, device: Device, dtype: np.dtype, head_dim: int) -> int:
    """Keys to a block of that kind; 0 for a kind without."""
    return int(entry(device, dtype, head_dim)["kv_block"].get(kind, 0))


def kinds_by_position(device: Device, dtype: np.dtype, head_dim: int) -> list[tuple[int, str]]:
    """What "auto" means: the kind from each position on, the first from 0."""
    return [(int(start), str(kind)) for start, kind in entry(device, dtype, head_dim)["auto"]]
