"""From what a user asks for to a loaded model: on one rank, or on all of them alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.attention_choice import AttentionChoice, choose_attention
from engine.device import ALONE, Device, Progress, open_device
from engine.errors import RillError
from engine.files.open_model import ModelFiles, open_model
from engine.ranks.comm import Comm
from engine.ranks.split import share_ranks
from engine.ranks.stages import open_stages
from engine.runner import Runner
from engine.version import __version__

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """LLM's arguments; it says what they are."""

    model: str
    tokenizer: str | None
    device: str
    isa: str
    attention: str
    dtype: str
    kv_dtype: str
    max_seq_len: int
    max_batch: int
    threads: int | None
    sink: int | None
    window: int | None
    q_block: int | None
    kv_block: int | None
    tp: int | None
    pp: int | None
    parallel: str
    cache: bool


@dataclass(frozen=True)
class Opened:
    """A model's files and what runs it."""

    device: Device
    choice: AttentionChoice
    files: ModelFiles
    runner: Runner


def open_runner(options: Options, comm: Comm | None) -> Opened:
    """Opens the device and the files, and records the plan of this rank's part. Reads no weights.

    Raises UsageError or RillError, on all ranks where on one.
    """
    peers = _open_peers(options, comm)
    return together(comm, lambda: _open(options, comm, peers), _facts)


def load(opened: Opened, comm: Comm | None, progress: Progress | None = None, cache: bool = False) -> None:
    """Reads the weights of this rank's part. cache: see Device.load."""

    def work() -> None:
        opened.runner.load(progress, cache)
        opened.files.checkpoint.finish(ignore=opened.files.checkpoint.tensors)

    together(comm, work, lambda _: {})


def _open_peers(options: Options, comm: Comm | None) -> Comm | None:
    """What the model's collectives go by."""
    tp, pp = share_ranks(options.tp, options.pp, comm.size if comm else 1)
    if comm is None:
        return None
    return open_stages(comm, tp, pp)


def _open(options: Options, comm: Comm | None, peers: Comm | None) -> Opened:
    device = open_device(options.device, isa=options.isa, threads=options.threads, place=comm.place if comm else ALONE)
    device.adapts = options.threads is None
    if comm and peers:
        shape = f" (tp {peers.size} × pp {peers.stage.count})" if peers.stage.count > 1 else ""
        device.description += f" on each of {comm.size} ranks{shape}{comm.bound}"
    choice = choose_attention(options.attention, device, sink=options.sink, window=options.window,
                              q_block=options.q_block, kv_block=options.kv_block)  # fmt: skip
    files = open_model(options.model, options.tokenizer, options.dtype, with_tokenizer=not (comm and comm.rank))
    runner = Runner(
        files.config, files.checkpoint, device, dtype=options.dtype, kv_dtype=options.kv_dtype, attention=choice,
        max_seq_len=min(options.max_seq_len, files.config.max_position_embeddings), max_batch=options.max_batch,
        vocab_size=files.vocab_size(), comm=comm, peers=peers, parallel=options.parallel,
    )  # fmt: skip
    return Opened(device, choice, files, runner)


def _facts(opened: Opened) -> dict[str, Any]:
    """What has to be the same on every rank, or on every rank of a stage."""
    checkpoint, config = opened.files.checkpoint, opened.files.config
    tensors = sorted((t.name, t.dtype, list(t.shape)) for t in checkpoint.tensors.values())
    norm = checkpoint.take("model.norm.weight", (config.hidden_size,)).read()  # tells trainings apart
    text = json.dumps([repr(config), sorted(config.raw.items(), key=str), tensors], default=str)
    digest = hashlib.sha256(text.encode() + norm.tobytes()).hexdigest()
    stage = opened.runner.stage
    plan = "plan" if stage.count == 1 else f"plan of stage {stage.index}"
    return {"version": __version__, "isa": str(getattr(opened.device, "isa", opened.device.type)),
            "model": digest[:16], plan: opened.runner.head}  # fmt: skip


def together(comm: Comm | None, work: Callable[[], T], facts: Callable[[T], dict[str, Any]]) -> T:
    """What work() returns. With ranks, all do it, and all fail where one does or where facts of the results differ."""
    if comm is None:
        return work()
    failure: Exception | None = None
    with comm.watch.busy():
        try:
            result = work()
            report = {"facts": facts(result)}
        except Exception as error:
            failure, report = error, {"error": {"is": (str(error) or type(error).__name__)[:500]}}
    said = [json.loads(text) for text in comm.exchange(json.dumps(report))]
    if failure is not None:
        raise failure
    first: dict[str, tuple[int, Any]] = {}
    for rank, other in enumerate(said):
        if "error" in other:
            raise RillError(f"rank {rank}: {other['error']['is']}")
        for name, fact in other["facts"].items():
            before, right = first.setdefault(name, (rank, fact))
            if fact != right:
                raise RillError(f"rank {rank} has another {name} than rank {before}: {fact}, not {right}")
    return result
