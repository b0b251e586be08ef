"""For every test: hypothesis draws the same examples in every run, so that a failure can be repeated."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadline and no check of speed: a busy machine is not a failure.
too_slow = [HealthCheck.too_slow]
settings.register_profile("rill", deadline=None, derandomize=True, suppress_health_check=too_slow)
settings.load_profile("rill")
