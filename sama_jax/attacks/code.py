"""Names the code of attacks, so that a score of other code is never taken for theirs."""

import functools
import hashlib
import inspect
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sama_jax.attacks import registry
from sama_jax.config import settings_hash

_PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None))
_PATHS = sysconfig.get_paths()
_INSTALLED = tuple(
    {
        *(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)
"""Where the code of others lies, which the version of this package or nobody answers for."""


def codes() -> dict[str, str]:
    """Returns, by name, 16 hex digits over the code of every registered attack.

    They cover the files that its functions stand in, the files that these import (but not installed
    packages), and plain values that the functions see, such as a number beside them. Code without a
    file, as in a notebook, counts as it was compiled.
    """
    files: dict[str, str] = {}
    return {name: _code_of(registry.get(name), files) for name in registry.names()}


def _code_of(attack: registry.Attack, files: dict[str, str]) -> str:
    found: dict[Callable, None] = {}
    for function in (attack.queries, attack.statistic, attack.corpus):
        _collect(function, found)
    reached: set[str] = set()
    for function in found:
        _reach(function.__module__ or "", reached, files, own=True)
    parts = [(name, files[name]) for name in sorted(reached)]
    return settings_hash(repr(parts), *(repr(_seen(function, files)) for function in found))


def _collect(given: Any, found: dict[Callable, None]) -> None:
    """Puts the Python functions that `given` calls by itself into `found`."""
    if isinstance(given, functools.partial):
        given = given.func
    given = inspect.unwrap(given) if callable(given) else given
    if not inspect.isfunction(given):
        inner = getattr(given, "function", None) or vars(type(given)).get("__call__")
        given = inner if inspect.isfunction(inner) else None
    if given is None or given in found:
        return
    found[given] = None
    for cell in given.__closure__ or ():
        if callable(cell.cell_contents):
            _collect(cell.cell_contents, found)


def _reach(name: str, reached: set[str], files: dict[str, str], *, own: bool = False) -> None:
    """Adds a module and what it imports, unless that is installed; an attack's `own` always."""
    module = sys.modules.get(name)
    path = getattr(module, "__file__", None)
    if name in reached or path is None or (not own and path.startswith(_INSTALLED)):
        return
    if name not in files:
        try:
            files[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:  # within an archive, or removed since: counts as it was compiled
            return
    reached.add(name)
    for other in _imported(module):
        _reach(other, reached, files)


def _imported(module: ModuleType | None) -> Iterator[str]:
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            yield value.__name__
        elif inspect.isfunction(value) or inspect.isclass(value):
            yield value.__module__ or ""


def _seen(function: Callable, files: dict[str, str]) -> list[Any]:
    """Returns a function's name, the plain values that it sees, and its code if no file has it."""
    names = {n: v for n, v in function.__globals__.items() if not n.startswith("__")}
    own = not (function.__module__ or "").startswith("sama_jax.")
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [*(sorted(names.items()) if own else ()), *enumerate(cells)]
    plain = [(at, repr(value)) for at, value in values if isinstance(value, _PLAIN)]
    code = function.__code__
    text = [] if function.__module__ in files else [code.co_code, code.co_consts, code.co_names]
    return [function.__qualname__, plain, text]
