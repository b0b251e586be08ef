"""What a benchmark runs: a method, which stands for a device and its ISA, with a kind of attention and threads.

`mpi` is `baseline` on all ranks that mpiexec has started, `mpi+avx2` is `avx2` and `mpi+cuda` is `cuda` on them; `auto`
takes them, too. Any other method is rank 0's alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from typing import Any

from demo.options import OptionError, given
from demo.program import attention_arguments
from engine import LLM
from engine.device.cpu import available_isas
from engine.ranks.comm import open_comm

MPI = "mpi"


@dataclass(frozen=True)
class Method:
    """What is asked for; `isa_of` and `LLM.attention` say what came of it."""

    name: str  # "auto", "numpy", "cuda", an ISA; "mpi", or "mpi+" and "cuda" or an ISA
    attention: str
    threads: int | None = None
    dtype: str = "auto"

    def device(self) -> dict[str, Any]:
        """LLM's arguments for the name."""
        if self.name == "auto":
            return {"device": "auto"}
        alone = {} if self.name.startswith(MPI) else {"tp": 1}
        name = bare(self.name)
        return {"device": name, **alone} if name in ("numpy", "cuda") else {"device": "cpu", "isa": name, **alone}


def bare(name: str) -> str:
    """What a method's name says apart from `mpi`."""
    return name.removeprefix(MPI).removeprefix("+") or "baseline"


def ranks_here() -> int:
    """How many mpiexec has started."""
    comm = open_comm()
    return comm.size if comm else 1


def methods(options: argparse.Namespace) -> list[Method]:
    """Every method with every dtype, kind of attention and number of threads; NumPy has its own threads."""
    isas = available_isas()
    known = ["auto", *isas, *(["avx512"] if any(isa.startswith("avx512") for isa in isas) else []), "numpy", "cuda"]
    if ranks_here() > 1:
        known += [MPI, *(f"{MPI}+{isa}" for isa in known if isa not in ("auto", "numpy"))]
    for name in options.method:
        if name.startswith(MPI) and ranks_here() == 1:
            raise OptionError(f"--method {name}: there is one rank; mpiexec -n 2 python -m mpi4py -m ... starts two")
        if name not in known:
            raise OptionError(f"--method {name!r}: this machine has {', '.join(known)}")
    chosen = product(options.method, options.dtype, options.attention, options.threads or [None])
    found = [Method(name, kind, threads_for(name, n, options), dtype) for name, dtype, kind, n in chosen]
    return list(dict.fromkeys(found))


def threads_for(name: str, threads: int | None, options: argparse.Namespace) -> int | None:
    """--rank-threads are those of a rank; one process gets as many as all ranks have."""
    if bare(name) in ("numpy", "cuda"):
        return None
    if getattr(options, "rank_threads", None) is None:
        return threads
    return int(options.rank_threads) * (1 if name.startswith(MPI) else ranks_here())


def open_model(options: argparse.Namespace, method: Method, max_seq_len: int, max_batch: int = 1) -> LLM:
    arguments = method.device()
    if "tp" not in arguments:  # on all ranks
        arguments |= given(options, [name for name in ("pp", "parallel") if name in options])
    arguments |= attention_arguments(options, method.attention)
    return LLM(options.model, dtype=method.dtype, kv_dtype=options.kv_dtype, threads=method.threads,
               max_batch=max_batch, max_seq_len=max_seq_len, **arguments)  # fmt: skip


def isa_of(llm: LLM) -> str:
    device: Any = llm.device
    isa = str(getattr(device, "isa", device.type))
    return f"{MPI}+{isa}" if llm.runner.comm else isa


def ranks_of(llm: LLM) -> int:
    return llm.runner.comm.size if llm.runner.comm else 1


def threads_of(llm: LLM) -> int:
    device: Any = llm.device
    return int(getattr(device, "threads", 1))
