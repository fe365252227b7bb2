"""Says what an attack wants of a reference, and whether the references of a run can give it."""

from typing import NamedTuple

from sama_jax.attacks.queries import Probes, Query, flatten
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings


class References(NamedTuple):
    """The references of a run."""

    count: int = 1
    own_tokenizer: bool = False
    """Whether its tokens are others than the target's."""


def obstacle(attack: Attack, settings: AuditSettings, given: References) -> str | None:
    """Says why the references of a run cannot serve an attack; None if they can.

    Losses can be averaged over references, and summed over spans of a text. What else is read of a
    reference (its guesses, its attention) belongs to one model and its own tokens.
    """
    read = [q for q in flatten(attack.queries(settings)) if "reference" in q.roles]
    if not read:
        return None
    if given.count == 0:
        return "it reads a reference, and there is none"
    if given.count > 1 and not all(map(_reads_losses, read)):
        return "it reads more of a reference than losses, which several do not have in common"
    if given.own_tokenizer and not all(_reads_losses(q) and q.view is None for q in read):
        return (
            "it reads more of a reference than losses of the text itself, which is all that "
            "different tokenizers have in common"
        )
    return None


def _reads_losses(query: Query) -> bool:
    """Tells whether a query reads losses under masks that depend on no model."""
    return isinstance(query.reads, Probes) and query.channels == ("nll",) and query.guide is None
