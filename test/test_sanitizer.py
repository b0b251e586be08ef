"""The sanitizers see what they are run for: a kernel that leaves its memory does not come back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Unpacks a row of a one-panel matrix of `width` columns from memory that holds 4.
PROGRAM = """
import sys
import numpy as np
from sanitizer import guard_memory
from engine import abi
from engine.cpu import huge_pages

guard_memory()
width = int(sys.argv[1])
packed, row = huge_pages.reserve(4 * abi.constants.PANEL * 4), np.zeros(width, np.float32)
pointers = [abi.ffi.cast(kind, abi.address(array)) for kind, array in (("void *", packed), ("float *", row))]
library = abi.open_library("baseline")
library.unpack_matrix(pointers[0], abi.constants.DTYPE_F32, 0, width, 0, 1, pointers[1])
print("came back")
"""


@pytest.mark.skipif("libasan" not in os.environ.get("LD_PRELOAD", ""), reason="only under `make sanitize`")
@pytest.mark.parametrize(("width", "comes_back"), [(4, True), (5, False)])
def test_reading_past_the_end_is_seen(width: int, comes_back: bool) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(width)], env=environment, capture_output=True)
    assert (b"came back" in result.stdout) == comes_back
    assert (b"AddressSanitizer" in result.stderr) != comes_back, result.stderr.decode()
