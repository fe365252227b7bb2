"""ReCaLL and CON-ReCall: how a prefix of known texts changes a text's likelihood.

No label of a scored text is used. Prefix texts come from `--prefixes`, or they are taken out of
the evaluation. `settings.prefix` says how many and how long.
"""

from jaxtyping import Array, Float

from sama_jax.arrays import Reading
from sama_jax.attacks.likelihood import nll_per_token
from sama_jax.attacks.perturbed import quotient, shared_probes
from sama_jax.attacks.queries import TARGET, Query
from sama_jax.attacks.registry import register
from sama_jax.attacks.views import Context, Joined
from sama_jax.config import AuditSettings

_NO_ROOM = "it needs at least one token, and room before it in the models' context"


def _nll(reading: Reading) -> Float[Array, ""]:
    return nll_per_token(reading.target, reading.plan)


def _recall_queries(settings: AuditSettings) -> dict[str, Query]:
    half = shared_probes(settings, 2)
    view = Context("nonmember", settings.prefix.tokens)
    return {
        "text": Query(half, roles=TARGET),
        "nonmember": Query(half, view, roles=TARGET),
    }


@register(
    "recall",
    queries=_recall_queries,
    access="loss + texts known as non-members",
    source="Xie et al., arXiv 2406.15968",
    undefined=_NO_ROOM,
)
def recall(reading: Reading) -> Float[Array, ""]:
    """NLL of the text behind non-members over its NLL alone, same masks.

    The prefix stays visible; only the text's tokens are masked and scored.
    """
    return quotient(_nll(reading.views["nonmember"]), _nll(reading))


def _circulated_queries(settings: AuditSettings) -> dict[str, Query]:
    half = shared_probes(settings, 2)
    return {
        "text": Query(half, roles=TARGET),
        "joined": Query(half, Joined("nonmember"), roles=TARGET),
    }


@register(
    "recall:circulated",
    queries=_circulated_queries,
    access="loss + texts known as non-members",
    source="clearloveclearlove/DLM_MIA attack/attacks/recall.py",
)
def recall_circulated(reading: Reading) -> Float[Array, ""]:
    """NLL of prefix and text together over that of the text, both summed over their tokens.

    As circulated: prefix tokens are masked and scored, too, and what exceeds the maximum length is
    cut off the text. Behind a prefix of that length, only the text's own likelihood is left in it.
    """
    joined = reading.views["joined"]
    return quotient(_nll(joined) * joined.num_tokens, _nll(reading) * reading.num_tokens)


def _conrecall_queries(settings: AuditSettings) -> dict[str, Query]:
    third, tokens = shared_probes(settings, 3), settings.prefix.tokens
    views = {
        name: Query(third, Context(name, tokens), roles=TARGET) for name in ("nonmember", "member")
    }
    return {"text": Query(third, roles=TARGET), **views}


@register(
    "conrecall",
    queries=_conrecall_queries,
    access="loss + texts known as members and as non-members",
    source="Wang et al., arXiv 2409.03363",
    undefined=_NO_ROOM,
)
def conrecall(reading: Reading, settings: AuditSettings) -> Float[Array, ""]:
    """NLL behind non-members minus gamma times that behind members, over the text's own NLL."""
    difference = _nll(reading.views["nonmember"])
    difference -= settings.prefix.gamma * _nll(reading.views["member"])
    return quotient(difference, _nll(reading))
