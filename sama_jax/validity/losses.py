"""Gates about the losses of target and reference. Each takes the mean losses of the texts."""

import numpy as np
import scipy
from jaxtyping import Float, Int

from sama_jax.validity import bounds
from sama_jax.validity.gate import Gate, gate

Losses = Float[np.ndarray, " n"]
"""Mean loss of each text in nats a token, NaN where there is none."""


def same_losses(
    same: Float[np.ndarray, " n"], unit: str = "token", models: str = "Target and reference"
) -> Gate:
    """Voids an audit two of whose models give the same losses; `same` are shares of each text."""
    name, share = "same_losses", _mean(same)
    if share is None:
        return gate(name, "not run", "No attack read the losses of both models.")
    return gate(
        name,
        "void" if share >= bounds.SAME_SHARE else "pass",
        f"{models} give the same loss at {100 * share:.1f} % of the {unit}s.",
        "The audit compares a model with itself: look for a wrong folder, an adapter that was not "
        "applied, one that was never trained, or a reference that is given twice.",
        statistic=share,
        bound=bounds.SAME_SHARE,
    )


def target_worse(
    target: Losses, reference: Losses, labels: Int[np.ndarray, " n"], unit: str = "token"
) -> Gate:
    """Voids an audit whose target predicts every class far worse than its reference.

    Overfitting may do so to non-members, but then members are predicted better. A reference with
    another tokenizer, whose losses are of spans, is not what the target was made from, and may well
    be the better model: then it only weakens the result.

    Args:
      target: its losses.
      reference: those of the reference.
      labels: -1 where there is none.
      unit: what losses are of, `token` or `span`.
    """
    name, gains = "target_worse", reference - target
    classes = [gains[labels == label] for label in np.unique(labels)]
    means = [mean for gain in classes if (mean := _mean(gain)) is not None]
    if not means:
        return gate(name, "not run", "No attack read the losses of both models.")
    best, of_tokens = max(means), unit == "token"
    return gate(
        name,
        ("void" if of_tokens else "warn") if best < -bounds.WORSE_NATS else "pass",
        f"The target's loss is {abs(best):.3f} nats a {unit} "
        f"{'above' if best < 0 else 'below'} the reference's, on the class that it predicts best.",
        "The target does not look like a fine-tune of the reference: were the two folders "
        "exchanged, or is one of them read by a wrong config?"
        if of_tokens
        else "Most votes then fall against membership, whatever was learnt: give the target's own "
        "base, or a reference that knows less.",
        statistic=-best,
        bound=bounds.WORSE_NATS,
    )


def reference_better(target: Losses, reference: Losses) -> Gate:
    """Warns where the reference predicts most texts better than the target."""
    name, known = "reference_better", np.isfinite(reference - target)
    if not known.any():
        return gate(name, "not run", "No attack read the losses of both models.")
    count, texts = int((reference < target)[known].sum()), int(known.sum())
    share = count / texts
    surely = (
        scipy.stats.binomtest(count, texts, bounds.WORSE_SHARE, "greater").pvalue < bounds.WORSE_P
    )
    return gate(
        name,
        "warn" if surely else "pass",
        f"The reference predicts {100 * share:.0f} % of the texts better than the target does.",
        "A fine-tune on texts of this kind should predict most of them better: check that the "
        "target is the fine-tuned model, and that these texts are like its training data.",
        statistic=share,
        bound=bounds.WORSE_SHARE,
    )


def learnt(
    role: str, losses: Losses, frequencies: Losses, unit: str = "token", model: str | None = None
) -> Gate:
    """Voids an audit in which a model predicts no better than how frequent tokens are.

    Args:
      role: `target` or `reference`.
      losses: of that model.
      frequencies: of `core.frequencies.frequency_losses`, over the same texts.
      unit: what both are of.
      model: what the model is called; None: by its role.
    """
    name, gains = f"{role}_learnt", frequencies - losses
    known = gains[np.isfinite(gains)]
    if len(known) < bounds.MIN_TEXTS:
        return gate(
            name,
            "not run",
            f"{len(known)} texts are too few to compare the {role} with frequencies of tokens; "
            f"{bounds.MIN_TEXTS} are enough.",
        )
    gain = float(known.mean())
    return gate(
        name,
        "void" if gain <= 0 else "pass",
        f"The {model or role} predicts these texts {abs(gain):.3f} nats a {unit} "
        f"{'better' if gain > 0 else 'worse'} than the frequencies of their tokens do.",
        "It is not read as it was trained: check the mask token, the tokenizer, the rotary base "
        "and the rest of config.json, and that its weights are whole.",
        statistic=gain,
        bound=0.0,
    )


def same_arithmetic(target: str, reference: str) -> Gate:
    """Warns where the two models are computed in different ways, such as their dtype says."""
    return gate(
        "same_arithmetic",
        "pass" if target == reference else "warn",
        f"The target is computed in {target}, the reference in {reference}.",
        "Rounding then looks like a difference of the models: give both one --dtype and "
        "--attention.",
    )


def _mean(values: Float[np.ndarray, " n"]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
