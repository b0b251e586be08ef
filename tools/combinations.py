"""Which methods run with which kinds of attention: runs every pair that this machine has, and makes README.md's table.

    python -m tools.combinations             # prints the table
    python -m tools.combinations --write     # and puts it into README.md

A method that starts with `mpi` runs on two ranks, any other in one process. A cell names what ran: a prompt,
generation, and the tokens that NumPy gives, or others in a near tie. Rows of methods that this machine lacks stay as
they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from demo.artifacts import write_whole
from demo.methods import MPI
from demo.options import Parser
from demo.program import find_mpiexec, run_program
from engine import RillError
from engine.attention_choice import ATTENTION_KINDS
from engine.device.cpu import available_isas

NAME = "tools.combinations"
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- combinations: python -m tools.combinations --write -->\n", "<!-- end of combinations -->\n"
ISAS = ("baseline", "avx2", "avx512")
METHODS = (*ISAS, MPI, *(f"{MPI}+{isa}" for isa in ISAS[1:]))
TIMED = {"pp16": "prefill", "tg3": "decode"}
VERIFIED = "verify"
LACKING = "—"
RANKS = 2

Ran = dict[tuple[str, str], list[str]]  # method and kind of attention -> what ran


def methods_here() -> list[str]:
    """Those that this machine has."""
    return [name for name in METHODS if any(isa.startswith(isa_of(name)) for isa in available_isas())]


def isa_of(method: str) -> str:
    return method.removeprefix(MPI).removeprefix("+") or ISAS[0]


def run_all(methods: Sequence[str], launch: Sequence[str]) -> Ran:
    """Runs the methods with every kind of attention, those of ranks behind the words of `launch`. Raises RillError
    where one fails."""
    alone = [method for method in methods if not method.startswith(MPI)]
    shared = [method for method in methods if method.startswith(MPI)]
    return {**_run(alone, []), **_run(shared, [*launch, sys.executable, "-m", "mpi4py"])}


def _run(methods: Sequence[str], launch: Sequence[str]) -> Ran:
    if not methods:
        return {}
    command = [*(launch or [sys.executable]), "-m", "demo.benchmark", "--method", ",".join(methods), "--attention",
               ",".join(ATTENTION_KINDS), "-t", "1"]  # fmt: skip
    found: Ran = {pair: [] for pair in product(methods, ATTENTION_KINDS)}
    rows = json.loads(_output([*command, "-p", "16", "-n", "3", "-r", "1", "-o", "json"]))
    for test, name in TIMED.items():
        timed = [row for row in rows if row["test"] == test]
        for (method, kind), row in zip(found, timed, strict=True):
            if _is(row["isa"], method) and row["attention"] == kind and row["tokens_per_second"] > 0:
                found[method, kind].append(name)
    verified = _output([*command, "--verify", "5,6,7", "--gen-len", "4"]).splitlines()[:-1]
    for (method, kind), line in zip(found, verified, strict=True):
        status, isa, attention = line.split(",")[0].split()
        if status == "PASS" and _is(isa, method) and attention == kind:
            found[method, kind].append(VERIFIED)
    return found


def _is(isa: str, method: str) -> bool:
    """Whether the ISA that ran, as the benchmark names it, is the method's."""
    ranks = f"{MPI}+" if method.startswith(MPI) else ""
    return isa.startswith(ranks) and isa.removeprefix(ranks).startswith(isa_of(method))


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RillError(f"{' '.join(command)} ends with {done.returncode}: {done.stdout[-300:]} {done.stderr[-600:]}")
    return done.stdout


def table(ran: Ran, before: dict[str, str]) -> Iterator[str]:
    """Its lines. before: those that there are, by method."""
    yield f"| | {' | '.join(ATTENTION_KINDS)} |\n"
    yield "|---" * (len(ATTENTION_KINDS) + 1) + "|\n"
    lacking = {method: row(method, [LACKING] * len(ATTENTION_KINDS)) for method in METHODS}
    for method in METHODS:
        if any(name == method for name, _ in ran):
            yield row(method, [", ".join(ran[method, kind]) for kind in ATTENTION_KINDS])
        else:
            yield before.get(method, lacking[method])


def row(method: str, cells: Sequence[str]) -> str:
    return f"| `{method}` | {' | '.join(cells)} |\n"


def written(readme: str) -> dict[str, str]:
    """The rows of the table in a text, by method. Raises RillError where there is none."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise RillError(f"{README.name}: expected one table between {BEGIN.strip()} and {END.strip()}")
    lines = readme.split(BEGIN)[1].split(END)[0].splitlines(keepends=True)
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def replaced(readme: str, lines: Sequence[str]) -> str:
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return readme[:start] + "".join(lines) + readme[end:]


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    options = parser.parse_args(arguments)
    readme = README.read_text(encoding="utf-8")
    before = written(readme)
    lines = list(table(run_all(methods_here(), [find_mpiexec(), "-n", str(RANKS)]), before))
    print("".join(lines), end="")
    if options.write:
        write_whole(README, lambda partial: partial.write_text(replaced(readme, lines), encoding="utf-8"))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, lambda: run(arguments), joins_ranks=False)


if __name__ == "__main__":
    sys.exit(main())
