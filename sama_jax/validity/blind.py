"""Asks whether members and non-members can be told apart without any model.

Attacks that never see a model beat published ones where the classes come from different sources
(Das et al., arXiv 2406.16201; Meeus et al., arXiv 2406.17975). Each baseline gives every text a
score; permuted labels say how large the largest of their AUCs is by chance.
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Int

from sama_jax.validity import bounds
from sama_jax.validity.gate import Gate, gate

NAME = "blind"
CHARACTERS = 3000
"""Characters of a text that n-grams read: more make no source easier to tell, only slower."""
FOLDS = 5
PERMUTATIONS = 999
STEPS = 4
"""Times that `blind` calls `advance`."""

_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)(?:[-/.](0[1-9]|1[0-2])(?:[-/.]([0-3]\d))?)?(?!\d)")
_REMEDY = (
    "Draw members and non-members at random from one source, before training (sama-jax split); "
    "from these texts only what an attack has beyond the baseline says anything."
)

Columns = Float[np.ndarray, "n c"]


class Blind(NamedTuple):
    """What can be told without a model."""

    gate: Gate
    name: str | None
    """The best baseline; None where none was computed."""
    scores: Float[np.ndarray, " n"]
    """Its score of each text, higher for members, made without the text's own label; NaN for texts
    that were left out."""
    auc: float | None


def blind(
    texts: Sequence[str],
    lengths: Sequence[int],
    labels: Int[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    advance: Callable[[int], object] = lambda _: None,
) -> Blind:
    """Scores texts by baselines that see no model, and tests whether any of them finds members.

    Args:
      texts: strings.
      lengths: tokens of each.
      labels: 1 member, 0 non-member.
      units: number of what a text belongs to, its document or its near duplicates: never in two
        folds, and permuted together.
      seed: draws the folds, the permutations, and the sample of `BLIND_TEXTS`.
      advance: called with 1 after each of `STEPS` steps.

    Returns:
      the gate, and the baseline with the highest AUC, of those that find something if any does.
    """
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.permutation(len(labels))[: bounds.BLIND_TEXTS])
    own, true = units[chosen], labels[chosen]
    found = [texts[int(i)] for i in chosen]
    scores = np.full(len(labels), np.nan)
    unasked = _unasked(true, own)
    if unasked is not None:
        return Blind(unasked, None, scores, None)
    every = np.concatenate([true[None], _permuted(true, own, draw)])
    plain = features(found, [lengths[int(i)] for i in chosen])
    folds = _folds(own, draw)
    advance(1)
    names = list(plain)
    aucs = [np.abs(_aucs(values, every) - 0.5) + 0.5 for values in plain.values()]
    columns = [
        values if _aucs(values, every[:1])[0] >= 0.5 else -values for values in plain.values()
    ]
    for name, kernel in {"shape": _shape, "words": _words, "character n-grams": _letters}.items():
        fitted = out_of_fold(kernel(found, plain), folds, every)
        names.append(name)
        aucs.append(_aucs(fitted.T, every))
        columns.append(fitted[:, 0])
        advance(1)
    best, p, margin = _tested(np.array(aucs))
    scores[chosen] = columns[best]
    auc = float(aucs[best][0])
    sample = f", on {len(chosen):,} of {len(labels):,} texts" if len(chosen) < len(labels) else ""
    return Blind(_judged(names[best], auc, p, margin, sample), names[best], scores, auc)


def _judged(name: str, auc: float, p: float, margin: float, sample: str) -> Gate:
    """Makes the gate of the best baseline: its AUC, corrected p, and how far its AUC may be off."""
    if p >= bounds.BLIND_P:
        said = f"No baseline without a model tells the classes apart (best: {name}, AUC {auc:.3f}"
        return gate(
            NAME, "pass", f"{said}; p = {p:.3f}{sample}).", statistic=p, bound=bounds.BLIND_P
        )
    void = auc - margin > bounds.BLIND_VOID
    return gate(
        NAME,
        "void" if void else "warn",
        f"Without any model, {name} tells members from non-members (AUC {auc:.3f}, p = {p:.3f} "
        f"after correction for all baselines{sample}): the classes do not come from one source.",
        _REMEDY,
        statistic=auc - margin if void else p,
        bound=bounds.BLIND_VOID if void else bounds.BLIND_P,
    )


def _unasked(labels: Int[np.ndarray, " n"], units: Int[np.ndarray, " n"]) -> Gate | None:
    """Makes the gate of texts that are too few, or in too few documents, to ask; None: enough."""
    counts = [len(set(units[labels == label].tolist())) for label in (1, 0)]
    texts = [int((labels == label).sum()) for label in (1, 0)]
    if min(texts) < FOLDS:
        return gate(
            NAME, "not run", f"Fewer than {FOLDS} texts of a class: too few to compare sources."
        )
    # One document against 99 has permutations enough, but they say nothing about that document.
    few = any(count < min(bounds.DOCUMENTS, of) for count, of in zip(counts, texts))
    if not few and math.comb(sum(counts), counts[0]) >= 2 / bounds.BLIND_P:
        return None
    return gate(
        NAME,
        "warn",
        f"Members come from {counts[0]} and non-members from {counts[1]} documents: whatever tells "
        "documents apart tells the classes apart, and nothing can show that it does not.",
        _REMEDY,
        statistic=min(counts),
    )


# --- baselines -----------------------------------------------------------------------------------


def features(texts: Sequence[str], lengths: Sequence[int]) -> dict[str, Float[np.ndarray, " n"]]:
    """Measures texts: length, compressibility, kinds of characters, the dates that they name."""

    def share(text: str, kind: Callable[[str], bool]) -> float:
        return sum(map(kind, text)) / max(1, len(text))

    rows = []
    for text, length in zip(texts, lengths):
        head, raw = text[:CHARACTERS], text.encode("utf-8", "surrogatepass")
        dates = [_years(match) for match in _DATE.finditer(text)]
        rows.append(
            {
                "length in tokens": length,
                "length in characters": len(text),
                "compressibility": len(zlib.compress(raw)) / max(1, len(raw)),
                "digits": share(head, str.isdigit),
                "capitals": share(head, str.isupper),
                "spaces": share(head, str.isspace),
                "other scripts": 0.0 if head.isascii() else share(head, lambda c: c > "\x7f"),
                "line breaks": head.count("\n") / max(1, len(head)),
                "latest date": max(dates, default=0.0),
                "earliest date": min(dates, default=0.0),
            }
        )
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def _years(match: re.Match[str]) -> float:
    """Returns a date as years with their fraction; the middle where month or day is not given."""
    year, month, day = match.groups()
    return int(year) + (0.5 if month is None else (int(month) - 1 + int(day or 15) / 31) / 12)


def _shape(texts: Sequence[str], plain: dict[str, Float[np.ndarray, " n"]]) -> Columns:
    """Compares texts by all plain features together, by their ranks: also what has no direction."""
    from sklearn.metrics.pairwise import rbf_kernel

    ranks = np.stack([scipy.stats.rankdata(x) / len(texts) for x in plain.values()], axis=1)
    return rbf_kernel(ranks, gamma=2.0)


def _words(texts: Sequence[str], plain: dict[str, Float[np.ndarray, " n"]]) -> Columns:
    """Compares texts by their words."""
    return _tfidf(texts, analyzer="word", token_pattern=r"\w+")


def _letters(texts: Sequence[str], plain: dict[str, Float[np.ndarray, " n"]]) -> Columns:
    """Compares texts by all runs of three characters."""
    return _tfidf(texts, analyzer="char", ngram_range=(3, 3))


def _tfidf(texts: Sequence[str], **options: object) -> Columns:
    """Returns the cosine of all texts with each other; labels have no part in it."""
    # Here, because an import of scikit-learn takes longer than that of the whole package.
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, dtype=np.float32, **options)  # pyright: ignore
    try:
        found = vectorizer.fit_transform([text[:CHARACTERS] for text in texts])
    except ValueError:  # no two texts have anything in common
        return np.eye(len(texts))
    return np.asarray((found @ found.T).todense(), np.float64)


def out_of_fold(
    kernel: Columns, folds: Int[np.ndarray, " n"], labels: Int[np.ndarray, "k n"]
) -> Float[np.ndarray, "n k"]:
    """Predicts each text's label from the other folds by least squares with a ridge of 1.

    A linear classifier that is as good on words as logistic regression, and whose refit under each
    of `k` labellings costs one more right-hand side. Nothing is chosen, so nothing is nested.
    """
    found = np.zeros((len(folds), len(labels)))
    for fold in np.unique(folds):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        wanted = labels[:, train].T.astype(np.float64)
        # The sums of scikit-learn's KernelRidge, which takes twice as long for 1,000 labellings.
        inside = kernel[np.ix_(train, train)] + np.eye(len(train))
        dual = np.linalg.solve(inside, wanted - wanted.mean(axis=0))
        found[test] = kernel[np.ix_(test, train)] @ dual
    return found


# --- chance --------------------------------------------------------------------------------------


def _folds(units: Int[np.ndarray, " n"], draw: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Deals whole units into folds, blind to labels: so one set of folds serves all labellings."""
    _, number = np.unique(units, return_inverse=True)
    return (draw.permutation(number.max() + 1) % FOLDS)[number]


def _permuted(
    labels: Int[np.ndarray, " n"], units: Int[np.ndarray, " n"], draw: np.random.Generator
) -> Int[np.ndarray, "k n"]:
    """Permutes the labels of units. The members and the non-members of one count as two units."""
    pieces, number = np.unique(np.stack([units, labels]), axis=1, return_inverse=True)
    of_piece = np.tile(pieces[1], (PERMUTATIONS, 1))
    return draw.permuted(of_piece, axis=1)[:, number.ravel()]


def _aucs(
    scores: Float[np.ndarray, "..."], labels: Int[np.ndarray, "k n"]
) -> Float[np.ndarray, " k"]:
    """Returns the AUC of scores [n], or [k, n] with their own row a labelling, under each one."""
    ranks = scipy.stats.rankdata(scores, axis=-1)
    members = labels.sum(axis=1)
    sums = (labels * ranks).sum(axis=1) if ranks.ndim == 2 else labels @ ranks
    pairs = members * (labels.shape[1] - members)
    return (sums - members * (members + 1) / 2) / np.maximum(pairs, 1)


def _tested(aucs: Float[np.ndarray, "c k"]) -> tuple[int, float, float]:
    """Chooses the best of the baselines: its row, its corrected p, the margin of its AUC.

    Westfall and Young's single step: every row is put on one scale by its spread over all
    labellings, the true one included, and held against the largest of each labelling.
    """
    spread = np.maximum(aucs.std(axis=1, keepdims=True), 1e-9)
    scaled = (aucs - aucs.mean(axis=1, keepdims=True)) / spread
    largest = scaled.max(axis=0)
    p = (largest >= scaled[:, :1] - 1e-9).mean(axis=1)
    found = p < bounds.BLIND_P
    best = int(np.where(found, aucs[:, 0], -1).argmax() if found.any() else aucs[:, 0].argmax())
    # Around 0.5: the larger of AUC and 1 - AUC is spread by .6 of an AUC's s.d. about a mean above
    # 0.5, and a margin by that let fair draws of 40 texts look surely unfair.
    off = np.abs(aucs - 0.5)
    error = np.maximum(np.sqrt((off**2).mean(axis=1)), 1e-9)
    margin = np.quantile((off / error[:, None]).max(axis=0)[1:], 0.95) * error[best]
    return best, float(p[best]), float(margin)
