"""A rank ends another one's process, and no process that merely has its number."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.ranks.neighbours import Process, start_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="the system does not tell them apart")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def test_a_stopped_process_is_ended(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    Process(child.pid, start_of(child.pid), Process.of_this().namespace).kill()
    assert child.wait(10) == -signal.SIGKILL


def test_another_of_that_number_is_left_alone(child: subprocess.Popen[bytes]) -> None:
    started, namespace = start_of(child.pid), Process.of_this().namespace
    for other in ((child.pid, started + 1, namespace), (child.pid, started, namespace + 1), (child.pid, started, 0)):
        Process(*other).kill()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
    Process(2**22 + 1, started, namespace).kill()  # there is none
