"""A small version of `experiments/statistics/blind_void.py`: fair draws are weakened, not void."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "statistics" / "blind_void.py"
spec = importlib.util.spec_from_file_location("blind_void", SCRIPT)
assert spec is not None
assert spec.loader is not None
blind_void = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blind_void)


def test_fair_draws_that_look_unfair_by_chance_are_not_void():
    """The three of 240 seeds that `blind` weakens."""
    assert blind_void.count(40, 1, (108, 152, 182))[0] == {"pass": 0, "warn": 3, "void": 0}


def test_sources_that_differ_much_are_void():
    assert blind_void.count(40, 10, range(3))[0]["void"] == 3
