"""Ranks: the tokens and logits of one process, each rank with its share, and an end for all when one is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.abi import INT4
from engine.errors import UsageError
from engine.files.packed_cache import KIN, LAYOUTS, cache_name
from engine.layer import matrix
from engine.machine import available_cores
from engine.quantised import Format, quantise
from engine.ranks.comm import START
from engine.ranks.split import Columns, Rows, Split, rows_of
from engine.verify import LOGIT_BOUND
from tools.combinations import methods_here
from tools.golden_cases import CASES, SLIDING_CASES
from tools.make_gguf import write_gguf

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install '.[mpi]'")
ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "rank_worker.py"
BESIDE = Path(sys.executable).parent / "mpiexec"
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")

LIMIT = 60.0  # seconds: nothing takes as long, but for what hangs
SOON = 5.0  # seconds within which all ranks end when one is lost
STARTED = 30.0


def start(ranks: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    launch = [str(MPIEXEC), "-launcher", "fork", "-iface", "lo", "-n", str(ranks)]
    return spawn([*launch, sys.executable, "-m", "mpi4py", *arguments], **environment)


def spawn(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env=inherited | {"PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], limit: float = LIMIT) -> tuple[int, str, str]:
    """Status, standard output and standard error. What takes longer than the limit is ended, and fails."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        pytest.fail(f"still running after {limit} seconds: {err}")
    return process.returncode, out, err


class Run:
    """The worker on some ranks."""

    worker = WORKER

    def __init__(self, directory: Path, ranks: int, jobs: list[dict[str, Any]], fault: str = "", **env: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "jobs.json").write_text(json.dumps(jobs))
        self.directory, self.ranks = directory, ranks
        self.results = directory / "results.npz"
        arguments = [str(self.worker), str(directory / "jobs.json"), str(self.results), str(directory), fault]
        self.process = start(ranks, *arguments, **env)

    def pid(self, rank: int) -> int:
        """The process of a rank, once all have been started."""
        files = [self.directory / str(rank) for rank in range(self.ranks)]
        deadline = time.monotonic() + STARTED
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline and self.process.poll() is None, finish(self.process)
            time.sleep(0.02)
        return int(files[rank].read_text())

    def is_gone(self) -> bool:
        """Whether no process of any rank is left, soon."""
        pids = [int((self.directory / str(rank)).read_text()) for rank in range(self.ranks)]
        deadline = time.monotonic() + SOON
        while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        return not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The same tokens and logits.


def jobs(directory: Path, ranks: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(ranks)

    def prompts(vocab: int, count: int, length: int) -> list[list[int]]:
        return [rng.integers(0, vocab, length - 7 * i).tolist() for i in range(count)]

    for name in ("tiny-qwen3", "tiny-llama"):
        model = str(ROOT / "models" / name)
        for dtype in ("auto", "float32"):
            yield {"model": model, "options": {"dtype": dtype, "max_batch": 4}, "prompts": prompts(1536, 4, 90)}
        window = {"attention": "streaming", "window": 40, "sink": 4}
        yield {"model": model, "options": {"dtype": "float32"} | window, "prompts": prompts(1536, 1, 100)}
        yield {"model": model, "options": window, "prompts": prompts(1536, 2, 100)}
    yield {"model": model, "options": {"device": "numpy", "dtype": "float32"}, "prompts": prompts(1536, 1, 70)}
    for dtype in ("int8-32", "int4"):  # groups that no cut goes through: others are rounded anew
        yield {"model": model, "options": {"dtype": dtype, "cache": False}, "prompts": prompts(1536, 1, 60)}
    for kind in ("standard", "flash", "streaming"):
        options = {"parallel": "allgather", "attention": kind, "dtype": "float32", "max_batch": 2}
        yield {"model": model, "options": options, "prompts": prompts(1536, 2, 80)}
    yield {"model": model, "options": window | {"parallel": "allgather"}, "prompts": prompts(1536, 1, 100)}
    for kind in ("Q8_0", "F16"):  # decoded as they are read; their q and k have another order of rows
        file = directory / f"{kind}.gguf"
        write_gguf(ROOT / "models" / "tiny-llama", file, kind)
        yield {"model": str(file), "options": {"dtype": "float32"}, "prompts": prompts(1536, 1, 50)}
    for case in (*CASES, *SLIDING_CASES):
        heads, kv_heads = case.config["num_attention_heads"], case.config["num_key_value_heads"]
        if heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0):
            folder = directory / case.name
            if not folder.exists():
                folder.mkdir(parents=True)
                case.write(folder)
            vocab = case.config["vocab_size"]
            yield {"model": str(folder), "options": {"dtype": "float32"}, "prompts": prompts(vocab, 2, 90)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_tokens_and_logits_of_one_process(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp(f"ranks-{ranks}")
    wanted = [job | {"count": 12} for job in jobs(directory, ranks)]
    assert len(wanted) >= 15
    if ranks == 1:
        wanted = wanted[:3]
    run = Run(directory / "run", ranks, wanted)
    expected = [alone(job) for job in wanted]
    status, out, err = finish(run.process)
    assert (status, out) == (0, ""), err
    results = dict(np.load(run.results))
    for i, (job, (tokens, logits, size, cache)) in enumerate(zip(wanted, expected, strict=True)):
        dtype = job["options"].get("dtype", "auto")
        kind = "float32" if dtype == "float32" else "quantised" if dtype.startswith("int") else "bfloat16"
        bound = LOGIT_BOUND[kind] * logits.std()
        assert np.abs(results[f"{i}.logits"] - logits).max() <= bound, job["model"]
        for prompt, found, right in zip(job["prompts"], results[f"{i}.tokens"], tokens, strict=True):
            if len(differs := np.flatnonzero(found != right)):
                assert_near_tie(job, [*prompt, *right[: differs[0]]], int(found[differs[0]]), bound)
        if ranks > 1:
            assert results[f"{i}.bytes"] < size, "a rank holds a part"
        if i < 4:  # wide enough that norms and rounding to panels count for little
            assert results[f"{i}.bytes"] <= size / ranks * 1.05
            assert results[f"{i}.cache"] == cache / ranks
            short, *_, long = results[f"{i}.segments"]
            assert (results[f"{i}.segments"][:3] == short).all() and (short == 1 if ranks > 1 else short == long)
            assert long > 5 or ranks == 1, "a long step can be stopped at each sum"


def alone(job: dict[str, Any]) -> tuple[list[list[int]], np.ndarray, int, int]:
    with LLM(job["model"], **job["options"]) as llm:
        params = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True)
        tokens = [completion.token_ids for completion in llm.generate(job["prompts"], params)]
        return tokens, llm.logits(job["prompts"][0]), llm.runner.weight_bytes, llm.runner.cache_capacity_bytes


def assert_near_tie(job: dict[str, Any], before: list[int], token: int, bound: float) -> None:
    with LLM(job["model"], **job["options"]) as llm:
        scores = llm.logits([int(each) for each in before])[-1]
    assert scores.max() - scores[token] <= bound, (job["model"], len(before))


# The program.


def test_rank_0_alone_prints_what_one_process_prints() -> None:
    arguments = ["-m", "demo.infer", "--raw", "-p", "Once upon a time", "-n", "20", "--seed", "3", "--dtype", "float32"]
    alone = finish(spawn([sys.executable, *arguments]))
    shared = finish(start(2, *arguments))
    assert alone[0] == shared[0] == 0, shared[2]
    assert shared[1] == alone[1] != ""
    assert shared[2].count("rill: ") == alone[2].count("rill: ") and "on each of 2 ranks" in shared[2]


@pytest.mark.parametrize(
    ("ranks", "arguments", "problem"),
    [
        (3, [], "3 ranks cannot share 8 heads on 4 of keys and values: expected 1, 2, 4, 8"),
        (2, ["--tp", "4"], "--tp 4: there are 2 ranks; mpiexec -n 4 starts as many as that"),
        (3, ["--tp", "2", "--pp", "2"], "--tp 2 × pp 2: there are 3 ranks; mpiexec -n 4 starts as many as that"),
        (3, ["--pp", "2"], "--pp 2: there are 3 ranks; mpiexec -n 2 starts as many as that"),
        (5, ["--pp", "5"], "--pp 5: the model has 4 layers, and a stage needs one"),
        (2, ["--temperature", "-1"], "--temperature: must be a number in [0, 100], found -1.0"),
        (2, ["no/such/model"], "no/such/model"),
    ],
)
def test_misuse_is_one_line_of_rank_0(ranks: int, arguments: list[str], problem: str) -> None:
    status, out, err = finish(start(ranks, "-m", "demo.infer", *arguments, "--raw", "-p", "Once"))
    assert status != 0 and out == ""
    assert [line for line in err.splitlines() if line.startswith("rill: ")] == [
        line for line in err.splitlines() if problem in line
    ], err


def test_ranks_that_are_bound_to_cores_of_their_own_say_so() -> None:
    command = [str(MPIEXEC), "-launcher", "fork", "-iface", "lo", "-bind-to", "core", "-n", "2", sys.executable, "-m",
               "mpi4py", "-m", "demo.infer", "--raw", "-p", "Once", "-n", "2"]  # fmt: skip
    status, _, err = finish(spawn(command))
    assert status == 0, err
    if available_cores() >= 2:
        assert "1 threads (one a core) on each of 2 ranks, bound to 1 of" in err


COLLECTIVES = """
import numpy as np
from engine.ranks.comm import open_comm

comm = open_comm()
own = np.arange(comm.size, dtype=np.float32)
for rows in (1, 3, 100, 1500, 100):
    for turn in range(3):
        table = np.add.outer(np.arange(rows) % 97, np.arange(1024) % 89).astype(np.float32) + turn
        x, out = table * (comm.rank + 1), np.empty((rows, comm.size * 1024), np.float32)
        comm.all_gather(x, out)
        assert (out.reshape(rows, comm.size, 1024) == table[:, None] * (own[:, None] + 1)).all(), (rows, turn)
        comm.all_reduce(x)
        assert (x == table * (own + 1).sum()).all(), (rows, turn)
assert comm.window is not None
many = np.random.default_rng(comm.rank).standard_normal((200, 1024), np.float32)
alone = many[:1].copy()
comm.all_reduce(many)
comm.all_reduce(alone)
assert (many[:1] == alone).all(), "what is summed beside a row changes its bits"
comm.ended = True
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_of_any_length(ranks: int) -> None:
    """Short ones are messages, long ones go by way of shared memory, the longest in several turns."""
    status, _, err = finish(start(ranks, "-c", COLLECTIVES))
    assert status == 0, err


def test_alone_nothing_of_this_is_there() -> None:
    source = (
        "import sys; from engine import LLM; llm = LLM(sys.argv[1]); llm.generate([1]); "
        "assert not any(node.op.collective for node in llm.runner.plan.nodes); "
        "print([name for name in sys.modules if name.startswith('mpi4py')])"
    )
    status, out, err = finish(spawn([sys.executable, "-c", source, str(ROOT / "models" / "tiny-qwen3")]))
    assert (status, out) == (0, "[]\n"), err


def test_tp_without_ranks() -> None:
    with pytest.raises(UsageError, match="tp 2: there is 1 rank; mpiexec -n 2 starts"):
        LLM(ROOT / "models" / "tiny-qwen3", tp=2)
    with pytest.raises(UsageError, match="pp 2: there is 1 rank; mpiexec -n 2 starts"):
        LLM(ROOT / "models" / "tiny-qwen3", pp=2)
    with pytest.raises(UsageError, match="pp 0: expected a positive number"):
        LLM(ROOT / "models" / "tiny-qwen3", pp=0)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (["-env", "RILL_ISA", "baseline", "WORKER", "A"], "rank 1 has another isa than rank 0: baseline, not "),
        (["WORKER", "B"], "rank 1 was started with other arguments than rank 0"),
    ],
)
def test_ranks_that_differ_end_at_the_start(second: list[str], problem: str, tmp_path: Path) -> None:
    arguments = {}
    for name in "AB":
        (tmp_path / f"{name}.json").write_text(json.dumps([small_job()]))
        files = [tmp_path / f"{name}.json", tmp_path / "results.npz", tmp_path]
        arguments[name] = [sys.executable, "-m", "mpi4py", str(WORKER), *map(str, files)]
    filled = [part for word in second for part in arguments.get(word, [] if word == "WORKER" else [word])]
    launch = [str(MPIEXEC), "-launcher", "fork", "-iface", "lo", "-n", "1", *arguments["A"], ":", "-n", "1", *filled]
    status, _, err = finish(spawn(launch))
    assert status != 0 and problem in err, err
    assert not (tmp_path / "results.npz").exists()


@pytest.mark.parametrize(
    ("pp", "said"), [("1", ["all_reduce", "gather"]), ("2", ["receive", "decode, on 2 stages", "to tell of a step"])]
)
def test_verify_and_profile_on_ranks(pp: str, said: list[str]) -> None:
    program = ["-m", "demo.infer", str(ROOT / "models" / "tiny-qwen3"), "--pp", pp]
    status, out, err = finish(start(2, *program, "--verify", "5,6,7,8", "--gen-len", "3"))
    assert status == 0 and "PASS: 7 tokens, 3 generated" in out, (out, err)
    status, _, err = finish(start(2, *program, "--raw", "-p", "Once", "-n", "5", "--profile"))
    assert status == 0 and all(part in err for part in said), err


def test_methods_of_the_benchmark() -> None:
    """`mpi` is on all ranks, another method rank 0's alone; their tokens are NumPy's."""
    methods = ",".join(["baseline", *(method for method in methods_here() if method.startswith("mpi"))])
    arguments = ["-m", "demo.benchmark", "--method", methods, "--attention", "standard,flash,streaming"]
    status, out, err = finish(start(2, *arguments, "--verify", "5,6,7", "--gen-len", "4"))
    count = 3 * len(methods.split(","))
    assert status == 0 and f"PASS: {count} of {count} give NumPy's tokens" in out, (out, err)
    status, out, err = finish(start(2, *arguments[:4], "-p", "16", "-n", "3", "-r", "1", "-o", "json"))
    assert status == 0, err
    rows = json.loads(out)
    assert {row["test"] for row in rows} == {"pp16", "tg3"} and all(row["tokens_per_second"] > 0 for row in rows)
    assert [row["ranks"] for row in rows] == [1, *[2] * methods.count("mpi")] * 2
    assert [row["isa"].partition("+")[0] for row in rows[:2]] == ["baseline", "mpi"]
    status, _, err = finish(spawn([sys.executable, "-m", "demo.benchmark", "--method", "mpi"]))
    assert status == 2 and "--method mpi: there is one rank" in err


def test_attention_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "demo.benchmark_mpi_attention", "--lengths", "100", "--ranks", "1,2,4", "-r", "1"]
    status, out, err = finish(spawn([*command, "-o", str(tmp_path / "att")]))
    assert status == 0, err
    points = json.loads((tmp_path / "att.json").read_text())["points"]
    cases = [(T, kind, ranks) for T in (100,) for kind in ("standard", "streaming") for ranks in (1, 2, 4)]
    assert [(p["T"], p["attention"], p["ranks"]) for p in points] == cases
    assert all(p["oversubscribed"] == (p["ranks"] > available_cores()) for p in points)
    by_case = {case: p for case, p in zip(cases, points, strict=True)}
    for (T, kind, ranks), p in by_case.items():
        assert p["speed_up"] == by_case[T, kind, 1]["seconds"] / p["seconds"]
        assert (p["efficiency"] is None) == (ranks == 1)
        assert (p["against_standard"] is None) == (kind == "standard")
    assert out.count("\n| 100 |") == 6 and (tmp_path / "att.png").stat().st_size > 10_000
    status, _, err = finish(spawn([*command, "--heads", "3"]))
    assert status == 2 and "--ranks 2: cannot share 3 heads on 3" in err


def test_the_script_measures_one_process_beside_ranks() -> None:
    wanted = {"PROMPT_LEN": "16", "ITERS": "1", "METHOD": "baseline", "ATTENTION": "flash", "PYTHON": sys.executable,
              "MODEL": str(ROOT / "models" / "tiny-llama")}  # fmt: skip
    status, out, err = finish(spawn(["sh", str(ROOT / "run_mpi_benchmark.sh"), "-n", "2", "-o", "json"], **wanted))
    assert status == 0, err
    found = [(row["model"], row["test"], row["isa"], row["ranks"], row["threads"]) for row in json.loads(out)]
    assert found == [("tiny-llama", test, isa, ranks, 3 - ranks) for test in ("pp16", "tg2")
                     for isa, ranks in (("baseline", 1), ("mpi+baseline", 2))]  # fmt: skip


WAYS = pytest.mark.parametrize(("ranks", "pp"), [(2, 1), (2, 2), (4, 2)])

CANCELLING = """
import sys, time
from engine import LLM, SamplingParams
from engine.device import Cancelled
from engine.runner import Runner

run, stopped = Runner.run, []
def counting(self, segments, wants):
    try:
        run(self, segments, wants)
    except Cancelled:
        stopped.append(segments)
        raise
Runner.run = counting
llm = LLM(sys.argv[1], max_seq_len=1000, pp=int(sys.argv[2]))
greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
expected = llm.generate([5, 6, 7], greedy).token_ids
for i in range(60):
    stream = llm.stream([i + 1] * 900, greedy)
    time.sleep(0.0005 * (i % 20))
    stream.close()
    assert llm.generate([5, 6, 7], greedy).token_ids == expected
assert llm.generate([i + 1] * 900, greedy).token_ids == LLM(sys.argv[1], max_seq_len=1000,
    pp=int(sys.argv[2])).generate([i + 1] * 900, greedy).token_ids
print("stopped", len(stopped))
"""


@WAYS
def test_a_step_is_stopped_on_all_ranks_or_on_none(ranks: int, pp: int) -> None:
    status, out, err = finish(start(ranks, "-c", CANCELLING, str(ROOT / "models" / "tiny-qwen3"), str(pp)))
    assert status == 0, err
    assert int(out.split()[1]) > 0, "no step was stopped in its middle"


STOPPING = """
import sys, time
from pathlib import Path
from engine import LLM, SamplingParams
from engine.ranks.comm import open_comm
from engine.ranks.segments import Segments
from engine.ranks.stages import Stages

look, pass_on = Segments._look, Stages.pass_on
def slow(self, index):
    if int(self.plan.nodes[index].rows.storage[0]) > 16:
        time.sleep(0.2)
    look(self, index)
def noting(self, error):
    pass_on(self, error)
    Path(sys.argv[2]).write_text(type(error).__name__)
if open_comm().rank:
    Segments._look, Stages.pass_on = slow, noting
llm = LLM(sys.argv[1], max_seq_len=1000, pp=2)
greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
expected = llm.generate([5, 6, 7], greedy).token_ids
llm.logits([7] * 90)  # replays that are of the last stage alone
stream = llm.stream([9] * 900, greedy)
time.sleep(0.3)
stream.close()
assert llm.generate([5, 6, 7], greedy).token_ids == expected
"""


def test_a_stage_before_rank_0s_hears_that_it_is_to_stop(tmp_path: Path) -> None:
    note = tmp_path / "note"
    status, _, err = finish(start(2, "-c", STOPPING, str(ROOT / "models" / "tiny-qwen3"), str(note)))
    assert status == 0, err
    assert note.read_text() == "Cancelled"


FAILING_REQUESTS = """
import sys
import numpy as np
from engine import LLM, RillError, SamplingParams

llm = LLM(sys.argv[1], pp=int(sys.argv[2]))
greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
expected = llm.generate([5, 6, 7], greedy).token_ids
llm.check_token = lambda token: token
for prompt in ([5, 10**6, 7], [5, -1], [3] * 40 + [1536]):
    try:
        llm.generate(prompt, greedy)
    except RillError as error:
        print(error)
assert llm.generate([5, 6, 7], greedy).token_ids == expected
norm = next(w for w in llm.runner.weights if w.name == "model.layers.2.self_attn.q_norm.weight")
norm.storage[...] = np.nan
try:
    llm.generate([5, 6, 8], greedy)
except RillError as error:
    print(error)
"""


@WAYS
def test_a_request_that_fails_is_its_own_affair(ranks: int, pp: int) -> None:
    """NaN appears on rank 0 alone; the sum after it has it on every rank of the stage."""
    status, out, err = finish(start(ranks, "-c", FAILING_REQUESTS, str(ROOT / "models" / "tiny-qwen3"), str(pp)))
    assert status == 0, err
    assert [line.split(";")[0] for line in out.splitlines()] == [
        "row 1 holds a token id outside the vocabulary",
        "row 1 holds a token id outside the vocabulary",
        "row 40 holds a token id outside the vocabulary",
        "the logits are not finite",
    ]
    assert "rmsnorm of model.layers.2.self_attn.q_norm" in out


NAN_SOMEWHERE = """
import sys
import numpy as np
from engine import LLM, RillError, SamplingParams
from engine.runner import Runner

load = Runner.load
def broken(self, progress=None, cache=False):
    load(self, progress, cache)
    for weight in self.weights:
        if weight.name == "model.layers.0.mlp.down_proj.weight" and self.split.rank == self.split.ranks - 1:
            weight.storage[...] = 255
Runner.load = broken
llm = LLM(sys.argv[1], pp=int(sys.argv[2]))
try:
    llm.generate([[5, 6, 8], [3] * 700], SamplingParams(temperature=0, max_tokens=9))
except RillError as error:
    print(error)
"""


@WAYS
def test_nan_is_found_wherever_it_began(ranks: int, pp: int) -> None:
    """On the last rank of the first stage, which is not rank 0."""
    status, out, err = finish(start(ranks, "-c", NAN_SOMEWHERE, str(ROOT / "models" / "tiny-qwen3"), str(pp)))
    assert status == 0, err
    assert "the logits are not finite; first seen at node" in out
    assert "matmul of model.layers.0.mlp.down_proj" in out, out


# A rank that is lost.


def small_job(count: int = 12, pp: int = 1, length: int = 3) -> dict[str, Any]:
    return {"model": str(ROOT / "models" / "tiny-qwen3"), "options": {"pp": pp}, "prompts": [[*range(length)]],
            "count": count}  # fmt: skip


def long_run(directory: Path, pp: int, **environment: str) -> Run:
    """A worker that generates, one text after another, until it is stopped."""
    return Run(directory, 2, [small_job(900, pp)] * 100, **environment)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("delay", [0.0, 0.4, 1.5])
def test_a_rank_that_is_killed_ends_all(victim: int, delay: float, pp: int, tmp_path: Path) -> None:
    """In the middle of the start, of a load, of a step: wherever it is by then."""
    run = long_run(tmp_path, pp)
    pid = run.pid(victim)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    status, _, err = finish(run.process, SOON)
    assert status != 0, err
    assert run.is_gone()


@pytest.mark.parametrize(
    ("fault", "pp"),
    [("a step raises", 1), ("a plan raises", 1), ("rank 0 raises", 1), ("failing load", 1)]
    + [("a step raises", 2), ("a stage raises", 2), ("rank 0 raises", 2), ("failing load", 2)],
)
def test_a_rank_that_raises_ends_all(fault: str, pp: int, tmp_path: Path) -> None:
    run = Run(tmp_path, 2, [small_job(pp=pp, length=20)], fault)
    run.pid(0)
    status, _, err = finish(run.process, SOON + 5)  # the start included
    assert status != 0 and "on purpose" in err
    assert run.is_gone()


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("delay", [0.0, 0.5, 2.0])
def test_a_rank_that_is_stuck_is_noticed(delay: float, victim: int, pp: int, tmp_path: Path) -> None:
    """In MPI's start, where all have five times as long, in a load, in a step."""
    run = long_run(tmp_path, pp, RILL_HEARTBEAT="1")
    pid = run.pid(victim)
    time.sleep(delay)
    os.kill(pid, signal.SIGSTOP)
    status, _, err = finish(run.process, START * 1 + SOON)
    assert status != 0 and ("has not answered for 1 seconds" in err or "open_comm" in err), err
    assert run.is_gone()


@pytest.mark.parametrize("fault", ["stuck load", "stuck open"])
def test_a_rank_that_is_stuck_before_it_has_a_model_is_noticed(fault: str, tmp_path: Path) -> None:
    run = Run(tmp_path, 2, [small_job()], fault, RILL_HEARTBEAT="0.5")
    status, _, err = finish(run.process, STARTED)
    assert status != 0 and "has not answered for 0.5 seconds" in err, err
    assert run.is_gone()


def test_a_program_that_pauses_between_models_is_not_taken_for_stuck(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, [small_job(), small_job()], "pause", RILL_HEARTBEAT="0.5")
    status, _, err = finish(run.process)
    assert status == 0 and run.results.exists(), err


DROPPED = """
from engine import LLM, SamplingParams
model = "models/tiny-qwen3"
llm = LLM(model)
llm.generate([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
cycle = [llm]
cycle.append(cycle)
del llm, cycle
print(len(LLM(model).generate([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True)).token_ids))
"""


def test_a_model_that_is_collected_while_another_one_is_opened(tmp_path: Path) -> None:
    """Its thread wants a turn, to say that it is not used any more, and the thread that collects it has the turn."""
    status, out, err = finish(start(2, "-c", DROPPED, RILL_HEARTBEAT="5"))
    assert (status, out) == (0, "3\n"), err


def test_a_run_that_is_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    """As by Ctrl-Z: nobody has been waiting for anybody in the meantime."""
    run = Run(tmp_path, 2, [small_job()] * 3, "pause", RILL_HEARTBEAT="1")
    pids = [run.pid(rank) for rank in range(2)]
    for signal_number in (signal.SIGSTOP, signal.SIGCONT):
        time.sleep(2)
        for pid in pids:
            os.kill(pid, signal_number)
    status, _, err = finish(run.process)
    assert status == 0 and run.results.exists(), err


def test_a_slow_load_is_not_taken_for_stuck(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, [small_job()], "slow load", RILL_HEARTBEAT="0.5")
    status, _, err = finish(run.process)
    assert status == 0 and run.results.exists(), err


def test_a_stage_that_is_at_work_is_not_taken_for_stuck(tmp_path: Path) -> None:
    """It takes 2 seconds over a step, and looks up every 0.5."""
    run = Run(tmp_path, 2, [small_job(2, pp=2, length=20)], "slow stage", RILL_HEARTBEAT="1")
    status, _, err = finish(run.process)
    assert status == 0 and run.results.exists(), err


# Parts.


def test_parts_make_up_the_whole() -> None:
    for ranks in (1, 2, 3, 4, 7):
        for count in (7, 8, 100):
            parts = [Split(rank, ranks).part(count) for rank in range(ranks)]
            assert [i for part in parts for i in part] == list(range(count))


def test_neighbours_share_a_head_where_ranks_outnumber_heads() -> None:
    assert [list(Split(rank, 4).part(2)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [list(Split(rank, 4).part(1)) for rank in range(4)] == [[0], [0], [0], [0]]


def test_quantised_sources_stay_so_where_no_group_is_cut() -> None:
    values = np.random.default_rng(0).standard_normal((20, 200)).astype(np.float32)
    whole = quantise(values, Format(INT4, 32))
    for start, stop, stays in ((0, 64, True), (64, 200, True), (32, 96, True), (0, 50, False), (50, 200, False)):
        part = Columns(whole, start, stop)
        assert (part.format is not None) == stays
        if stays:
            assert (part.quantised_rows(3, 9)[:] == whole[3:9][:, start:stop]).all()
    assert (Rows(whole, 5, 15).quantised_rows(2, 4)[:] == whole[7:9]).all()


def test_parts_are_kept_apart_in_the_cache_directory() -> None:
    values = np.ones((64, 64), np.float32)
    halves = [Split(rank, 2).inputs(values) for rank in range(2)]
    for device in LAYOUTS:
        names = [cache_name([matrix("w", [source], "int8")], device) for source in (values, *halves)]
        assert len(set(names)) == 3 and len({name[:KIN] for name in names}) == 1
        assert cache_name([matrix("w", [Columns(values, 32, 64)], "int8")], device) == names[2]


def test_sources_are_cut_as_arrays_are() -> None:
    from engine.files.checkpoint import Checkpoint

    tensor = Checkpoint(ROOT / "models" / "tiny-qwen3").take("model.layers.0.mlp.down_proj.weight", (256, 512))
    whole = tensor.read()
    part = rows_of(tensor, 37, 200)
    assert part.shape == (163, 512) and type(part) is type(tensor)
    assert (part.read() == whole[37:200]).all() and (part.rows(5, 9) == whole[42:46]).all()
    columns = Columns(tensor, 100, 301)
    assert columns.shape == (256, 201)
    assert (columns.read() == whole[:, 100:301]).all() and (columns.rows(3, 8) == whole[3:8, 100:301]).all()
    assert (Columns(whole, 2, 5).rows(0, 9) == whole[:9, 2:5]).all()
    assert (rows_of(Columns(tensor, 2, 5), 4, 9).rows(1, 3) == whole[5:7, 2:5]).all()
