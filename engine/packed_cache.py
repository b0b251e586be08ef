"""Keeps quantised weights in the user's cache directory, so that a model is quantised once.

A file holds what a device made of all weights, byte for byte. Its name says of what: a digest of the files that the
weights come from (which file, its size, when it changed, where in it), of their shapes and formats, and of the version
of the layout. Files are written beside their place and renamed; any may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint import signature
from engine.layer import Weight
from engine.split import Columns, Rows

LAYOUT = 1  # to be raised whenever packed matrices or quantisation change
STEP = 64 << 20  # bytes read at once


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/rill, by default ~/.cache/rill."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rill"


def cached_file(weights: Sequence[Weight]) -> Path | None:
    """Where these weights are kept, whether they are there or not. None if none is quantised."""
    if not any(weight.group for weight in weights):
        return None
    described: list[Any] = [LAYOUT]
    for weight in weights:
        origins = [_origin(source) for source in weight.sources]
        described.append([weight.name, weight.shape, weight.dtype.name, weight.group, origins])
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return cache_directory() / f"{digest[:40]}.weights"


def _origin(source: Any) -> list[Any]:
    """Which bytes of which state of which file a source is, or what an array holds."""
    if isinstance(source, (Rows, Columns)):
        return [type(source).__name__, source.start, source.stop, *_origin(source.source)]
    stored = getattr(source, "stored", source)
    if not hasattr(stored, "file"):
        return [hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest()]
    return [*signature(stored.file), stored.offset, stored.nbytes, stored.dtype, getattr(source, "head_dim", 0)]


def read_cached(path: Path, memory: np.ndarray) -> bool:
    """Fills a memory with what is kept. False if there is nothing, or not all of it."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != memory.nbytes:
                return False
            for start in range(0, memory.nbytes, STEP):
                piece = memory[start : start + STEP]
                if file.readinto(piece.data) != piece.nbytes:
                    return False
    except OSError:
        return False
    return True


def write_cached(path: Path, memory: np.ndarray) -> str:
    """Keeps a memory. Returns why that was not possible, else nothing: a model runs without, too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
            try:
                file.write(memory.data)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        return f"{path.parent}: {error.strerror or error}"
    return ""
