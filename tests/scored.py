"""Which attacks a test scores, and the mark of tests that compare them with a slow reference."""

import functools
from collections.abc import Callable

from sama_jax import attacks
from sama_jax.arrays import Reading
from sama_jax.attacks.queries import CorpusReading
from sama_jax.config import AuditSettings

SCORED: set[str] = set()
"""The attacks whose scores the test that runs now has looked at."""
ORACLES: dict[str, set[str]] = {}
"""Attack -> the tests that say they are an oracle of it, of all test files imported so far."""


def score_reading(name: str, reading: Reading, settings: AuditSettings) -> float:
    """Scores one reading by a registered attack."""
    SCORED.add(name)
    statistic = attacks.get(name).statistic
    assert statistic is not None
    return float(statistic(reading, settings))


def score_corpus(name: str, reading: CorpusReading, settings: AuditSettings):
    """Scores all texts of a run by an attack that reads them together."""
    SCORED.add(name)
    corpus = attacks.get(name).corpus
    assert corpus is not None
    return corpus(reading, settings)


def oracle(*names: str) -> Callable:
    """Marks a test as an oracle of some attacks; it fails if it does not score each of them.

    A test with a parameter `name` is one of that attack alone.
    """

    def mark(test: Callable) -> Callable:
        for name in names:
            ORACLES.setdefault(name, set()).add(f"{test.__module__}.{test.__name__}")

        @functools.wraps(test)
        def run(*args, **kwargs):
            SCORED.clear()
            test(*args, **kwargs)
            claimed = {kwargs["name"]} if "name" in kwargs else set(names)
            assert claimed <= set(names), f"not declared: {claimed - set(names)}"
            assert claimed <= SCORED, f"never scored: {sorted(claimed - SCORED)}"

        return run

    return mark
