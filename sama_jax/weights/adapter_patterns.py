"""Reads the regular expressions by which an adapter's config gives modules ranks and scales."""

import functools
import re
from typing import Any

from sama_jax.untrusted import printable

# Of the regular expressions that PEFT allows as keys, those that end in bounded time: names, dots,
# digits and classes, with few quantifiers and groups of alternatives. On a module's name of 60
# characters the slowest takes 20 ms, a plain name 1 us.
_PATTERN = re.compile(
    r"\^?(?:[\w-]|\\?\.[*+]?|\\d[*+]?|\[[\w.-]{1,40}\][*+]?|\((?:\?:)?|\)|\|){1,300}\$?"
)
_OPEN = 3
"""Most quantifiers and groups of a key."""
_PATTERNS, _OPEN_PATTERNS = 2**14, 16
"""Most keys, one for each module of a large model, and most of them with quantifiers or groups."""


def _openness(key: str) -> int:
    return sum(map(key.count, "*+("))


@functools.lru_cache(_PATTERNS)
def compiled(key: str) -> re.Pattern[str]:
    """Returns what fits the end of a module's name. Raises `ValueError`."""
    if not _PATTERN.fullmatch(key) or _openness(key) > _OPEN:
        raise ValueError(
            f"pattern {printable(key)!r}; expected a module's name, or a regular expression with "
            f"at most {_OPEN} quantifiers (of single characters) and groups"
        )
    return re.compile(rf"(.*\.)?({key})$")


def checked(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the patterns of a field. Raises `ValueError` if they are too many, or no object."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _PATTERNS:
        raise ValueError(f"{name}: expected an object of at most {_PATTERNS:,} patterns")
    if sum(_openness(key) > 0 for key in patterns) > _OPEN_PATTERNS:
        raise ValueError(f"{name}: more than {_OPEN_PATTERNS} keys are regular expressions")
    return patterns
