"""Checks arrays that somebody else made before votes are taken of them.

What is traced, inside `jit` or `vmap`, has shapes and types but no values: those are then not
checked.
"""

from collections.abc import Mapping
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sama_jax.arrays import ProbePlan
from sama_jax.config import Ties


def require_usable(target: Any, reference: Any, plan: ProbePlan, ties: str) -> None:
    """Raises `ValueError` where a score would mean nothing, of arrays with an axis of texts.

    Args:
      target: [b, t, l] losses.
      reference: the same of the reference.
      plan: of these texts.
      ties: one of `config.Ties`.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties is {ties!r}, expected one of {', '.join(get_args(Ties))}")
    given = {"target": target, "reference": reference, **plan._asdict()}
    _require_shapes(given)
    found = {name: np.asarray(x) for name, x in given.items() if not isinstance(x, Tracer)}
    if {"scored", "weights", "subsets"} <= found.keys() and (wrong := _wrong_plan(**found)):
        raise ValueError(f"the plan: {wrong}")
    for name in ("target", "reference"):
        if {name, "scored"} <= found.keys() and not np.isfinite(found[name][found["scored"]]).all():
            raise ValueError(f"{name} has no finite loss somewhere where the plan scores")


def _require_shapes(given: Mapping[str, Any]) -> None:
    shape = np.shape(given["target"])
    if len(shape) != 3:
        raise ValueError(f"target has shape {list(shape)}, expected [texts, steps, positions]")
    *steps, length = shape
    for name, value in given.items():
        kind = {"masks": "bool", "scored": "bool", "subsets": "signed integers"}.get(name, "floats")
        types = {"bool": np.bool_, "floats": np.floating}.get(kind, np.signedinteger)
        dtype = getattr(value, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, types):
            raise ValueError(f"{name} holds {dtype or type(value).__name__}, expected {kind}")
        own = list(np.shape(value))
        wanted = {"weights": steps, "subsets": [*steps, *own[-2:]]}.get(name, [*steps, length])
        if own != wanted or len(own) < len(wanted) or (name == "subsets" and len(own) != 4):
            shown = [*steps, "subsets", "members"] if name == "subsets" else wanted
            raise ValueError(
                f"{name} has shape {own}, expected {shown} as target has {list(shape)}"
            )


def _wrong_plan(
    scored: np.ndarray, weights: np.ndarray, subsets: np.ndarray, **_: np.ndarray
) -> str | None:
    """Says what makes votes by these arrays meaningless; None: nothing."""
    used, length = subsets >= 0, scored.shape[-1]
    if (subsets < -1).any() or (subsets >= length).any():
        return f"subsets hold positions outside -1 (unused) to {length - 1}"
    if not (np.isfinite(weights) & (weights >= 0)).all():
        return "weights must be finite and not negative"
    if (scored.any(axis=(1, 2)) & ~weights.any(axis=1)).any():
        return "all weights of a text are 0"
    ordered = np.sort(subsets, axis=-1)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        return "a subset holds a position twice"
    known = np.maximum.accumulate(scored, axis=1)
    texts, steps = np.ogrid[: len(subsets), : subsets.shape[1]]
    read = known[texts[..., None, None], steps[..., None, None], np.maximum(subsets, 0)]
    if (used & ~read).any():
        return "subsets hold positions that no step up to theirs scores"
    if ((weights > 0) & ~used.any(axis=(2, 3))).any():
        return "a step with a weight has no subset"
    return None
