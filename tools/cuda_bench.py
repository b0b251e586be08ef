"""Measures everything on a GPU and keeps the figures.

    python -m tools.cuda_bench docs/results

Runs the programs of demo/ one after the other, on a random model of Qwen3-0.6B's shape, and leaves what each of them
prints or writes in the directory, with the commands and the GPU in cuda.json. A program that fails is noted there, and
the rest still runs; the exit status tells. Where PyTorch is installed, cuda.json and cuda-pytorch.md have attention and
products beside its own (tools.compare_gpu).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.artifacts import about_machine, write_json, write_whole
from engine.device import open_device
from tools.compare_gpu import beside_pytorch, table

GPU = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem", "--format=csv"]


def programs(model: str, results: Path) -> dict[str, str]:
    """File to keep what it prints in -> arguments of a module, after settings of the environment. mpi4py's run on two
    ranks; what asks for Hopper's kernels fails on other GPUs, and is noted."""
    benchmark = f"demo.benchmark {model} --method cuda -o json"
    prefill = f"{benchmark} --phase prefill -p 512,2048"
    decode = f"{benchmark} --phase decode -n 128 -d 0,4096 -b 1,8"
    quantised = f"{benchmark} --dtype int8,int4 --phase decode -n 128 -b 1,8"
    ranks = f"demo.benchmark {model} --method cuda,mpi+cuda -o json"
    sweep = f"demo.benchmark_plot --device cuda --T-max 131072 --head-dim 128 -o {results}/cuda-attention"
    return {
        "cuda-decode.json": decode,
        "cuda-decode-unfused.json": f"RILL_CUDA_FUSION=0 {decode}",
        "cuda-decode-persistent.json": f"RILL_CUDA_PERSISTENT=1 {decode}",
        "cuda-prefill.json": prefill,
        "cuda-prefill-hopper.json": f"RILL_CUDA_HOPPER=1 {prefill}",
        "cuda-prefill-own.json": f"RILL_CUBLAS=0 {prefill}",
        "cuda-decode-quantised.json": quantised,
        "cuda-decode-quantised-unfused.json": f"RILL_CUDA_FUSION=0 {quantised}",
        "cuda-decode-quantised-persistent.json": f"RILL_CUDA_PERSISTENT=1 {quantised}",
        "cuda-prefill-quantised.json": f"{benchmark} --dtype int8,int4 --phase prefill -p 512,2048",
        "cuda-decode-ranks.json": f"mpi4py -m {ranks} --phase decode -n 128 -b 1,8",
        "cuda-attention.md": "demo.attention --device cuda",
        "cuda-attention-dense.md": f"{sweep}-exact --heads 16 --kv-heads 8",
        "cuda-attention-window.md": f"{sweep}-window --heads 16 --kv-heads 16 --window 64 --sink 16",
        "cuda-attention-wide.md": f"{sweep}-wide --heads 64 --kv-heads 8 --window 64 --sink 16",
    }


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    print("+", shlex.join(command), flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's mpiexec first
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})


def measure(results: Path, model: str) -> list[dict[str, Any]]:
    """Runs every program; what became of each."""
    records = []
    for file, arguments in programs(model, results).items():
        words = arguments.split()
        settings = [word for word in words if word.startswith("RILL_")]
        command = ["-m", *words[len(settings) :]]
        launcher = ["mpiexec", "-n", "2"] if command[1] == "mpi4py" else []
        start = time.perf_counter()
        done = run(["env", *settings, *launcher, sys.executable, *command])
        if not done.returncode:
            text = done.stdout
            write_whole(results / file, lambda partial, text=text: partial.write_text(text))  # type: ignore[misc]
        print(done.stdout if not done.returncode else done.stderr, flush=True)
        records.append({"command": shlex.join([*settings, *launcher, "python", *command]), "file": file,
                        "status": done.returncode, "seconds": round(time.perf_counter() - start, 1),
                        "error": done.stderr.strip().splitlines()[-1:] if done.returncode else []})  # fmt: skip
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_bench", description=__doc__)
    parser.add_argument("results", type=Path, help="directory for the figures")
    parser.add_argument("--preset", default="qwen3-0.6b", help="of the random model; by default qwen3-0.6b")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    device: Any = open_device("cuda")
    limits = {"read": device.read_limit()}
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/{options.preset}"
        made = run([sys.executable, "-m", "tools.random_model", "--preset", options.preset, model])
        if made.returncode:
            print(made.stderr, file=sys.stderr)
            return 1
        records = measure(options.results, model)
    beside = beside_pytorch(device)
    text = beside.get("absent") or f"{beside['method']}.\n\n{table(beside['rows'])}"
    print(text, flush=True)
    if beside["rows"]:
        write_whole(options.results / "cuda-pytorch.md", lambda partial: partial.write_text(text))
    gpu = run(GPU).stdout.strip().splitlines()
    write_json(options.results / "cuda.json",
               {**about_machine(device), "gpu": gpu, "bytes_per_second": limits, "runs": records,
                "beside_pytorch": beside})  # fmt: skip
    return int(any(record["status"] for record in records))


if __name__ == "__main__":
    from engine.errors import RillError

    try:
        sys.exit(main())
    except RillError as error:
        sys.exit(f"tools.cuda_bench: {error}")
