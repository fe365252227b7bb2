"""Reads the patterns by which an adapter's config chooses modules, and their ranks and scales."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from sama_jax.untrusted import printable, shown

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
    return re.compile(rf"(.*\.)?({_bounded(key)})$")


def _bounded(key: str) -> str:
    """Returns a regular expression that ends in bounded time. Raises `ValueError` for others."""
    if not _PATTERN.fullmatch(key) or _openness(key) > _OPEN:
        raise ValueError(
            f"pattern {printable(key)!r}; expected a module's name, or a regular expression with "
            f"at most {_OPEN} quantifiers (of single characters) and groups"
        )
    return key


def checked(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the patterns of a field. Raises `ValueError` if they are too many, or no object."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _PATTERNS:
        raise ValueError(f"{name}: expected an object of at most {_PATTERNS:,} patterns")
    if sum(_openness(key) > 0 for key in patterns) > _OPEN_PATTERNS:
        raise ValueError(f"{name}: more than {_OPEN_PATTERNS} keys are regular expressions")
    return patterns


def left_out(config: Mapping[str, Any], modules: Mapping[str, bool]) -> dict[str, str]:
    """Returns the modules that PEFT gives no adapter: name -> the field that leaves it out.

    As PEFT 0.21.2 does, whose loading passes over the tensors of such modules.

    Args:
      config: the adapter's.
      modules: name of a module -> whether it is a linear layer other than the head.

    Raises:
      ValueError: a field has no usable value, or PEFT would choose by itself.
    """
    target = config.get("target_modules")
    excludes, layers = config.get("exclude_modules"), config.get("layers_to_transform")
    if layers == []:
        layers = None
    if isinstance(target, str) and layers is not None:
        raise ValueError("layers_to_transform stands beside target_modules that are no list")
    everything = isinstance(target, str) and target.lower() == "all-linear"
    excluded = _chooser("exclude_modules", excludes) if excludes else lambda name: False
    chosen = modules.__getitem__ if everything else _chooser("target_modules", target)
    in_layers = _layer_chooser(layers, config.get("layers_pattern"))
    by_itself = frozenset(target if isinstance(target, list) else ())  # in whatever layer
    found = {}
    for name in modules:
        if excluded(name):
            found[name] = "exclude_modules"
        elif not chosen(name):
            found[name] = "target_modules"
        elif layers is not None and name not in by_itself and not in_layers(name):
            found[name] = "layers_to_transform"
    return found


def _chooser(field: str, value: Any) -> Callable[[str], bool]:
    """Returns what tells whether a module is meant: by its whole name, or the end of it."""
    if isinstance(value, str):
        whole = re.compile(_bounded(value))
        return lambda name: whole.fullmatch(name) is not None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{field} is {shown(value)}; expected names of modules")
    names = frozenset(value)

    def chosen(name: str) -> bool:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        return any(name[start:] in names for start in starts)

    return chosen


def _layer_chooser(layers: Any, patterns: Any) -> Callable[[str], bool]:
    """Returns what tells whether a module stands in one of the layers."""
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    before = [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]*"]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"layers_to_transform is {shown(layers)}; expected numbers of layers")
    usable = isinstance(before, list) and len(before) <= _OPEN_PATTERNS
    if not usable or not all(isinstance(p, str) for p in before):
        raise ValueError(f"layers_pattern is {shown(patterns)}; expected names of lists of layers")
    # Without a pattern, what stands before the number does not begin a name.
    start = r"(?:^|.*?\.)" if patterns else r".*?\."
    numbered = [
        re.compile(rf"{start}{_bounded(p) if patterns else p}\.(?P<at>\d+)\.") for p in before
    ]

    def chosen(name: str) -> bool:
        match = next(filter(None, (pattern.match(name) for pattern in numbered)), None)
        return match is not None and match["at"] is not None and int(match["at"]) in numbers

    return chosen
