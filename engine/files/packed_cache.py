"""Keeps quantised weights in the user's cache directory, so that a model is quantised once.

A file holds what a device made of all weights, byte for byte. Its name says of what: a digest of the files that the
weights come from (which file, its size, when it changed, where in it), of their shapes and formats, and for which kind
of device, with the version of its layout. Files are written beside their place and renamed; any may be deleted at any
time. Before each use what is of no use any more is, and what has not been used for longest where there is too much.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.device import Device, Progress
from engine.errors import UsageError
from engine.layer import Weight
from engine.ranks.split import Part

LAYOUTS = {"cpu": 2, "cuda": 1}  # of a type of device: to be raised whenever its packed matrices or quantisation change
STEP = 64 << 20  # bytes of the host's memory that are read or written at once
SHARE = 1 / 4  # of the disk, at most
CHECKSUM = 8  # bytes at the end of a file
KIN = 20  # first digits of a name: those of the ranks' parts of a model are the same
ABANDONED = 24 * 3600  # seconds after which nobody is writing a file any more
NAME = re.compile(r"[0-9a-f]{40}(?:\.(?P<type>[a-z]*)(?P<layout>[0-9]+))?\.weights(?P<unfinished>.*\.part)?")


class Arena(Protocol):
    """The memory of all weights of a device: its bytes, from the first to the last, in pieces that the host reaches."""

    @property
    def nbytes(self) -> int: ...

    def to_fill(self) -> Iterable[np.ndarray]:
        """Pieces to write into. What is in one counts when the next has been asked for."""

    def to_read(self) -> Iterable[np.ndarray]:
        """What they hold. Each stays as it is until the next is asked for."""


class HostArena:
    """An arena in the host's own memory, read and written where it lies."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.nbytes = memory, memory.nbytes

    def to_fill(self) -> Iterator[np.ndarray]:
        return (self.memory[start : start + STEP] for start in range(0, self.nbytes, STEP))

    to_read = to_fill


def load_arena(device: Device, weights: Sequence[Weight], arena: Arena, load: Callable[[Weight], None],
               progress: Progress | None, cache: bool) -> None:  # fmt: skip
    """Fills a device's arena with what is kept of these weights, or has them loaded one by one and keeps what came of
    it; without `cache`, or where none is quantised, nothing is kept or taken. See Device.load."""
    total, done = sum(device.weight_bytes(weight) for weight in weights), 0
    name = cache_name(weights, device.type) if cache and any(weight.group for weight in weights) else ""
    if name and (removed := make_room(name, total)):
        device.details.append(removed)
    if name and read_cached(name, arena):
        if progress:
            progress(total, total)
        return
    for weight in weights:
        load(weight)
        done += device.weight_bytes(weight)
        if progress:
            progress(done, total)
    if name and (problem := write_cached(name, arena)):
        device.notes.append(f"quantised weights are not kept: {problem}")


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/rill, by default ~/.cache/rill. Raises OSError where there is no home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "rill"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def cache_name(weights: Sequence[Weight], type: str) -> str:
    """What the file of these weights is called, as a type of device packs them."""
    packing = f"{type}{LAYOUTS[type]}"
    described: list[Any] = []
    for weight in weights:
        origins = [_origin(source) for source in weight.sources]
        described.append([weight.name, weight.shape, weight.dtype.name, weight.group, origins])
    files = {path for weight in weights for source in weight.sources for path in _files(source)}
    states = sorted((path.stat().st_ino, path.stat().st_mtime_ns) for path in files)
    return f"{_digest([packing, states])[:KIN]}{_digest(described)[: 40 - KIN]}.{packing}.weights"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _files(source: Any) -> list[Path]:
    while isinstance(source, Part):
        source = source.source
    return [part.file for part in _stored(source) or [source] if hasattr(part, "file")]


def _stored(source: Any) -> list[Any]:
    """The tensors of a file that a quantised source is made of."""
    return [part for part in (getattr(source, name, None) for name in ("stored", "scales")) if part is not None]


def _origin(source: Any) -> list[Any]:
    """Which bytes of which state of which file a source is, or what an array holds."""
    if isinstance(source, Part):
        return [type(source).__name__, source.start, source.stop, *_origin(source.source)]
    stored = _stored(source)
    if not stored and not hasattr(source, "file"):
        return [hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest()]
    origin: list[Any] = [getattr(source, "head_dim", 0)]
    for part in stored or [source]:
        status = part.file.stat()
        origin += [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
                   part.offset, part.nbytes, part.dtype]  # fmt: skip
    return origin


def cache_limit(directory: Path) -> float:
    """Bytes that may be kept: RILL_CACHE_GB of 10⁹, by default a share of the disk. Raises UsageError, OSError."""
    if not (text := os.environ.get("RILL_CACHE_GB", "")):
        return shutil.disk_usage(directory).total * SHARE
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = -1
    if not limit >= 0:
        raise UsageError(f"RILL_CACHE_GB {text!r}: expected gigabytes, 0 or more")
    return limit


def make_room(name: str, size: int) -> str:
    """Makes room for `size` bytes under a name, which counts as used now and stays. Removes files of older layouts,
    what was never finished, and of all others those unused for longest, until they are within the limit; but not what
    other ranks keep of the same model. Other processes may do so at the same time. Returns what was removed as a line,
    or nothing. Raises UsageError."""
    try:
        directory = cache_directory()
        limit = cache_limit(directory)
        found = sorted(_kept(directory), key=lambda kept: kept[1].st_mtime_ns, reverse=True)
    except OSError:
        return ""
    room, removed = limit - (size if size <= limit else 0), []
    for match, status in found:
        path = directory / match.string
        with suppress(OSError):  # another process was faster, or this one may not
            if match.string == name:
                os.utime(path)
                continue
            if match["unfinished"]:
                goes = status.st_mtime < time.time() - ABANDONED
            elif not match["type"] or int(match["layout"]) < LAYOUTS.get(match["type"], 0):
                goes = True
            else:
                room -= status.st_size
                goes = room < 0 and not match.string.startswith(name[:KIN])
            if goes:
                path.unlink()
                removed.append(status.st_size)
    count = f"{len(removed)} file{'s' * (len(removed) > 1)}, {sum(removed) / 1e9:.3g} GB"
    return f"{directory}: removed what was of no use or unused for longest: {count}" if removed else ""


def _kept(directory: Path) -> Iterator[tuple[re.Match[str], os.stat_result]]:
    """The cache's own files; what else there is, links above all, is none of its business."""
    with os.scandir(directory) as entries:
        for entry in entries:
            match = NAME.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield match, entry.stat(follow_symlinks=False)


def read_cached(name: str, arena: Arena) -> bool:
    """Fills an arena with what is kept. False if there is nothing, or not all of it as it was written; then the arena
    may hold part of it."""
    checksum = 0
    try:
        path = cache_directory() / name
        if not path.is_file() or path.stat().st_size != arena.nbytes + CHECKSUM:
            return False
        with path.open("rb", buffering=0) as file:
            for piece in arena.to_fill():
                if file.readinto(piece.data) != piece.nbytes:
                    return False
                checksum = zlib.crc32(piece.data, checksum)
            return file.read() == checksum.to_bytes(CHECKSUM, "little")
    except OSError:
        return False


def write_cached(name: str, arena: Arena) -> str:
    """Keeps an arena. Returns why that was not possible, else nothing: a model runs without, too."""
    checksum = 0
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        if arena.nbytes > (limit := cache_limit(directory)):
            return f"{arena.nbytes / 1e9:.1f} GB are more than the {limit / 1e9:.1f} GB that RILL_CACHE_GB allows"
        with tempfile.NamedTemporaryFile(dir=directory, prefix=name, suffix=".part", delete=False) as file:
            try:
                for piece in arena.to_read():
                    file.write(piece.data)
                    checksum = zlib.crc32(piece.data, checksum)
                file.write(checksum.to_bytes(CHECKSUM, "little"))
                file.close()
                os.replace(file.name, directory / name)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        return error.strerror and f"{error.filename}: {error.strerror}" or str(error)
    return ""
