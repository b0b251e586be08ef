"""The CPU device: the choice of ISA and threads, packed weights, files cut short, forked processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from harness import WEIGHT_DTYPES, WIDTHS, cpu_devices, host_devices, isa_pairs, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.attention_rig import AttentionRig, AttentionShape
from engine import abi, machine
from engine.abi import BFLOAT16, FLOAT16, FLOAT32, struct_dtype
from engine.cpu.huge_pages import ALIGNMENT, HUGE_PAGE, reserve
from engine.device import Device, cpu, device_types, open_device
from engine.errors import RillError, UsageError
from engine.layer import Weight, matrix, plan_input, vector
from engine.ops.matmul import Linear
from engine.plan import Plan

ROOT = Path(__file__).parent.parent
NAMES = {FLOAT32: "F32", BFLOAT16: "BF16", FLOAT16: "F16"}


# Which instructions.


@pytest.fixture
def isas(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose ISAs the test chooses, and no wish in the environment."""
    available = ["baseline", "avx2"]
    monkeypatch.setattr(cpu, "available_isas", lambda: available)
    monkeypatch.delenv("RILL_ISA", raising=False)
    return available


def test_the_best_isa_unless_asked(isas: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.choose_isa("auto") == ("avx2", "the best here")
    assert cpu.choose_isa("baseline") == ("baseline", "asked for")
    monkeypatch.setenv("RILL_ISA", "baseline")
    assert cpu.choose_isa("auto") == ("baseline", "from RILL_ISA")
    assert cpu.choose_isa("avx2") == ("avx2", "asked for"), "RILL_ISA stands below an explicit choice"
    monkeypatch.setenv("RILL_ISA", "auto")
    assert cpu.choose_isa("auto")[0] == "avx2"


def test_avx512_is_the_best_of_its_family(isas: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    isas += ["avx512f", "avx512_vnni"]
    assert cpu.choose_isa("avx512") == ("avx512_vnni", "asked for")
    isas.append("avx512_bf16")
    assert cpu.choose_isa("avx512") == ("avx512_bf16", "asked for")
    assert cpu.choose_isa("avx512f") == ("avx512f", "asked for")
    monkeypatch.setenv("RILL_ISA", "avx512")
    assert cpu.choose_isa("auto") == ("avx512_bf16", "from RILL_ISA")


def test_an_isa_that_is_not_there_is_refused(isas: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("avx512", "avx512_bf16", "neon", "avx", ""):
        with pytest.raises(UsageError, match=rf"isa '{wanted}' \(asked for\): this machine has baseline, avx2"):
            cpu.choose_isa(wanted)
    monkeypatch.setenv("RILL_ISA", "sse9")
    with pytest.raises(UsageError, match=r"isa 'sse9' \(from RILL_ISA\): this machine has baseline, avx2"):
        cpu.choose_isa("auto")
    isas.clear()
    with pytest.raises(RillError, match="the native libraries have not been built"):
        cpu.choose_isa("auto")


def test_every_isa_opens_its_own_library() -> None:
    available = cpu.available_isas()
    assert available[0] == "baseline" and set(available) <= set(abi.ISAS)
    opened = [(device.isa, device.library) for device in cpu_devices()]  # type: ignore[attr-defined]
    assert [isa for isa, _ in opened] == available
    functions = {abi.ffi.addressof(library, "matmul") for _, library in opened}
    assert len(functions) == len(available), "libraries of several ISAs live in one process"
    assert cpu_devices()[0].library.isa_supported(b"sse9") == 0  # type: ignore[attr-defined]


def test_a_library_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(abi, "LIBRARIES", tmp_path)
    assert cpu.available_isas() == []
    assert open_device().type == "numpy", "without libraries, NumPy runs everything"
    with pytest.raises(RillError, match="libengine_avx2.so is not built: run `make native`"):
        abi.open_library("avx2")


def test_devices_are_found_by_name() -> None:
    assert {"cpu", "numpy"} <= set(device_types())
    with pytest.raises(UsageError, match="device 'tpu': expected auto or one of .*cpu.*numpy"):
        open_device("tpu")
    with pytest.raises(UsageError, match="isa 'avx2': the numpy device has none to choose"):
        open_device("numpy", isa="avx2")


# How many threads.


def test_threads_as_asked_else_by_the_environment_else_a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cpu.choose_threads(None) == (7, "one a core")
    assert cpu.choose_threads(3) == (3, "asked for")
    for text, threads in (("5", 5), (" 6 ", 6), ("4,2", 4), ("9999", 1024)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert cpu.choose_threads(None) == (threads, "from OMP_NUM_THREADS")
        assert cpu.choose_threads(3) == (3, "asked for")
    for text in ("", "0", "-2", "many", ",3"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert cpu.choose_threads(None) == (7, "one a core"), text


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_absurd_numbers_of_threads_are_refused(threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads {threads}: expected 1 to 1024"):
        open_device("cpu", threads=threads)


def test_the_choice_is_said_once() -> None:
    device = open_device("cpu", isa="baseline", threads=2)
    assert device.description == "baseline (asked for), 2 threads (asked for)"


def adapting(isa: str, threads: int) -> Device:
    device = cpu.CPUDevice(isa, threads)
    device.adapts = True
    return device


def threads_of(plan: Plan, threads: int) -> int:
    """How many threads take part in a replay."""
    times = np.zeros((threads, len(plan.nodes)), struct_dtype("node_times"))
    assert plan.program
    plan.program.run(0, len(plan.nodes), times)
    return int((times["end"] > 0).any(axis=1).sum())


def product(device: Device, outputs: int, inputs: int, rows: int) -> Plan:
    plan, rng = Plan(device), np.random.default_rng(0)
    layer = Linear([normal(rng, outputs, inputs)], name="weight", device=device)
    device.load(list(layer.weights()))
    count = plan_input(plan, np.array([rows], np.int32), None, "rows")
    plan.keep(layer.record(plan_input(plan, normal(rng, rows, inputs), count, "x")))
    plan.lower()
    return plan


@pytest.mark.parametrize(("outputs", "rows", "expected"), [
    (1024, 1, 1), (1024, 16, 2), (2048, 1, 2), (16384, 1, 3), (16384, 0, 1),
])  # fmt: skip
def test_short_steps_take_fewer_threads(outputs: int, rows: int, expected: int) -> None:
    """A thread for every 4 MiB of weights, or for as many products as take as long; of a wish, all."""
    for isa in cpu.available_isas():
        assert threads_of(product(adapting(isa, 3), outputs, 1024, rows), 3) == expected
        assert threads_of(product(cpu.CPUDevice(isa, 3), outputs, 1024, rows), 3) == 3


def test_the_cache_counts_as_work() -> None:
    device = adapting(cpu.available_isas()[-1], 2)
    for kind in ("standard", "flash", "streaming"):
        for window, expected in ((None, 2), (64, 1)):
            rig = AttentionRig(device, AttentionShape(8, 8, 128, (2048,), window), kind, rows=1)
            rig.store()
            assert threads_of(rig.plan, 2) == expected, (kind, window)


BOUND = """
import os
from engine import LLM
for _ in range(2):
    with LLM("models/tiny-qwen3") as llm:
        llm.logits([1] * 100)  # enough work for all threads
        print(llm.device.threads)
        masks = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
print(sorted(min(mask) for mask in masks if len(mask) == 1))
"""


@pytest.mark.skipif(machine.available_cores() < 2 or not hasattr(os, "sched_getaffinity"), reason="takes two cores")
def test_openmp_binds_threads_to_cores_and_all_cores_stay_in_use() -> None:
    """The thread that loads OpenMP is bound at once. That does not make one core of this process's."""
    environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", BOUND]
    out = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True).stdout
    first, second, bound = out.splitlines()
    assert first == second == str(machine.available_cores())
    assert set(machine.allowed_cpus()) >= set(json.loads(bound)) and len(set(json.loads(bound))) >= 2, bound


WAITING = """
import os
from engine import LLM
def threads(): return len(os.listdir("/proc/self/task"))
before = threads()
with LLM("models/tiny-qwen3", threads=3) as llm:
    loaded = threads()
    llm.logits([1])
    ran = threads()
    llm.device.read_limit()
    print(loaded - before, ran - loaded, threads() - ran)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list threads")
def test_only_the_threads_that_run_plans_are_kept() -> None:
    """With more of its threads than there are CPUs, OpenMP wakes them up for every plan."""
    command = [sys.executable, "-c", WAITING]
    ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert ran.stdout.split() == ["1", "2", "0"], "the engine's thread; those that help it; none for measuring"


# Packed weights.


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_a_packed_matrix_unpacks_to_what_it_was(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    for outputs, inputs in (*((width, 33) for width in WIDTHS), *((17, width) for width in WIDTHS)):
        values = normal(rng, outputs, inputs, dtype=dtype)
        for device in (*host_devices(), isa_pairs()[-1][1]):
            weight = matrix("w", [values])
            device.load([weight])
            unpacked = device.download(weight)
            assert unpacked.shape == values.shape and unpacked.dtype == dtype
            what = (device.description, outputs, inputs)
            assert (np.asarray(unpacked[0:outputs], np.float32) == values.astype(np.float32)).all(), what
            some = np.array([outputs - 1, 0, outputs // 2])
            assert (np.asarray(unpacked[some], np.float32) == values[some].astype(np.float32)).all(), what
            half = slice(outputs // 2, None)
            assert (np.asarray(unpacked[half], np.float32) == values[half].astype(np.float32)).all(), what


def test_several_weights_share_an_arena_without_overlapping() -> None:
    rng = np.random.default_rng(1)
    for device in host_devices():
        shapes = zip((17, 1, 30), (5, 3, 7), WEIGHT_DTYPES, strict=True)
        arrays = [normal(rng, n, k, dtype=d) for n, k, d in shapes]
        weights: list[Weight] = [matrix(str(i), [a]) for i, a in enumerate(arrays)]
        weights.append(vector("bias", normal(rng, 5, dtype=FLOAT16), normal(rng, 3)))
        done: list[tuple[int, int]] = []
        device.load(weights, lambda *progress, done=done: done.append(progress))
        total = sum(device.weight_bytes(w) for w in weights)
        assert [d[1] for d in done] == [total] * 4 and done[-1][0] == total
        assert [d[0] for d in done] == np.cumsum([device.weight_bytes(w) for w in weights]).tolist()
        for weight, array in zip(weights, arrays, strict=False):
            unpacked = np.asarray(device.download(weight)[0 : len(array)], np.float32)
            assert (unpacked == array.astype(np.float32)).all(), (device.description, weight.name)
        parts = [np.asarray(p, np.float32) for p in weights[-1].sources]
        assert (device.download(weights[-1]) == np.concatenate(parts)).all(), "vectors are kept in float32"


# Files.


@dataclass(frozen=True)
class Stored:
    """Rows in a file, as a checkpoint describes them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int


def write_tensors(path: Path, arrays: list[np.ndarray], gap: int = 5) -> list[Stored]:
    """Writes arrays one after the other at odd offsets."""
    stored, data = [], b""
    for i, array in enumerate(arrays):
        data += b"\xee" * gap
        stored.append(Stored(f"layers.{i}.weight", NAMES[array.dtype], array.shape, path, len(data)))
        data += array.tobytes()
    path.write_bytes(data)
    return stored


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_matrices_are_read_from_unaligned_places_in_files(dtype: np.dtype, tmp_path: Path) -> None:
    """Larger than the reader's pieces, odd sizes, several sources stacked; as stored and widened."""
    rng = np.random.default_rng(2)
    arrays = [normal(rng, n, 333, dtype=dtype) for n in (701, 1, 30)]
    sources = write_tensors(tmp_path / "model.safetensors", arrays)
    whole = np.concatenate(arrays)
    for device in (cpu_devices()[0], *isa_pairs()[-1]):
        for wanted in ("auto", "float32"):
            weight = matrix("qkv", sources, wanted)
            assert weight.dtype == (dtype if wanted == "auto" else FLOAT32)
            device.load([weight])
            unpacked = np.asarray(device.download(weight)[0 : len(whole)], np.float32)
            assert (unpacked == whole.astype(np.float32)).all(), (device.description, wanted)


def test_a_file_that_ends_too_soon_is_named_with_its_tensor(tmp_path: Path) -> None:
    """It was whole when its header was checked, and was cut short since."""
    rng = np.random.default_rng(3)
    path = tmp_path / "model.safetensors"
    sources = write_tensors(path, [normal(rng, 40, 33), normal(rng, 40, 33)])
    for cut, name in ((1, "layers.1.weight"), (40 * 33 * 4 + 6, "layers.0.weight")):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - cut)
        for device in (cpu_devices()[0], isa_pairs()[-1][1]):
            with pytest.raises(RillError, match=f"model.safetensors: ends before the data of tensor {name}"):
                device.load([matrix("up", sources if cut == 1 else sources[:1])])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from(WEIGHT_DTYPES)), min_size=1, max_size=4),
    st.integers(1, 50), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_stack_of_parts(parts: list[tuple[int, np.dtype]], inputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [normal(rng, rows, inputs, dtype=dtype) for rows, dtype in parts]
    whole = np.concatenate([a.astype(np.float32) for a in arrays])
    for device in (*cpu_devices()[::2], isa_pairs()[-1][1]):
        weight = matrix("w", arrays, "float32")
        device.load([weight])
        assert (np.asarray(device.download(weight)[0 : len(whole)]) == whole).all(), device.description


# Memory.


@pytest.mark.parametrize("size", [0, 1, 4096, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, 5_000_000])
def test_reserved_memory_is_aligned_zeroed_and_writable(size: int) -> None:
    memory = reserve(size)
    assert memory.nbytes == max(size, 1) and not memory.any()
    assert abi.address(memory) % (HUGE_PAGE if size >= HUGE_PAGE else ALIGNMENT) == 0
    memory[:] = 1
    memory[-1] = 2


def test_reserved_memory_is_not_taken_before_it_is_touched() -> None:
    before = machine.peak_memory()
    memory = reserve(1 << 34)
    memory[:: 1 << 32] = 1
    assert machine.peak_memory() - before < 100 << 20


# Forks.

FORKED = """
import os
import numpy as np
from engine.device import open_device
from engine.errors import RillError
from engine.ops.matmul import Linear

layer = Linear([np.ones((64, 8), np.float32)], device=open_device("cpu", threads=2))
x = np.ones((3, 8), np.float32)
assert (layer.forward(x) == 8).all()
if os.fork() == 0:
    other = Linear([np.ones((64, 8), np.float32)], device=layer.device)
    own = Linear([np.ones((64, 8), np.float32)], device=open_device("cpu", threads=2))
    for use in (layer, other, own):  # to replay, to load, to begin anew
        try:
            use.forward(x)
            os._exit(3)
        except RillError as error:
            print("child:", error, flush=True)
    os._exit(4)
status = os.waitstatus_to_exitcode(os.wait()[1])
assert (layer.forward(x) == 8).all()
print("parent:", status)
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="fork is Unix")
def test_a_forked_child_is_told_and_its_parent_goes_on() -> None:
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[3] == "parent: 4", done.stderr
    assert all(line.startswith("child: this process was forked after the engine had") for line in lines[:3])


def test_two_threads_pack_what_one_packs() -> None:
    values = normal(np.random.default_rng(4), 333, 77, dtype=BFLOAT16)
    for pair in isa_pairs():
        one, two = (Linear([values], device=device) for device in pair)
        for layer in (one, two):
            layer.device.load([layer.matrices[0]])
        assert (one.matrices[0].storage == two.matrices[0].storage).all(), pair[0].description
