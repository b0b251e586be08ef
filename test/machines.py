"""Two machines on one: network namespaces, each with an address of its own, and a wire between them.

The wire is this file run as a program in a third namespace: it takes the frames that come out of one machine and puts
them into the other after a while. So a delay needs nothing of the kernel but pairs of virtual Ethernet devices.

    machines.py DEVICE DEVICE SECONDS
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SOL_PACKET, VNET_HEADER, IGNORE_OUTGOING = 263, 15, 23  # linux/if_packet.h
ALL_PROTOCOLS = 3
MOST_FRAME = 1 << 17
ADDRESSES = ("10.213.7.1", "10.213.7.2")
ENDS = ("left", "right")  # the devices of the wire

# What hydra runs instead of ssh: LAUNCHER [OPTION...] HOST COMMAND...
LAUNCHER = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
case $1 in %s) machine=%s ;; %s) machine=%s ;; *) exit 1 ;; esac
shift
exec ip netns exec "$machine" sh -c "$*"
"""


class Machines:
    """names: of the namespaces of both machines; launcher: what starts a process on one of them by its address."""

    def __init__(self, directory: Path, delay: float) -> None:
        self.names = [f"rill-{os.getpid()}-{end}" for end in "ab"]
        self.wire = f"rill-{os.getpid()}-wire"
        self.launcher = directory / "launcher"
        self.launcher.write_text(LAUNCHER % tuple(x for pair in zip(ADDRESSES, self.names, strict=True) for x in pair))
        self.launcher.chmod(self.launcher.stat().st_mode | stat.S_IXUSR)
        self.delay = delay

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Runs on the first of them."""
        return ["ip", "netns", "exec", self.names[0], *arguments]

    def _set_up(self) -> None:
        for name in (self.wire, *self.names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for name, address, device in zip(self.names, ADDRESSES, ENDS, strict=True):
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", device, "netns", self.wire)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", self.wire, "link", "set", device, "up")

    def _start_wire(self) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", self.wire, sys.executable, __file__, *ENDS, str(self.delay)]
        wire = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert wire.stdout and wire.stdout.readline() == "ready\n", "the wire does not start"
        return wire

    def _tear_down(self) -> None:
        for name in (self.wire, *self.names):
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in map(int, inside.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


@contextmanager
def machines(directory: Path, delay: float = 0.0) -> Iterator[Machines]:
    """Two machines, gone afterwards. delay: seconds that a frame takes from one to the other, at least."""
    both, wire = Machines(directory, delay), None
    try:
        both._set_up()
        wire = both._start_wire()
        yield both
    finally:
        if wire:
            wire.kill()
            wire.wait()
        both._tear_down()


def why_none() -> str:
    """Why there cannot be machines here; empty where there can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (Debian's iproute2)"
    name = f"rill-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        return ""
    except OSError as error:
        return f"no network namespaces: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def carry_frames(names: Sequence[str], delay: float) -> None:
    """Without end. Frames go with their virtual header, which tells of checksums and segments still to be made."""
    ends = [open_end(name) for name in names]
    print("ready", flush=True)
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], patience)[0]:
            frame = end.recv(MOST_FRAME)
            under_way.append((time.monotonic() + delay, ends[1 - ends.index(end)], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            end.send(frame)


def open_end(name: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    end.setsockopt(SOL_PACKET, IGNORE_OUTGOING, 1)
    end.setsockopt(SOL_PACKET, VNET_HEADER, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
    end.bind((name, 0))
    return end


if __name__ == "__main__":
    carry_frames(sys.argv[1:3], float(sys.argv[3]))
