"""The name of an attack's code, where that lies in no file."""

import sys
import types

from sama_jax.attacks.code import _code_of
from sama_jax.attacks.registry import Attack


def attack(text: str) -> Attack:
    """An attack whose statistic stands in a module that was read from an archive."""
    module = types.ModuleType("packed_attack")
    module.__file__ = "/nowhere/packed.zip/packed_attack.py"
    sys.modules["packed_attack"] = module
    exec(text, vars(module))
    function = vars(module)["statistic"]
    return Attack("packed", lambda settings: {}, function, "loss", "here", "Counts nothing.")


def test_code_without_a_readable_file_counts_as_it_was_compiled(monkeypatch):
    monkeypatch.setitem(sys.modules, "packed_attack", types.ModuleType("packed_attack"))
    one, other = (f"def statistic(reading):\n    return reading.target * {n}\n" for n in (1, 2))
    first = _code_of(attack(one), {})
    assert _code_of(attack(one), {}) == first
    assert _code_of(attack(other), {}) != first
