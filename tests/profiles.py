"""How much is tried: what CI does on every change, or all of it (`HYPOTHESIS_PROFILE=nightly`)."""

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
NIGHTLY = PROFILE == "nightly"
