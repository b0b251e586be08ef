"""Threads of a team, and ranks that share a memory, under the thread sanitizer. It does not know OpenMP."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fsanitize=thread"]


def test_nobody_reads_what_another_is_writing(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    probe, program = tmp_path / "probe.c", tmp_path / "threads"
    probe.write_text("int main(void) { return 0; }\n")
    without_layout = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []  # which older sanitizers mind
    if subprocess.run([compiler, *FLAGS, probe, "-o", program], capture_output=True).returncode:
        pytest.skip("a compiler without thread sanitizer")
    if subprocess.run([*without_layout, program], capture_output=True).returncode:
        pytest.skip("the thread sanitizer does not run here")
    sources = [ROOT / "test" / "threads.c", ROOT / "native" / "meeting.c", ROOT / "native" / "plan.c"]
    subprocess.run([compiler, *FLAGS, f"-I{ROOT / 'native'}", *sources, "-o", program, "-lpthread", "-lm"], check=True)
    ran = subprocess.run([*without_layout, program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
