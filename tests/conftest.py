"""How every test runs: hypothesis deterministic and modest, so that a red build is red for everyone; no profile of the
user's own, so that answers are those of the repository; no network.
"""

from __future__ import annotations

import os
import tempfile

from hypothesis import HealthCheck, settings

os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="longctx-tests-")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="longctx-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("longctx", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("longctx")
