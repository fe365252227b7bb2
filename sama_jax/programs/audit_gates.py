"""Asks every gate of `sama_jax.validity` about an audit, at the moment when it can be answered."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sama_jax.core.frequencies import frequency_losses
from sama_jax.engine.evidence import Evidence
from sama_jax.engine.roles import attention_of
from sama_jax.errors import ValidityError
from sama_jax.programs.audit_inputs import Inputs, Tokenised
from sama_jax.validity import losses
from sama_jax.validity.gate import Gate, told, voids, warnings


def gates_after(inputs: Inputs, tokenised: Tokenised, found: Evidence) -> list[Gate]:
    """Returns the gates about models and losses, once all passes are made."""
    own = [one.ids if one.prompt is None else one.ids[~one.prompt] for one in tokenised.encoded]
    frequencies = frequency_losses(own)
    folders = [inputs.roles[name].folder for name in ("target", "reference")]
    return [
        *loss_gates(found, [text.label for text in inputs.texts]),
        losses.learnt("target", found.target, frequencies),
        losses.learnt("reference", found.reference, frequencies),
        losses.same_arithmetic(*(f"{f.model.dtype}, {attention_of(f)} attention" for f in folders)),
    ]


def loss_gates(found: Evidence, labels: Sequence[int | None]) -> list[Gate]:
    """Returns the gates that stored losses and labels alone can answer."""
    known = np.array([-1 if label is None else label for label in labels])
    return [
        losses.same_losses(found.same),
        losses.target_worse(found.target, found.reference, known),
        losses.reference_better(found.target, found.reference),
    ]


def require_valid(
    out: Path, gates: Sequence[Gate], notes: Sequence[str] = (), *, strict: bool = False
) -> None:
    """Raises `ValidityError` if a gate voids a finished result.

    Under `strict` it does so, too, if a gate weakens it or anything was noted.
    """
    failed = voids(gates)
    if failed:
        raise ValidityError(
            f"{out}: finished, but the result is void: " + "; ".join(map(told, failed))
        )
    noticed = [*notes, *map(told, warnings(gates))]
    if strict and noticed:
        raise ValidityError(f"{out}: finished, but under --strict: " + "; ".join(noticed))
