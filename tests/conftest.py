"""Hypothesis in these tests: how long an example takes speaks of the machine, not of what is tested."""

from hypothesis import HealthCheck, settings

settings.register_profile("ftkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ftkit")
