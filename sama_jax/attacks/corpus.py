"""Scores that depend on all texts of a run: the bag-of-words check, and DF-MIA."""

import hashlib
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, ProbePlan, Reading
from sama_jax.attacks.likelihood import likelihood_probes
from sama_jax.attacks.queries import CorpusReading, Probes, Query
from sama_jax.attacks.registry import register, register_corpus
from sama_jax.attacks.views import Deleted
from sama_jax.config import AuditSettings
from sama_jax.core import masking

FOLDS = 5
MIN_SHARE = 0.05
"""A word counts if at least this share of the texts has it."""


@register_corpus(
    "bows",
    access="texts and labels, no model",
    source="Meeus et al., arXiv 2406.17975; Stry233/WBC attacks/",
    undefined="it needs a token, five texts of each class, and words that enough texts share",
)
def bows(corpus: CorpusReading, settings: AuditSettings) -> Float[np.ndarray, " n"]:
    """Check of the data, no attack: can members be told by their words alone?

    Probability of "member" by a random forest on word counts, each text judged by a forest that
    was trained on the four fifths without it. An AUC clearly above 0.5 says that members and
    non-members come from different distributions: no attack's AUC means membership then.
    """
    # Here, because an import of scikit-learn takes longer than that of the whole package.
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import StratifiedKFold

    assert corpus.texts is not None
    assert corpus.labels is not None
    scores = np.full(len(corpus.texts), np.nan)
    if min((corpus.labels == label).sum() for label in (0, 1)) < FOLDS:
        return scores
    # Folds are dealt in an order that the file's order does not change.
    given = corpus.texts
    order = sorted(range(len(scores)), key=lambda i: _digest(given[i]))
    texts = [given[i] for i in order]
    labels = corpus.labels[order]
    found = np.full(len(order), np.nan)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=settings.seed)
    for train, test in folds.split(texts, labels):
        words = CountVectorizer(min_df=MIN_SHARE)  # pyright: ignore  # scikit-learn's stub says int
        try:
            counts = words.fit_transform([texts[i] for i in train])
        except ValueError:  # no vocabulary is left
            continue
        forest = RandomForestClassifier(
            100, max_depth=2, min_samples_leaf=5, random_state=settings.seed
        )
        forest.fit(counts, labels[train])
        others = words.transform([texts[i] for i in test])
        found[test] = np.asarray(forest.predict_proba(others))[:, 1]
    scores[order] = found
    return scores


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


# --- DF-MIA --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfProbes(Probes):
    """Each pass masks half of the tokens at random, at least one (halves to even)."""

    passes: int
    max_length: int

    hashed_as = ("half",)

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        count = jnp.asarray(_halves(self.max_length))[maskable.sum()]
        key = rng.for_purpose(key, rng.Purpose.HALF_MASKS)
        counts = jnp.full(self.passes, count)
        masks = masking.fresh_masks(key, maskable, counts, self.max_length)
        weights = (counts > 0).astype(jnp.float32)
        return ProbePlan.without_votes(masks, masks, weights)

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        return np.full(self.passes, _halves(length).max())


def _halves(max_length: int) -> Int[np.ndarray, " n"]:
    """Counts the masked tokens by text length."""
    length = np.arange(max_length + 1)
    return np.minimum(np.maximum(np.rint(0.5 * length), 1), length).astype(np.int32)


def token_mean(losses: Float[AnyArray, "t l"], scored: Bool[AnyArray, "t l"]) -> Float[Array, ""]:
    """Averages each token over the passes that masked it, then the tokens that any did."""
    times = scored.sum(axis=0)
    sums = jnp.where(scored, losses, 0.0).sum(axis=0)
    covered = (times > 0).sum()
    means = jnp.where(times > 0, sums / jnp.maximum(times, 1), 0.0)
    return means.sum() / jnp.where(covered > 0, covered, jnp.nan)


POOL = (64, 512)
"""Least and most texts that serve as pseudo non-members; between, half of all."""
CALIBRATION = 256
"""Of these, how many are read, each with one perturbed copy."""


def calibrated(corpus: CorpusReading, settings: AuditSettings) -> Float[np.ndarray, " n"]:
    """Centres and scales the target's NLL by what the likely non-members show.

    `parts` [n, 3] are the target's NLL, the gap of reference minus target NLL, and that of the
    perturbed copy.
    """
    del settings
    known = np.asarray(np.isfinite(corpus.parts).all(axis=1))
    scores = np.full(len(known), np.nan)
    nll, *gaps = corpus.parts[known].astype(np.float64).T
    if not len(nll):
        return scores
    wanted = int(np.clip(np.rint(0.5 * len(nll)), *POOL))
    pool = np.argsort(-nll, kind="stable")[: min(wanted, CALIBRATION)]
    sample = np.concatenate([gap[pool] for gap in gaps])
    centre = np.median(sample)
    scale = 1.4826 * np.median(np.abs(sample - centre))
    scores[known] = (-nll - centre) / (scale if scale >= 1e-8 else 1.0)
    return scores


def _dfmia_queries(settings: AuditSettings) -> dict[str, Query]:
    passes = max(1, likelihood_probes(settings).passes // 2)
    half = HalfProbes(passes, settings.max_length)
    return {"text": Query(half), "copy": Query(half, Deleted(0.15))}


@register(
    "dfmia",
    queries=_dfmia_queries,
    access="masked logits + reference, all texts together",
    source="Chrisqcwx/DLLM-MIA attack/attacks/dfmia.py",
    corpus=calibrated,
)
def dfmia(reading: Reading) -> Float[Array, "3"]:
    """Minus the target's NLL, scaled by the loss gaps of likely non-members.

    Centre and scale are the same for all texts of a run, and the reference enters them alone: AUC
    and every TPR are those of minus the target's NLL, that is, of Loss with half of the tokens
    masked. Ranked without the published code's optional column, by the NLL itself.
    """

    def nll(read: Reading, losses: Float[AnyArray, "t l"]) -> Float[Array, ""]:
        return token_mean(losses, read.plan.scored)

    copy = reading.views["copy"]
    own, gap = (
        nll(reading, reading.target),
        nll(reading, reading.reference) - nll(reading, reading.target),
    )
    return jnp.stack([own, gap, nll(copy, copy.reference) - nll(copy, copy.target)])
