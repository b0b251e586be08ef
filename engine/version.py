"""What this is. Ranks compare it, and packaging reads it."""

__version__ = "0.1.0"
