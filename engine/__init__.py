"""Rill."""
