"""A loaded model: its plan, its step and its cache, and one method that runs rows through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import machine
from engine.abi import BFLOAT16, FLOAT16, FLOAT32, INT8
from engine.attention_choice import AttentionChoice
from engine.checkpoint import Checkpoint
from engine.comm import BEAT, CLOSE, STEP, Comm
from engine.config import ModelConfig
from engine.device import Cancelled, Device, NotFiniteError, Progress, TokenError
from engine.errors import RillError, UsageError
from engine.kvcache import KVCache, cache_tensors, group_layers, pages_of
from engine.model.decoder import Decoder
from engine.ops.kv_store import Pages
from engine.ops.sample import Sample
from engine.plan import Plan, Tensor, label_of
from engine.segments import Segments
from engine.split import WHOLE
from engine.step import LOGIT_ROWS, Step

MAX_ROWS = 512  # of a step: a prompt takes one pass over the weights for so many tokens
KV_DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "int8": INT8}
GIB = 1 << 30


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence, to be put through the model in a step."""

    slot: int
    first_pos: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Want:
    """Logits wanted of one row of a step. `prepare` fills the row's entry of step.arrays["sampling"]; `accept` gets
    what came of it once the whole step has happened."""

    row: int
    prepare: Callable[[Any], None]
    accept: Callable[[Sampled], None]
    keep_logits: bool = False


@dataclass(frozen=True)
class Sampled:
    """A row's token, its log probability and the likeliest alternatives; its logits where they are kept."""

    token: int
    logprob: float
    top_token: np.ndarray
    top_logprob: np.ndarray
    logits: np.ndarray | None


class Runner:
    """The plan of a checkpoint on a device. max_seq_len: positions of a sequence; where `attention` is endless, how far
    back penalties look. Raises RillError where memory would not suffice; `load` reads the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: Device,
        *,
        dtype: str,
        kv_dtype: str,
        attention: AttentionChoice,
        max_seq_len: int,
        max_batch: int,
        vocab_size: int,
        comm: Comm | None = None,
        parallel: str = "tensor",
    ) -> None:
        self.device, self.config, self.attention, self.comm = device, config, attention, comm
        self.split = comm.split if comm else WHOLE
        self.split.check(config.num_attention_heads, config.num_key_value_heads,
                         min(config.intermediate_size, config.vocab_size))  # fmt: skip
        self.number = comm.models if comm else 0
        self.closed = False
        self.kv_heads = len(self.split.part(config.num_key_value_heads))
        self.max_rows = max(MAX_ROWS, max_batch)
        self.model = Decoder(config, checkpoint, dtype, attention, device,
                             self.split if parallel == "tensor" else WHOLE, self.split)  # fmt: skip
        self.weights = list(self.model.weights())
        if kv_dtype == "auto":
            kv_dtype = "float32" if self.model.embedding.table.dtype == FLOAT32 else "bfloat16"
        self.kv_dtype = kv_dtype
        self.groups = group_layers([attention.policy(own) for own in config.sliding_windows], self.max_rows,
                                   None if attention.is_endless else pages_of(max_seq_len))  # fmt: skip
        self.page_bytes = self.kv_heads * device.cache_bytes(KV_DTYPES[kv_dtype], config.head_dim)
        self.pages_per_seq = sum(group.entries * len(group.layers) for group in self.groups)  # of all layers
        self.cache_capacity_bytes = max_batch * self.pages_per_seq * self.page_bytes  # the most it can come to take
        self._check_memory()
        self.plan = Plan(device)
        entries = sum(group.entries for group in self.groups)
        self.step = Step(device, self.plan, self.max_rows, max_batch, entries, max_seq_len)
        self.caches: list[KVCache] = []  # one a group
        self._record(self._allot(max_batch), vocab_size)

    def _allot(self, slots: int) -> list[Pages]:
        """Makes the caches, each with its columns of the step's page table. Returns where each layer's pages are."""
        shape = self.kv_heads, self.config.head_dim, KV_DTYPES[self.kv_dtype]
        pages: dict[int, Pages] = {}
        start = 0
        for group in self.groups:
            columns = start, start + group.entries
            layers = cache_tensors(len(group.layers), slots * group.entries, *shape)
            table = self.step.tensors["page_table"].columns(*columns)
            self.caches.append(KVCache(layers, self.step.arrays["page_table"][:, slice(*columns)],
                                       slots * group.entries, group.policy.window, group.ring))  # fmt: skip
            pages.update((i, Pages(kv, table, group.ring)) for i, kv in zip(group.layers, layers, strict=True))
            start += group.entries
        return [pages[i] for i in sorted(pages)]

    def _record(self, pages: list[Pages], vocab_size: int) -> None:
        inputs = self.step.tensors
        self.layers = [each.kv for each in pages]
        self.logits = self.plan.keep(self.model.record(self.step, pages))
        # From here on a replay may be repeated for more rows of logits.
        self.head = next(i for i, node in enumerate(self.plan.nodes) if node.written[0].owner is self.logits)
        self.plan.keep(self.plan.nodes[self.head].tensors["x"])
        if self.split.rank:
            return  # rank 0 samples; the others are told the tokens as rows of the next step
        sample = Sample(vocab_size, name="sample", device=self.device)
        self.sampled = sample.record(self.logits, inputs["sampling"], inputs["history"])
        for tensor in self.sampled:
            self.plan.keep(tensor)

    @property
    def weight_bytes(self) -> int:
        return sum(self.device.weight_bytes(weight) for weight in self.weights)

    @property
    def dtype(self) -> str:
        """Of most of the weights."""
        sizes: dict[str, int] = {}
        for weight in self.weights:
            sizes[weight.dtype.name] = sizes.get(weight.dtype.name, 0) + self.device.weight_bytes(weight)
        return max(sizes, key=lambda name: sizes[name])

    @property
    def cache_used_bytes(self) -> int:
        return sum(cache.used_pages() * len(cache.layers) for cache in self.caches) * self.page_bytes

    def usable(self, slot: int, length: int) -> int:
        """How many of a slot's first `length` positions every layer can go on from."""
        return min(cache.usable(slot, length) for cache in self.caches)

    def truncate(self, slot: int, length: int) -> int:
        """Forgets a slot's positions from `length` on. Returns the length that is still usable, perhaps 0: all groups
        of layers keep the same."""
        length = self.usable(slot, length)
        for cache in self.caches:
            cache.truncate(slot, length)
        return length

    def load(self, progress: Progress | None = None, cache: bool = False) -> None:
        """Reads the weights and lowers the plan. cache: see Device.load."""
        self.device.load(self.weights, progress, cache)
        for tensor in self.layers:
            self.device.allocate([tensor])
        self.plan.lower()
        if self.comm:
            self.plan.program = Segments(self.plan, self.comm)

    def _check_memory(self) -> None:
        free = machine.free_memory()
        if free is not None and self.comm:
            free //= self.comm.local
        lower = "sink, window" if self.attention.is_endless else "max_seq_len"
        need = self.weight_bytes + self.cache_capacity_bytes + self._activation_bytes()
        if self.device.type in ("cpu", "numpy") and free is not None and need > free:
            raise RillError(
                f"needs {need / GIB:.2f} GiB ({self.weight_bytes / GIB:.2f} for weights, "
                f"{self.cache_capacity_bytes / GIB:.2f} for a full KV cache), {free / GIB:.2f} GiB are free: "
                f"lower {lower} or max_batch, or take a smaller model"
            )

    def _activation_bytes(self) -> int:
        widest = max(4 * self.config.hidden_size, 3 * self.config.intermediate_size)
        return 4 * (self.max_rows * widest * 2 + LOGIT_ROWS * self.config.vocab_size)

    def run(self, segments: Sequence[Segment], wants: Sequence[Want]) -> None:
        """Puts the segments through the model, at most max_rows tokens, and delivers the wanted rows.

        Raises Cancelled, NotFiniteError or TokenError; then nothing has been delivered, and the same call may be
        made again.
        """
        for segment in segments:
            for cache in self.caches:
                cache.reserve(segment.slot, segment.first_pos + len(segment.tokens))
        self.step.set_rows(
            [token for s in segments for token in s.tokens],
            [s.first_pos + i for s in segments for i in range(len(s.tokens))],
            [s.slot for s in segments for _ in s.tokens],
        )
        results: list[Sampled] = []
        for start in range(0, max(1, len(wants)), LOGIT_ROWS):
            part = wants[start : start + LOGIT_ROWS]
            self.step.set_logit_rows([want.row for want in part])
            for want, entry in zip(part, self.step.arrays["sampling"], strict=False):
                want.prepare(entry)
            self._replay(self.head if start else 0, bool(part), start)
            results += self._collect(part)
        for want, result in zip(wants, results, strict=True):
            want.accept(result)

    def _replay(self, first: int, with_head: bool, start: int) -> None:
        try:
            self.replay(first, len(self.plan.nodes) if with_head else self.head)
        except NotFiniteError as error:
            raise NotFiniteError(start + error.row) from None

    def replay(self, first: int, last: int) -> None:
        """Replays nodes [first, last) of the plan, on all ranks."""
        if self.comm is None:
            self.plan.run(first, last)
            return
        with self.comm.turn():
            self.comm.command(STEP, self.number, first, last)
            self.follow(first, last)

    def follow(self, first: int, last: int) -> None:
        """A rank's part in a replay. Raises Cancelled or TokenError on all ranks, NotFiniteError after the last
        collective; anything else ends them all."""
        assert self.comm is not None
        try:
            self.comm.broadcast(self.step.shared)
            self.plan.run(first, min(last, len(self.plan.nodes)))
        except (Cancelled, NotFiniteError, TokenError):
            raise
        except BaseException as error:
            self.comm.fail(error)

    def cancel(self, flag: bool) -> None:
        """Stops the replay that is running (True), or allows replays again (False). From any thread."""
        if self.comm:
            self.comm.stopped = flag
        else:
            self.device.cancel(flag)

    @property
    def beat_seconds(self) -> float | None:
        """How long the ranks may go without a step before they need a beat; None where there is one rank."""
        return self.comm.patience / 4 if self.comm else None

    def beat(self) -> None:
        """Lets every rank know that the others are alive."""
        if self.comm:
            with self.comm.turn():
                self.comm.command(BEAT)
                self.comm.beat()

    def close(self) -> None:
        """Tells the other ranks that this model is not used any more."""
        self.closed = True
        if self.comm and not self.comm.ended:
            with self.comm.turn():
                self.comm.command(CLOSE, self.number)

    def _collect(self, wants: Sequence[Want]) -> list[Sampled]:
        if not wants:
            return []
        token, logprob, top_token, top_logprob = (self.device.download(tensor) for tensor in self.sampled)
        logits = self.device.download(self.logits) if any(want.keep_logits for want in wants) else None
        return [
            Sampled(int(token.flat[i]), float(logprob.flat[i]), top_token[i], top_logprob[i],
                    logits[i].copy() if logits is not None and want.keep_logits else None)
            for i, want in enumerate(wants)
        ]  # fmt: skip

    def first_not_finite(self, rows: range) -> str:
        """Replays the last step node by node; names the first node whose output for these rows is not finite."""
        for i, node in enumerate(self.plan.nodes[: self.head + 1]):
            self.replay(i, i + 1)
            if any(self._not_finite(tensor, rows) for tensor in node.written):
                return label_of(self.plan.nodes, i)
        return "no node: it did not happen again"

    def _not_finite(self, tensor: Tensor, rows: range) -> bool:
        if tensor.rows is not self.step.tensors["rows"]:
            return tensor.owner is self.logits
        return not np.isfinite(self.device.download(tensor)[rows.start : rows.stop]).all()


def kv_dtype_names() -> list[str]:
    return ["auto", *KV_DTYPES]


def check_kv_dtype(name: str) -> None:
    if name not in kv_dtype_names():
        raise UsageError(f"kv_dtype {name!r}: expected one of {', '.join(kv_dtype_names())}")
