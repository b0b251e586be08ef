"""rank_worker.py on the emulated GPU, one for each rank, which records launches as a GPU does."""

from __future__ import annotations

import sys
from typing import Any

import rank_worker
from emulated_cuda import RecordingDriver

from engine.device import Place, cuda

opened: list[RecordingDriver] = []


def open_driver(place: Place) -> RecordingDriver:
    opened.append(RecordingDriver())
    opened[-1].description += f" {place.rank} of {place.ranks}"
    return opened[-1]


device: Any = cuda
device.open_driver = open_driver

if __name__ == "__main__":
    rank_worker.main(*sys.argv[1:])
    assert all(driver.replays for driver in opened), "no segment was recorded"
