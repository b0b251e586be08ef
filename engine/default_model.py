"""Where the checkpoint that comes with the engine lies."""

from __future__ import annotations

from pathlib import Path

from engine.errors import RillError

NAME = "tiny-qwen3"


def default_model() -> Path:
    """Its directory: models/ in a checkout, engine/_models/ where installed. Raises RillError if absent."""
    engine = Path(__file__).parent
    for directory in (engine.parent / "models" / NAME, engine / "_models" / NAME):
        if (directory / "config.json").is_file():
            return directory
    raise RillError(f"the bundled model {NAME} is not in this installation: name a model directory")
