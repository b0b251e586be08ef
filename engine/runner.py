"""A loaded model: its plan, its step and its cache, and one method that runs rows through them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np

from engine import machine
from engine.abi import BFLOAT16, FLOAT16, FLOAT32, INT8
from engine.attention_choice import AttentionChoice
from engine.config import ModelConfig
from engine.device import Cancelled, Device, NotFiniteError, Progress, TokenError
from engine.errors import RillError, UsageError
from engine.files.checkpoint import Checkpoint
from engine.kvcache import KVCache, cache_tensors, group_layers, pages_of
from engine.model.decoder import Decoder
from engine.ops.kv_store import Pages
from engine.ops.sample import Sample
from engine.plan import Plan, Tensor, label_of
from engine.ranks.comm import CLOSE, SEARCH, STEP, Comm
from engine.ranks.segments import Segments
from engine.ranks.split import ALL_LAYERS, WHOLE
from engine.step import LOGIT_ROWS, Logprobs, Sampled, Segment, Step, Want, pieces

MAX_ROWS = 512  # of a step: a prompt takes one pass over the weights for so many tokens
IN_FLIGHT = 4  # for each stage, the pieces of a prompt that are begun before the first one is done
KV_DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "int8": INT8}
GIB = 1 << 30


class Runner:
    """The plan of a checkpoint on a device. max_seq_len: positions of a sequence; where `attention` is endless, how far
    back penalties look. comm: all ranks, which take the commands; peers: the same, or the stages that they make up
    (stages.py). Raises RillError where memory would not suffice; `load` reads the weights.

    max_rows: of a replay. most_rows: that `run` takes at once; stages work on several replays at the same time.
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
        peers: Comm | None = None,
        parallel: str = "tensor",
    ) -> None:
        self.device, self.config, self.attention, self.comm = device, config, attention, comm
        self.peers = peers
        self.split, self.stage = (peers.split, peers.stage) if peers else (WHOLE, ALL_LAYERS)
        self.stage.check(config.num_hidden_layers)
        self.split.check(config.num_attention_heads, config.num_key_value_heads,
                         min(config.intermediate_size, config.vocab_size))  # fmt: skip
        self.number = comm.models if comm else 0
        self.closed = False
        self.kv_heads = len(self.split.part(config.num_key_value_heads))
        self.max_rows = max(MAX_ROWS, max_batch)
        self.model = Decoder(config, checkpoint, dtype, attention, device,
                             self.split if parallel == "tensor" else WHOLE, self.split, self.stage)  # fmt: skip
        self.weights = list(self.model.weights())
        if kv_dtype == "auto":
            kv_dtype = "float32" if self.model.table_dtype == FLOAT32 else "bfloat16"
        self.kv_dtype = kv_dtype
        groups = group_layers([attention.policy(own) for own in config.sliding_windows], self.max_rows,
                              None if attention.is_endless else pages_of(max_seq_len))  # fmt: skip
        # Rank 0 hands out pages of all groups, and every rank of those layers that it holds.
        self.groups = [group._replace(layers=[i for i in group.layers if i in self.model.layers]) for group in groups]
        # A ring keeps what a replay that has been stopped needs in order to begin again, not what several do.
        ahead = self.stage.count > 1 and not any(group.ring.ring_pages for group in groups)
        self.most_rows = self.max_rows * (IN_FLIGHT * self.stage.count if ahead else 1)
        self.page_bytes = self.kv_heads * device.cache_bytes(KV_DTYPES[kv_dtype], config.head_dim)
        self.pages_per_seq = sum(group.entries * len(group.layers) for group in self.groups)  # of all layers here
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
        if not self.stage.is_last:
            self.head = len(self.plan.nodes)
            return
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
        if self.peers:
            self.plan.program = Segments(self.plan, self.peers)

    def _check_memory(self) -> None:
        free = machine.free_memory()
        if free is not None and self.comm:
            free //= self.comm.place.ranks
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
        """Puts the segments through the model, at most most_rows tokens, and delivers the wanted rows, which are in
        order.

        Raises Cancelled, NotFiniteError or TokenError; then nothing has been delivered, and the same call may be
        made again.
        """
        for segment in segments:
            for cache in self.caches:
                cache.reserve(segment.slot, segment.first_pos + len(segment.tokens))
        results: list[Sampled] = []
        if self.stage.count > 1:
            self._run_ahead(segments, wants, results)
        else:
            for first, last, part in self._replays(segments, wants):
                self._replay(self.replay, first, last, part, results)
        for want, result in zip(wants, results, strict=True):
            want.accept(result)

    def _run_ahead(self, segments: Sequence[Segment], wants: Sequence[Want], results: list[Sampled]) -> None:
        """All replays are told before the first begins, so that each stage goes on to the next one as soon as it is
        done. What has been told is replayed to the end, whatever becomes of one."""
        assert self.comm is not None
        problems: list[Exception] = []
        with self.comm.turn():
            count = sum(self._tell(first, last) for first, last, _ in self._replays(segments, wants))
            for first, last, part in self._replays(segments, wants):
                try:
                    self._replay(self._take_part, first, last, part, results)
                except (Cancelled, NotFiniteError, TokenError) as error:
                    problems.append(error)
            self.comm.settle()
        if problems and count > 1:
            raise Cancelled  # whose fault it is shows where one replay is a step of its own
        if problems:
            raise problems[0]

    def _replays(
        self, segments: Sequence[Segment], wants: Sequence[Want]
    ) -> Iterator[tuple[int, int, Sequence[Want]]]:
        """Sets the step for one replay after the other, of max_rows tokens and LOGIT_ROWS wanted rows at most. Gives
        the nodes [first, last) to replay, and which rows are wanted of them."""
        start = 0
        for piece in pieces(segments, self.max_rows):
            token = [token for s in piece for token in s.tokens]
            self.step.set_rows(token, [s.first_pos + i for s in piece for i in range(len(s.tokens))],
                               [s.slot for s in piece for _ in s.tokens])  # fmt: skip
            wanted = [want for want in wants if start <= want.row < start + len(token)]
            for i in range(0, max(1, len(wanted)), LOGIT_ROWS):
                part = wanted[i : i + LOGIT_ROWS]
                self.step.set_logit_rows([want.row - start for want in part])
                yield self.head if i else 0, len(self.plan.nodes) if part else self.head, part
            start += len(token)

    def _replay(
        self, replay: Callable[[int, int], None], first: int, last: int, part: Sequence[Want], results: list[Sampled]
    ) -> None:
        for want, entry in zip(part, self.step.arrays["sampling"], strict=False):
            want.prepare(entry)
        try:
            replay(first, last)
        except NotFiniteError as error:
            raise NotFiniteError(len(results) + error.row) from None
        results += self._collect(part)

    def replay(self, first: int, last: int) -> None:
        """Replays nodes [first, last) of the plan, on all ranks."""
        if self.comm is None:
            self.plan.run(first, last)
            return
        with self.comm.turn():
            self._tell(first, last)
            self._take_part(first, last)
            self.comm.settle()

    def _tell(self, first: int, last: int) -> bool:
        """Rank 0 tells the others of a replay. Returns whether it is of rows, and not only of more logits."""
        assert self.comm and self.peers
        self.comm.announce(self.step.shared, STEP, self.number, first, last)
        self.peers.told += first == 0
        return first == 0

    def follow(self, first: int, last: int) -> None:
        """Another rank's part in a replay that rank 0 has told of. Raises as _take_part does."""
        assert self.comm is not None
        self.comm.broadcast(self.step.shared)
        self._take_part(first, last)

    def _take_part(self, first: int, last: int) -> None:
        """This rank's part of a replay of nodes [first, last) of rank 0's plan: of a stage before that one all nodes,
        where the first is replayed. Raises Cancelled or TokenError on all ranks that come later in the plan,
        NotFiniteError after the last collective; anything else ends them all."""
        assert self.comm and self.peers
        self.peers.begun += first == 0
        if not self.stage.is_last:
            first, last = 0, len(self.plan.nodes) if first == 0 else 0
        try:
            self.plan.run(first, min(last, len(self.plan.nodes)))
        except (Cancelled, TokenError) as error:
            self.peers.pass_on(error)
            raise
        except NotFiniteError:
            raise
        except BaseException as error:
            self.comm.fail(error)

    def cancel(self, flag: bool) -> None:
        """Stops the replay that is running (True), or allows replays again (False). From any thread."""
        if self.peers:
            self.peers.stopped = flag
        else:
            self.device.cancel(flag)

    @property
    def in_turn(self) -> bool:
        """Whether this thread is telling the other ranks something."""
        return self.comm is not None and self.comm.in_turn

    def close(self) -> None:
        """Tells the other ranks that this model is not used any more."""
        self.closed = True
        if self.comm and not self.comm.ended:
            with self.comm.turn():
                self.comm.command(CLOSE, self.number)

    def _collect(self, wants: Sequence[Want]) -> list[Sampled]:
        if not wants:
            return []
        download = self.device.download
        token = download(self.sampled.token)
        likely = [download(tensor) for tensor in self.sampled[1:]] if any(want.keep_logprobs for want in wants) else []
        logits = download(self.logits) if any(want.keep_logits for want in wants) else None
        return [
            Sampled(int(token.flat[i]),
                    Logprobs(float(likely[0].flat[i]), likely[1][i], likely[2][i]) if want.keep_logprobs else None,
                    logits[i].copy() if logits is not None and want.keep_logits else None)
            for i, want in enumerate(wants)
        ]  # fmt: skip

    def first_not_finite(self, rows: range) -> str:
        """Replays the last step node by node; names the first node whose output for these rows is not finite."""
        with self.comm.turn() if self.comm else nullcontext():
            if self.comm:
                self.comm.command(SEARCH, self.number, rows.start, rows.stop)
            return self.search(rows)

    def search(self, rows: range) -> str:
        """first_not_finite, on every rank. Of the ranks of a stage, the one counts that sees it first."""
        found: list[tuple[int, int, str]] = []  # stage, node, its name
        assert self.plan.program
        try:
            for i, node in enumerate(self.plan.nodes[: self.head + 1]):
                self.plan.program.run(i, i + 1)  # as no part of a profile: stages have not as many nodes
                if not found and any(self._not_finite(tensor, rows) for tensor in node.written):
                    found.append((self.stage.index, i, label_of(self.plan.nodes, i)))
        except Cancelled as error:
            if self.peers:
                self.peers.pass_on(error)
            found = [(-1, 0, "")]
        if self.comm:
            said = [json.loads(text) for text in self.comm.exchange(json.dumps(found))]
            found = sorted(tuple(each) for one in said for each in one)
        if found and found[0][0] < 0:
            raise Cancelled
        return found[0][2] if found else "no node: it did not happen again"

    def _not_finite(self, tensor: Tensor, rows: range) -> bool:
        if tensor.rows is not self.step.tensors["rows"]:
            return tensor.owner is self.logits
        return not np.isfinite(self.device.download(tensor)[rows.start : rows.stop]).all()


def kv_dtype_names() -> list[str]:
    return ["auto", *KV_DTYPES]


def check_kv_dtype(name: str) -> None:
    if name not in kv_dtype_names():
        raise UsageError(f"kv_dtype {name!r}: expected one of {', '.join(kv_dtype_names())}")
