"""For `make fuzz`: property tests with many examples. Loaded by `-p tests.fuzzing`."""

from hypothesis import HealthCheck, settings

settings.register_profile("fuzz", max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("fuzz")
