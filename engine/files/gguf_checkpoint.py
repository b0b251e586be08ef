"""The weights of a GGUF file under the names and in the order of rows that models know."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import RillError
from engine.files.checkpoint import STORED_DTYPES, Checkpoint, Readable, StoredTensor
from engine.files.gguf import GGUFFile
from engine.files.gguf_blocks import BLOCKS, BlockType
from engine.quantised import Format, QuantisedMatrix

OTHER = "gguf:"  # what the names of other tensors begin with
SLICE_BYTES = 2 << 20  # of decoded weights at once, unless a caller asks for more

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROTATED = re.compile(r"\.self_attn\.[qk]_proj\.(weight|bias)$")


def model_name(stored: str) -> str:
    """A tensor's Hugging Face name. What is no decoder's gets one that no decoder asks for."""
    found = _LAYER.fullmatch(stored)
    if found and found[2] in _LAYER_PARTS:
        return f"model.layers.{found[1]}.{_LAYER_PARTS[found[2]]}.{found[3]}"
    return _MODEL.get(stored, OTHER + stored)


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of a GGUF file that is not simply read: its rows are stored in blocks, or in another order, or both.

    stored: where its bytes lie; block: what they are. head_dim: where not 0, each head's rows are stored in pairs
    (i, i + head_dim / 2), as rotated side by side, and are put into the order in which a model here rotates them, half
    against half. dtype: of the rows as they are read, "F32", "F16" or "BF16". keep: whether it may stay
    quantised.
    """

    stored: StoredTensor
    block: BlockType
    dtype: str
    head_dim: int = 0
    keep: bool = False

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def format(self) -> Format | None:
        """How its rows are quantised, where they may stay so."""
        return self.block.format if self.keep else None

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop), read and decoded now, all at once."""
        values = self.block.decode(self._blocks(start, stop)).astype(STORED_DTYPES[self.dtype], copy=False)
        return values.reshape(stop - start, *self.shape[1:])

    def quantised_rows(self, start: int, stop: int) -> QuantisedMatrix:
        """The same as they are. Scales and minimums that a block holds as products become float16."""
        assert self.block.format is not None and self.block.split is not None
        split = self.block.split(self._blocks(start, stop))
        quants, scales, minimums = (part if part is None else part.reshape(stop - start, -1) for part in split)
        assert quants is not None and scales is not None
        lower = None if minimums is None else minimums.astype(np.float16)
        return QuantisedMatrix(self.block.format, quants.astype(np.uint8, copy=False), scales.astype(np.float16), lower)

    def read(self) -> npt.NDArray[Any]:
        """All rows, decoded slice by slice."""
        values = np.empty(self.shape, STORED_DTYPES[self.dtype])
        step = max(1, SLICE_BYTES // (4 * int(np.prod(self.shape[1:], dtype=np.int64))))
        step += -step % (self.head_dim or 1)
        for start in range(0, len(values), step):
            stop = min(start + step, len(values))
            values[start:stop] = self.rows(start, stop)
        return values

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self.read()
        return values if dtype is None else values.astype(dtype, copy=False)

    def _blocks(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The blocks of rows [start, stop): [blocks, bytes of a block]."""
        if not self.head_dim:
            return self.stored.row_bytes(start, stop).reshape(-1, self.block.nbytes)
        first = start - start % self.head_dim  # heads are read whole
        heads = self.stored.row_bytes(first, stop + -stop % self.head_dim).reshape(-1, self.head_dim // 2, 2, self._row)
        rows = heads.swapaxes(1, 2).reshape(-1, self._row)[start - first : stop - first]
        return rows.reshape(-1, self.block.nbytes)

    @property
    def _row(self) -> int:
        """Bytes of a row."""
        return self.stored.nbytes // self.shape[0]


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file, by their Hugging Face names.

    dtype: of the model; "auto" keeps quantised matrices so (where ranks cut them within a group, as bfloat16); anything
    else decodes into float32, which is exact. pairs_of: the head_dim where the file's rows of q and k are stored in
    pairs (Llama's are), else 0.
    """

    def __init__(self, file: GGUFFile, dtype: str, pairs_of: int) -> None:
        self.directory = file.path.parent
        self.config_path = file.path
        self._decoded_dtype = "BF16" if dtype == "auto" else "F32"
        self._keep = dtype == "auto"
        self._pairs_of = pairs_of
        tensors = {model_name(name): tensor for name, tensor in file.tensors.items()}
        self._hold(file.path, tensors)

    def stored_name(self, name: str) -> str:
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        part, _, kind = part.rpartition(".")
        own = {model: f"blk.{layer}.{stored}.{kind}" for stored, model in _LAYER_PARTS.items()}
        return own.get(part) or {model: stored for stored, model in _MODEL.items()}.get(name, name.removeprefix(OTHER))

    def _readable(self, name: str, tensor: StoredTensor) -> Readable:
        block = BLOCKS[tensor.dtype]
        head_dim = self._pairs_of if _ROTATED.search(name) else 0
        if block.is_plain and not head_dim:
            return tensor
        if not block.is_plain and len(tensor.shape) != 2:
            problem = f"has type {block.name}, in which only matrices can be stored"
            raise RillError(f"{tensor.file}: tensor {tensor.name!r} {problem}")
        dtype = tensor.dtype if block.is_plain else self._decoded_dtype
        return BlockTensor(tensor, block, dtype, head_dim, self._keep)
