"""Says what a setting may be: its flag, its range, and one check of both kind and range. No JAX."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from sama_jax.errors import UsageError, nearest
from sama_jax.untrusted import printable


class Flag(NamedTuple):
    """How a field appears on the command line, as `Annotated[int, Flag("what it does", "N")]`."""

    help: str = ""
    metavar: str | None = None
    name: str | None = None
    """The flag itself, such as `--lr`. None: the field's name with dashes."""


class Between(NamedTuple):
    """Smallest and largest value of a number, in its annotation; both may be taken."""

    low: float
    high: float


Count = Annotated[int, Between(1, 65535)]
"""A number of things of one text, which has at most 65,535 tokens."""
Weight = Annotated[float, Between(-1e6, 1e6)]
"""A factor of losses and the like, which are single-precision numbers."""
Seed = Annotated[int, Between(0, 2**32 - 1), Flag("of masks and subsets")]
Length = Annotated[int, Between(1, 65535), Flag("tokens that a text is cut at", "TOKENS")]
Share = Annotated[float, Between(0, 1)]
"""A part of something."""
CountOrNone = Annotated[int, Between(0, 65535)]
"""The same; 0 leaves it to another setting."""


def check(settings: Any) -> None:
    """Raises `UsageError` unless every field holds a value of its declared type and range."""
    for name, annotated in get_type_hints(type(settings), include_extras=True).items():
        hint, *said = get_args(annotated) if get_origin(annotated) is Annotated else [annotated]
        value, words = getattr(settings, name), get_args(hint)
        if words and value not in words:
            raise UsageError(f"setting {name} is {shown(value)}{near(value, words)}")
        if hint is str and not isinstance(value, str):
            raise UsageError(f"setting {name} must be a word, got {shown(value)}")
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if hint is int and not is_whole:
            raise UsageError(f"setting {name} must be a whole number, got {shown(value)}")
        if hint is float and not (is_whole or (isinstance(value, float) and math.isfinite(value))):
            raise UsageError(f"setting {name} must be a finite number, got {shown(value)}")
        if hint is bool and not isinstance(value, bool):
            raise UsageError(f"setting {name} must be true or false, got {shown(value)}")
        for limit in said:
            if not isinstance(limit, Between) or not isinstance(value, int | float):
                continue
            if not limit.low <= value <= limit.high:
                raise UsageError(
                    f"setting {name} must lie in {limit.low}..{limit.high}, got {shown(value)}"
                )


def near(value: Any, words: Iterable[str]) -> str:
    """Returns `errors.nearest` of a value that may be of any kind."""
    return nearest(value[:60] if isinstance(value, str) else "", words)


def shown(value: Any) -> str:
    """Returns a value for a message: cut, and nothing of what it may contain."""
    plain = value is None or isinstance(value, (bool, float, str, int))
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    return printable(repr(value)) if plain else f"a {type(value).__name__}"
