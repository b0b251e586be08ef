"""For every test: hypothesis draws the same examples every time, and AddressSanitizer, if here, sees all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from sanitizer import guard_memory

from tools import random_model

# No deadline and no check of speed: a busy machine is not a failure.
too_slow = [HealthCheck.too_slow]
settings.register_profile("rill", deadline=None, derandomize=True, suppress_health_check=too_slow)
settings.load_profile("rill")

guard_memory()
for inherited in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of the make that runs the tests: theirs prints as by itself
    os.environ.pop(inherited, None)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the tests goes into the user's cache directory."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers with a byte tokenizer. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    assert random_model.main(["--preset", "tiny", str(directory)]) in (0, None)
    return directory
