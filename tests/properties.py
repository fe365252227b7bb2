"""How property tests draw their examples: few, and the same in every run. Not a test."""

from hypothesis import HealthCheck, settings

# Without a deadline: the first example of a test compiles.
FEW = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
