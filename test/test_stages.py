"""Stages: layers shared out among ranks, in every way that goes with tp and --parallel, and what each rank holds."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ranks import ROOT, Run, alone, finish, start

from engine import LLM
from engine.errors import UsageError
from engine.plan import nbytes
from engine.ranks.split import Stage, share_ranks
from engine.step import Segment, pieces
from engine.verify import LOGIT_BOUND
from tools.golden_cases import DEFAULT, LLAMA, QWEN3, TIED, UNTIED, GoldenCase, new_style, old_style, sizes

ATTENTION: dict[str, dict[str, Any]] = {
    "standard": {}, "flash": {}, "streaming": {}, "window": {"attention": "streaming", "window": 40, "sink": 4},
}  # fmt: skip
CASES = (
    GoldenCase("stages-qwen3", QWEN3 | TIED | sizes(64, 128, 5, 4, 2, 32, 384) | old_style(1e6, None, "bfloat16"), 0,
               dtypes=("BF16",)),  # 5 layers: not every stage has as many
    GoldenCase("stages-llama", LLAMA | UNTIED | sizes(64, 128, 4, 4, 2, 32, 301) | new_style(5e5, DEFAULT), 0),
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directories = [tmp_path_factory.mktemp(case.name) for case in CASES]
    for case, directory in zip(CASES, directories, strict=True):
        case.write(directory)
    return [str(directory) for directory in directories]


@cache
def job(model: str, kind: str, batch: int, dtype: str) -> tuple[dict[str, Any], Any]:
    """A job, and what one process makes of it."""
    rng = np.random.default_rng(batch)
    options = {"attention": kind, **ATTENTION[kind], "dtype": dtype, "max_batch": batch, "cache": False}
    prompts = [rng.integers(0, 300, 90 - 7 * i).tolist() for i in range(batch)]
    wanted = {"model": model, "options": options, "prompts": prompts, "count": 10}
    return wanted, alone(wanted)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_way_to_share(ranks: int, models: list[str], tmp_path: Path) -> None:
    """Greedy tokens and logits of one process: bit for bit where layers are whole."""
    cases = []
    for (i, model), (k, kind), pp in product(enumerate(models), enumerate(ATTENTION), (1, 2, 4)):
        if ranks % pp:
            continue
        for parallel in ("tensor", "allgather"):
            cases.append((job(model, kind, 1 + 3 * ((i + k) % 2), "float32"), parallel, ranks // pp, pp))
        if kind == "flash":
            cases += [(job(model, kind, 4, dtype), "tensor", ranks // pp, pp) for dtype in ("auto", "int8-32")]
    jobs = [wanted | {"options": wanted["options"] | {"parallel": parallel, "tp": tp, "pp": pp}}
            for (wanted, _), parallel, tp, pp in cases]  # fmt: skip
    run = Run(tmp_path, ranks, jobs)
    status, out, err = finish(run.process)
    assert (status, out) == (0, ""), err
    results = dict(np.load(run.results))
    for i, ((wanted, (tokens, logits, *_)), parallel, tp, pp) in enumerate(cases):
        found, what = results[f"{i}.logits"], (wanted["model"], wanted["options"], parallel, tp, pp)
        dtype = {"auto": "bfloat16", "int8-32": "quantised"}.get(wanted["options"]["dtype"], "float32")
        assert np.abs(found - logits).max() <= (LOGIT_BOUND[dtype] * logits.std() if tp > 1 else 0), what
        if dtype == "float32" or tp == 1:
            assert (results[f"{i}.tokens"] == tokens).all(), what


def test_a_stage_holds_its_layers_and_no_others(models: list[str], tmp_path: Path) -> None:
    """What each rank has taken for weights and for the cache, by --tp and --pp, against one process."""
    for model, table_twice in zip(models, (True, False), strict=True):
        with LLM(model, dtype="float32", max_batch=2) as llm:
            whole, layers = llm.runner.weight_bytes, llm.config.num_hidden_layers
            table = llm.device.weight_bytes(llm.runner.model.embedding.table)
            norm = nbytes(llm.runner.model.norm.weight)  # type: ignore[union-attr]
            angles = sum(map(nbytes, llm.runner.model.angles.weights()))  # every stage has them
            kv = llm.runner.cache_capacity_bytes
        each = (whole - norm - angles - (1 if table_twice else 2) * table) // layers  # bytes of a layer
        for pp in (2, 4):
            directory = tmp_path / f"{Path(model).name}-{pp}"
            jobs = [{"model": model, "options": {"dtype": "float32", "max_batch": 2, "pp": pp}, "prompts": [[1]],
                     "count": 1}]  # fmt: skip
            status, _, err = finish(Run(directory, pp, jobs).process)
            assert status == 0, err
            held = [tuple(map(int, (directory / f"held-{rank}").read_text().split())) for rank in range(pp)]
            held = held[1:] + held[:1]  # rank 0 is the last stage
            own = [range(first, end) for *_, first, end in held]
            assert [i for part in own for i in part] == list(range(layers))
            for stage, (weights, cache_bytes, *_) in enumerate(held):
                tables, count = (stage == 0) + (stage == pp - 1), len(own[stage])
                assert weights == each * count + angles + tables * table + norm * (stage == pp - 1)
                assert cache_bytes == kv * count // layers
                assert layers // pp <= count <= -(-layers // pp)


LONG = """
import sys, time
import numpy as np
from pathlib import Path
from engine import LLM, SamplingParams
from engine.ranks.comm import open_comm
from engine.runner import Runner

take_part, times = Runner._take_part, []
def noting(self, first, last):
    begin = time.monotonic()
    take_part(self, first, last)
    with (Path(sys.argv[3]) / str(self.comm.rank)).open("a") as out:
        print(begin, time.monotonic(), int(self.step.arrays["rows"][0]), file=out)
if open_comm():
    Runner._take_part = noting
llm = LLM(sys.argv[1], max_seq_len=4000, max_batch=3, pp=int(sys.argv[2]))
prompts = [(np.arange(length) % 299).tolist() for length in (2900, 40, 1100)]
for completion in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)):
    print(completion.token_ids)
print(abs(llm.logits(prompts[2])).sum())
"""


def test_stages_work_on_several_pieces_of_a_prompt(models: list[str], tmp_path: Path) -> None:
    """The first stage begins pieces of 512 rows before the last one is done with those before."""
    status, expected, err = finish(start(1, "-c", LONG, models[0], "1", str(tmp_path)))
    assert status == 0, err
    status, out, err = finish(start(2, "-c", LONG, models[0], "2", str(tmp_path)))
    assert (status, out) == (0, expected), err
    first, last = ([line.split() for line in (tmp_path / rank).read_text().splitlines()] for rank in "10")
    assert [rows for *_, rows in first] == [rows for *_, rows in last]
    assert [rows for *_, rows in first[:8]] == ["512"] * 7 + [str(4040 - 7 * 512)]
    early = [float(first[i + 1][0]) < float(last[i][1]) for i in range(7)]
    assert any(early), (first[:8], last[:8])


# Parts.


@pytest.mark.parametrize(
    ("layers", "stages", "found"),
    [(28, 2, [14, 14]), (5, 2, [3, 2]), (28, 3, [9, 10, 9]), (6, 4, [1, 2, 2, 1]), (7, 4, [2, 2, 2, 1]), (3, 1, [3]),
     (4, 4, [1, 1, 1, 1])],
)  # fmt: skip
def test_layers_are_shared_evenly(layers: int, stages: int, found: list[int]) -> None:
    parts = [Stage(i, stages).layers(layers) for i in range(stages)]
    assert [len(part) for part in parts] == found
    assert [i for part in parts for i in part] == list(range(layers))


@pytest.mark.parametrize(
    ("tp", "pp", "ranks", "found"),
    [(None, None, 1, (1, 1)), (None, None, 4, (4, 1)), (None, 2, 4, (2, 2)), (None, 4, 4, (1, 4)), (2, 2, 4, (2, 2)),
     (1, 3, 3, (1, 3)), (2, None, 2, (2, 1)),
     (2, None, 4, "tp 2: there are 4 ranks; mpiexec -n 2 "), (1, 2, 4, "tp 1 × pp 2: there are 4 ranks; mpiexec -n 2 "),
     (None, 3, 4, "pp 3: there are 4 ranks; mpiexec -n 3 "), (4, 4, 1, "tp 4 × pp 4: there is 1 rank; mpiexec -n 16 ")],
)  # fmt: skip
def test_how_ranks_are_shared_out(tp: int | None, pp: int | None, ranks: int, found: tuple[int, int] | str) -> None:
    if isinstance(found, str):
        with pytest.raises(UsageError, match=found):
            share_ranks(tp, pp, ranks)
    else:
        assert share_ranks(tp, pp, ranks) == found


@pytest.mark.parametrize("most", [1, 2, 5, 7, 100])
def test_pieces_are_the_segments_in_their_order(most: int) -> None:
    segments = [Segment(3, 10, [1, 2, 3, 4, 5]), Segment(0, 0, [6]), Segment(1, 7, [7, 8, 9, 10])]
    found = list(pieces(segments, most))
    counts = [sum(len(s.tokens) for s in piece) for piece in found]
    assert counts[:-1] == [most] * (len(counts) - 1) and 0 < counts[-1] <= most

    def rows(of: list[Segment]) -> list[tuple[int, int, int]]:
        return [(s.slot, s.first_pos + i, token) for s in of for i, token in enumerate(s.tokens)]

    assert [row for piece in found for row in rows(piece)] == rows(segments)


def test_the_program_says_what_rank_0_has() -> None:
    program = ["-m", "demo.infer", str(ROOT / "models" / "tiny-qwen3"), "--raw", "-p", "Once", "-n", "2", "--verbose"]
    status, _, err = finish(start(4, *program, "--tp", "2", "--pp", "2"))
    assert status == 0 and "on each of 4 ranks (tp 2 × pp 2)" in err, err
    assert "tp 2, pp 2: rank 0 has its part of layers 2 to 3 and of the logits" in err
