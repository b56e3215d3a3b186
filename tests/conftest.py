"""What holds for every test: none asserts on elapsed time, not even hypothesis' own deadline."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False
)
settings.load_profile("house")
