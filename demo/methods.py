"""What a benchmark runs: a method, which stands for a device and its ISA, with a kind of attention and threads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from typing import Any

from demo.options import OptionError
from demo.program import attention_arguments
from engine import LLM
from engine.device.cpu import available_isas


@dataclass(frozen=True)
class Method:
    """What is asked for; `isa_of` and `LLM.attention` say what came of it."""

    name: str  # "auto", "numpy", "cuda", or an ISA
    attention: str
    threads: int | None = None
    dtype: str = "auto"

    def device(self) -> dict[str, str]:
        """LLM's arguments for the name."""
        if self.name in ("auto", "numpy", "cuda"):
            return {"device": self.name}
        return {"device": "cpu", "isa": self.name}


def methods(options: argparse.Namespace) -> list[Method]:
    """Every method with every dtype, kind of attention and number of threads; NumPy has its own threads."""
    isas = available_isas()
    known = ["auto", *isas, *(["avx512"] if any(isa.startswith("avx512") for isa in isas) else []), "numpy", "cuda"]
    for name in options.method:
        if name not in known:
            raise OptionError(f"--method {name!r}: this machine has {', '.join(known)}")
    chosen = product(options.method, options.dtype, options.attention, options.threads or [None])
    found = [Method(name, kind, None if name in ("numpy", "cuda") else n, dtype) for name, dtype, kind, n in chosen]
    return list(dict.fromkeys(found))


def open_model(options: argparse.Namespace, method: Method, max_seq_len: int, max_batch: int = 1) -> LLM:
    arguments: dict[str, Any] = {**method.device(), **attention_arguments(options, method.attention)}
    return LLM(options.model, dtype=method.dtype, kv_dtype=options.kv_dtype, threads=method.threads,
               max_batch=max_batch, max_seq_len=max_seq_len, **arguments)  # fmt: skip


def isa_of(llm: LLM) -> str:
    device: Any = llm.device
    return str(getattr(device, "isa", device.type))


def threads_of(llm: LLM) -> int:
    device: Any = llm.device
    return int(getattr(device, "threads", 1))
