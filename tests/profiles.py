"""How much is tried: what CI does on every change, or all of it (`HYPOTHESIS_PROFILE=nightly`)."""

import os

import pytest

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
NIGHTLY = PROFILE == "nightly"
by_night = pytest.mark.skipif(not NIGHTLY, reason="it takes minutes: the nightly profile")
