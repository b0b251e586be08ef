"""The engine's own exceptions: one clear line each, never a traceback for a user."""

from __future__ import annotations


class RillError(Exception):
    """Something failed: a bad file, too little memory, a missing tensor. Programs exit with status 1."""


class UsageError(RillError, ValueError):
    """The caller asked for something that cannot be: a bad option or argument. Programs exit with status 2."""
