"""For every test: hypothesis draws the same examples every time, and AddressSanitizer, if here, sees all."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from sanitizer import guard_memory

# No deadline and no check of speed: a busy machine is not a failure.
too_slow = [HealthCheck.too_slow]
settings.register_profile("rill", deadline=None, derandomize=True, suppress_health_check=too_slow)
settings.load_profile("rill")

guard_memory()
