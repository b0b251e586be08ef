"""The other ranks' processes on this machine."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process, told from any other that has the same number: before or after it, or in another container."""

    pid: int
    started: int  # ticks after the machine
    namespace: int  # of process numbers; 0: the system does not say

    @staticmethod
    def of_this() -> Process:
        try:
            return Process(os.getpid(), start_of(os.getpid()), os.stat("/proc/self/ns/pid").st_ino)
        except OSError:
            return Process(os.getpid(), 0, 0)

    def kill(self) -> None:
        """Ends it at once, whatever it does, if it is still there and can be told for sure."""
        with suppress(OSError):
            if self.namespace and self.namespace == Process.of_this().namespace and start_of(self.pid) == self.started:
                os.kill(self.pid, signal.SIGKILL)


def start_of(pid: int) -> int:
    """Raises OSError where the system does not say."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    return int(after_name.split()[19])
