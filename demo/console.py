"""The ways out of a command: text to standard output, everything else to standard error, and Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from engine import Completion, Stream

T = TypeVar("T")
BACKGROUND = "rill-background"
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def open_streams() -> None:
    """UTF-8 whatever the locale. A closed standard error is silent, a closed standard output an OSError."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise OSError("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")


def enter_ranks() -> None:
    """Started by mpiexec, rank 0 goes on; every other rank follows it to its end, and exits."""
    if "mpi4py" in sys.modules or {"PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys():
        from engine.ranks.followers import enter

        enter()


def write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def say(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    mutter(f"rill: {CONTROLS.sub(' ', message).strip()}\n")


def mutter(text: str) -> None:
    """Text on standard error as it stands, lost where nobody takes it."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass


def seen_together() -> bool:
    """Whether standard output and standard error go to the same place."""
    try:
        return os.path.sameopenfile(1, 2)
    except OSError:  # one of them is closed
        return False


def drop_output() -> None:
    """Lets go of text that nobody takes, which Python would complain about when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def in_background(work: Callable[[], T]) -> T:
    """What work() returns or raises.

    It runs in a thread of its own, so that this one answers Ctrl-C even while native code is busy or modules
    are imported; KeyboardInterrupt leaves it running.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=run, name=BACKGROUND, daemon=True).start()
    while not done.wait(0.1):
        pass  # Python misses a signal that comes just before a wait, until the next time it looks up
    if errors:
        raise errors[0]
    return results[0]


def end_interrupted(status: int) -> int:
    """The exit status. Where work goes on in the background, the process ends here instead of waiting."""
    drop_output()
    if any(thread.name == BACKGROUND for thread in threading.enumerate()):
        os._exit(status)
    return status


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """While this lasts, the first Ctrl-C calls `stop` and the second one raises KeyboardInterrupt.

    A call instead of an exception, so that no piece of text is lost between two statements.
    """

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show(stream: Stream) -> Completion:
    """Writes the text as it comes, and a newline after it."""
    try:
        for piece in stream:
            write(piece)
    finally:
        write("\n")
    return stream.completion()


class ProgressBar:
    """Bytes loaded: a bar on a terminal once it has taken half a second, elsewhere a line now and then."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.drawn = False
        self.due = time.monotonic() + (0.5 if self.terminal else 2)

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + (0.1 if self.terminal else 10)
        text = f"loading {done / max(total, 1):4.0%} of {total / 1e9:.1f} GB"
        if self.terminal:
            filled = 30 * done // max(total, 1)
            mutter(f"\rrill: {text} [{'#' * filled:30}]")
            self.drawn = True
        else:
            say(text)

    def clear(self) -> None:
        if self.drawn:
            mutter("\r\033[K")
