"""Asks every gate of `sama_jax.validity` about an audit, at the moment when it can be answered."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from sama_jax.core.frequencies import frequency_losses
from sama_jax.engine.evidence import Evidence
from sama_jax.engine.roles import attention_of
from sama_jax.engine.text_table import TextTable
from sama_jax.errors import ValidityError
from sama_jax.programs.audit_inputs import Inputs, Tokenised
from sama_jax.validity import losses
from sama_jax.validity.gate import Gate, told, voids, warnings, worst_of
from sama_jax.weights.model_folder import ModelFolder


def gates_after(
    inputs: Inputs, tokenised: Tokenised, found: Evidence, spans: TextTable | None = None
) -> list[Gate]:
    """Returns the gates about models and losses, once all passes are made.

    Args:
      inputs: of the run.
      tokenised: its texts.
      found: what was read.
      spans: the texts in the tokens of two tokenizers, if it was read by spans.
    """
    own = [one.ids if one.prompt is None else one.ids[~one.prompt] for one in tokenised.encoded]
    read = {"target": own, "reference": own}
    if tokenised.reference is not None:
        read["reference"] = [one.ids for one in tokenised.reference]
    frequencies = {role: frequency_losses(ids) for role, ids in read.items()}
    unit = unit_of(spans)
    if spans is not None:
        frequencies = {role: one * spans.span_tokens(role) for role, one in frequencies.items()}
    target, *references = (role.folder for role in inputs.roles.values())
    models = {name: f"{name} {role.folder.path}" for name, role in inputs.roles.items()}
    gates = [
        *loss_gates(found, [text.label for text in inputs.texts], unit, models),
        losses.learnt("target", found.target, frequencies["target"], unit),
    ]
    if references:
        others = sorted({_arithmetic(folder) for folder in references})
        gates += [
            *each_learnt(found, frequencies["reference"], unit, models),
            losses.same_arithmetic(_arithmetic(target), " and ".join(others)),
        ]
    return gates


def each_learnt(
    found: Evidence,
    frequencies: Float[np.ndarray, " n"],
    unit: str,
    models: Mapping[str, str],
) -> list[Gate]:
    """Returns the gate on what the references have learnt, of several the worst."""
    each = [
        losses.learnt("reference", one, frequencies, unit, models[name])
        for name, one in found.references.items()
        if name in models
    ]
    return worst_of([[losses.learnt("reference", found.reference, frequencies, unit)], each])


def _arithmetic(folder: ModelFolder) -> str:
    return f"{folder.model.dtype}, {attention_of(folder)} attention"


def unit_of(spans: TextTable | None) -> str:
    """Says what losses of both models are of; `spans` are the texts if they were read by these."""
    return "token" if spans is None else "span"


def loss_gates(
    found: Evidence,
    labels: Sequence[int | None],
    unit: str = "token",
    models: Mapping[str, str] = MappingProxyType({}),
) -> list[Gate]:
    """Returns the gates that stored losses and labels alone can answer.

    Of several references each is compared with the target and with the others: their mean differs
    from the target even where one of them is the target.

    Args:
      found: what was read.
      labels: of the texts; None where there is none.
      unit: what losses are of, `token` or `span`.
      models: role -> what a model is called; its role unless given.
    """
    known = np.array([-1 if label is None else label for label in labels])
    each = [
        losses.same_losses(same, unit, " and ".join(models.get(role, role) for role in two))
        for two, same in found.pairs.items()
    ]
    return [
        *worst_of([[losses.same_losses(found.same, unit)], each]),
        losses.target_worse(found.target, found.reference, known, unit),
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
