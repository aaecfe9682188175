"""How much is tried: what CI does on every change, or all of it (`HYPOTHESIS_PROFILE=nightly`)."""

import os

import pytest
from hypothesis import HealthCheck, settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
NIGHTLY = PROFILE == "nightly"
by_night = pytest.mark.skipif(not NIGHTLY, reason="it takes minutes: the nightly profile")


def share(part: int) -> settings:
    """One in `part` of the profile's examples, for tests of which one is slow."""
    most = settings.default.max_examples
    return settings(max_examples=most // part, deadline=None, suppress_health_check=list(HealthCheck))
