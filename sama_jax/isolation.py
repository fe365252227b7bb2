"""Keeps the current folder off Python's module path, here and in every process that is started.

A command is often given inside a model folder that somebody else made, and `python -m` looks for
modules there first: a file `numpy.py` would run. Imports `os` and `sys` alone, which Python itself
has loaded before it looks anywhere.
"""

import os
import sys

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that holds this package: a source tree, or where packages are installed."""


def isolate() -> None:
    """Takes the current folder off the module path, unless this package is loaded from it."""
    added = not sys.flags.safe_path and bool(sys.path) and os.path.abspath(sys.path[0])
    if added and added == os.getcwd() != HOME:
        del sys.path[0]
    # `PYTHONPATH=$PYTHONPATH:/x` begins with an empty entry, which is the current folder as well.
    env = dict(os.environ)
    loose = {os.path.abspath(p) for p in _entries(env) if not os.path.isabs(p)} - {HOME}
    sys.path[:] = [p for p in sys.path if p not in loose]
    os.environ.update(environment(env))


def environment(env: dict[str, str]) -> dict[str, str]:
    """Returns the variables with which a new Python, and those that it starts, finds this package
    but nothing of the current folder."""
    kept = [p for p in _entries(env) if os.path.isabs(p)]
    # Installed packages are found anyway, and would stand before the standard library here.
    if HOME not in kept and os.path.basename(HOME) not in ("site-packages", "dist-packages"):
        kept.append(HOME)
    return {**env, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(kept)}


def _entries(env: dict[str, str]) -> list[str]:
    path = env.get("PYTHONPATH", "")
    return path.split(os.pathsep) if path else []
