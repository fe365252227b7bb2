"""How much its prompt helps a response: a score of conversations that needs no reference.

Fine-tuning moves what a model predicts for a response from what it predicts without the prompt to
what it predicts with it (arXiv 2605.18253, which unlearns by undoing that). As a score of
membership it is this project's suggestion.
"""

from jaxtyping import Array, Float

from sama_jax.arrays import Reading
from sama_jax.attacks.likelihood import nll_per_token
from sama_jax.attacks.perturbed import shared_probes
from sama_jax.attacks.queries import TARGET, Query
from sama_jax.attacks.registry import register
from sama_jax.attacks.views import HiddenPrompt
from sama_jax.config import AuditSettings


def _queries(settings: AuditSettings) -> dict[str, Query]:
    half = shared_probes(settings, 2)
    return {
        "text": Query(half, roles=TARGET),
        "hidden": Query(half, HiddenPrompt(), roles=TARGET),
    }


@register(
    "prompt",
    queries=_queries,
    access="masked logits",
    source="arXiv 2605.18253 (unlearning); as a score: this project",
    undefined="it has no prompt, or no response",
    needs_prompts=True,
)
def prompt(reading: Reading) -> Float[Array, ""]:
    """The target's NLL per token of a response behind its masked prompt, minus behind its prompt.

    Responses are masked alike in both.
    """
    hidden = reading.views["hidden"]
    without = nll_per_token(hidden.target, hidden.plan)
    return without - nll_per_token(reading.target, reading.plan)
