"""How every test runs: hypothesis deterministic and modest, so that a red build is red for everyone."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("longctx", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("longctx")
