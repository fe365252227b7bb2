"""Says what JSON of a run folder has to look like, so that a damaged file is one clear message."""

from collections.abc import Mapping
from typing import Any

Shape = Any
"""`str`, `int`, `float` (any number), `bool`, `None`, `object` (anything); a tuple: one of these;
`[shape]`: a list of it; `{str: shape}`: an object of it; `{"name": shape}`: an object with these
fields, of which those whose name ends in `?` may be missing, and any others."""


def fits(value: Any, shape: Shape) -> bool:
    """Tells whether a parsed JSON value has a shape."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and _misfit(value, shape) is None
    if shape is None or shape is object:
        return value is None or shape is object
    if isinstance(value, bool):
        return shape is bool
    return isinstance(value, int | float if shape is float else shape)


def misfit(value: Any, shape: Mapping[Any, Shape]) -> str | None:
    """Returns the first field of an object that is missing or of another shape; None if all fit.

    What is no object at all is called `the whole`.
    """
    return _misfit(value, shape) if isinstance(value, dict) else "the whole"


def _misfit(value: dict[str, Any], shape: Mapping[Any, Shape]) -> str | None:
    if str in shape:
        return next((name for name, item in value.items() if not fits(item, shape[str])), None)
    for field, wanted in shape.items():
        name = field.removesuffix("?")
        missing = name not in value
        if (missing and name == field) or (not missing and not fits(value[name], wanted)):
            return name
    return None
