"""Measures how often the intervals hold and the tests err, on scores whose truth is known.

    python experiments/statistics/coverage.py [PART ...] [--repetitions N] [--scores FILE]

Prints one Markdown table a part: auc, groups, documents, paired, tpr, headline, conformal, halves.
All take some forty minutes of one core at 1,000 repetitions. `headline` wants the scores.jsonl of a
run with many attacks and freezes it; without one it makes a matrix of 33 attacks with much in
common.
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from sama_jax.core import conformal, inference, intervals, metrics
from sama_jax.validity import bounds
from sama_jax.validity.scores import negative_control

AUCS = (0.5, 0.7, 0.9, 0.99)
SIZES = (50, 100, 500, 2000)
LEVELS = 9
"""Distinct values of saturated scores."""


class Continuous:
    """Normal scores, those of members shifted so that the AUC is as asked for."""

    def __init__(self, auc: float):
        self.shift = np.sqrt(2) * norm.ppf(auc)

    def of(self, latent: np.ndarray) -> np.ndarray:
        """Turns normal numbers into scores."""
        return latent

    def tpr(self, fpr: float) -> float:
        """Returns the TPR of the threshold whose FPR over all non-members is `fpr`."""
        return float(norm.sf(norm.isf(fpr) - self.shift))


class Saturated(Continuous):
    """Nine levels; up to 13 % of the non-members have the highest, as votes on short texts do."""

    def __init__(self, auc: float):
        top = norm.isf(min(0.13, 1 - auc))
        self.edges = np.linspace(-2, top, LEVELS - 1)
        self.shift = brentq(lambda shift: self._auc(shift) - auc, 0, 20)

    def _shares(self, shift: float) -> np.ndarray:
        return np.diff(norm.cdf(np.r_[-np.inf, self.edges, np.inf] - shift))

    def _auc(self, shift: float) -> float:
        others = self._shares(0)
        return float(self._shares(shift) @ (np.cumsum(others) - others / 2))

    def of(self, latent: np.ndarray) -> np.ndarray:
        """Turns normal numbers into scores."""
        return np.searchsorted(self.edges, latent, side="right") / (LEVELS - 1)

    def tpr(self, fpr: float) -> float:
        """Returns the largest TPR of a threshold whose FPR over all non-members is within `fpr`."""
        flagged = (np.cumsum(self._shares(s)[::-1]) for s in (self.shift, 0))
        members, others = flagged
        return float(members[others <= fpr].max(initial=0))


KINDS = {"continuous": Continuous, "saturated": Saturated}


def texts(
    rng: np.random.Generator, count: int, columns: int = 1, group: int = 1, shared: float = 0.0
) -> np.ndarray:
    """Draws normal numbers; texts of one group of `group` have a share `shared` in common."""
    common = np.repeat(rng.normal(size=(count // group, columns)), group, axis=0)
    return np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal(size=(count, columns))


def covered(truth: float, found: Iterable[Sequence[float]]) -> float:
    """Returns the share of intervals that hold the truth."""
    return float(np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in found]))


def auc_table(times: int) -> Iterator[list[object]]:
    """Yields a row for each number of texts and AUC."""
    yield ["texts a class", "AUC", *KINDS]
    for n in SIZES:
        labels = np.repeat([1, 0], n)
        for auc in AUCS:
            row: list[object] = [n, auc]
            for number, make in enumerate(KINDS.values()):
                model, rng = make(auc), np.random.default_rng([1, n, int(100 * auc), number])
                drawn = (
                    model.of(rng.normal(size=2 * n) + model.shift * labels) for _ in range(times)
                )
                row.append(covered(auc, (metrics.auc_interval(scores, labels) for scores in drawn)))
            yield row


def group_table(times: int, n: int = 500) -> Iterator[list[object]]:
    """Yields a row for each size of groups, share that they have in common, and AUC."""
    names = [f"{kind}, {what}" for what in ("by group", "by text") for kind in KINDS]
    yield ["group", "in common", "AUC", *names]
    labels = np.repeat([1, 0], n)
    for size, shared in ((5, 0.0), (5, 0.3), (5, 0.7), (25, 0.3), (25, 0.7)):
        for auc in AUCS:
            row: list[object] = [size, shared, auc]
            for groups in (np.arange(2 * n) // size, None):
                for number, make in enumerate(KINDS.values()):
                    model, rng = make(auc), np.random.default_rng([2, size, number])
                    drawn = (texts(rng, 2 * n, 1, size, shared)[:, 0] for _ in range(times))
                    scores = (model.of(latent + model.shift * labels) for latent in drawn)
                    found = (metrics.auc_interval(one, labels, groups) for one in scores)
                    row.append(covered(auc, found))
            yield row


def documents_table(times: int, n: int = 300) -> Iterator[list[object]]:
    """Yields how often nothing is found and the interval holds with few documents of a class."""
    names = [
        f"{what}, {sizes} sizes" for what in ("found", "held") for sizes in ("equal", "unequal")
    ]
    yield ["documents of members", "of non-members", "in common", *names]
    labels = np.repeat([1, 0], n)
    for counts in ((5, 300), (300, 5), (10, 300), (300, 10), (10, 10), (10, 50)):
        for shared in (0.0, 0.1, 0.3):
            found, held = [], []
            for unequal in (False, True):
                rng, claims, ends = np.random.default_rng([9, *counts, unequal]), [], []
                for _ in range(times):
                    own, others = (_documents(rng, n, count, unequal) for count in counts)
                    groups = np.r_[own, counts[0] + others]
                    common = rng.normal(size=sum(counts))[groups]
                    noise = rng.normal(size=2 * n)
                    scores = np.sqrt(shared) * common + np.sqrt(1 - shared) * noise
                    data = scores[:, None], labels, groups
                    claims.append(inference.permutation_tests(*data, permutations=399).p[0])
                    ends.append(metrics.auc_interval(scores, labels, groups))
                found.append(np.mean(np.array(claims) <= 0.025))
                held.append(covered(0.5, ends))
            yield [*counts, shared, *found, *held]


def _documents(rng: np.random.Generator, n: int, count: int, unequal: bool) -> np.ndarray:
    """Draws the documents of `n` texts, of equal or of lognormal sizes, each with a text."""
    if not unequal:
        return np.arange(n) % count
    weight = rng.lognormal(0, 1, count)
    return np.r_[np.arange(count), rng.choice(count, n - count, p=weight / weight.sum())]


def paired_table(times: int) -> Iterator[list[object]]:
    """Yields how often a difference is claimed between two attacks of one AUC."""
    pairs = [("continuous",) * 2, ("saturated",) * 2, tuple(KINDS)]
    yield ["texts a class", "group", "AUC", "correlation", *(" and ".join(p) for p in pairs)]
    for n, size in ((50, 1), (200, 1), (500, 1), (500, 5)):
        labels = np.repeat([1, 0], n)
        groups = np.arange(2 * n) // size if size > 1 else None
        for auc, common in itertools.product(AUCS, (0.0, 0.9)):
            row: list[object] = [n, size, auc, common]
            for pair in pairs:
                models = [KINDS[kind](auc) for kind in pair]
                rng = np.random.default_rng([3, n, size, int(100 * auc), int(10 * common)])
                drawn = (_pair(rng, models, labels, common, size) for _ in range(times))
                found = (metrics.paired_difference(*two, labels, groups)[1:] for two in drawn)
                row.append(1 - covered(0.0, found))
            yield row


def _pair(
    rng: np.random.Generator, models: list[Continuous], labels: np.ndarray, common: float, size: int
) -> list[np.ndarray]:
    """Draws the scores of two attacks; half of the variance is that of groups, if there are any."""
    spread = 0.5 if size > 1 else 0.0
    one, two = (texts(rng, len(labels), columns, size, spread) for columns in (1, 2))
    both = np.sqrt(common) * one + np.sqrt(1 - common) * two
    return [model.of(x + model.shift * labels) for model, x in zip(models, both.T)]


def tpr_table(times: int) -> Iterator[list[object]]:
    """Yields the coverage of the TPR at the true threshold, and the FPR of the one reported."""
    yield ["texts a class", "AUC", "FPR", *KINDS, "mean FPR of the threshold, continuous"]
    for n, auc, fpr in itertools.product(SIZES, AUCS, (0.1, 0.01)):
        if intervals.allowed_false_alarms(n, fpr) is None:
            continue
        row: list[object] = [n, auc, fpr]
        for number, make in enumerate(KINDS.values()):
            model, rng = make(auc), np.random.default_rng([4, n, int(100 * auc), number])
            shift = np.array([[model.shift], [0.0]])
            drawn = (model.of(rng.normal(size=(2, n)) + shift) for _ in range(times))
            found = (intervals.tpr_interval(*scores, fpr, (n, n)) for scores in drawn)
            row.append(covered(model.tpr(fpr), found))
        yield [*row, _mean_rate(np.random.default_rng([4, n]), auc, n, fpr, times)]


def _mean_rate(rng: np.random.Generator, auc: float, n: int, fpr: float, times: int) -> float:
    """Returns the mean FPR, over all non-members, of the threshold that `tpr_at_fpr` takes."""
    labels, shift = np.repeat([1, 0], n), Continuous(auc).shift
    rates = []
    for _ in range(times):
        found = metrics.tpr_at_fpr(rng.normal(size=2 * n) + shift * labels, labels, fpr)
        assert found is not None, "there are enough"
        rates.append(0.0 if found["threshold"] is None else norm.sf(found["threshold"]))
    return float(np.mean(rates))


def matrix(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores [n, 33] and labels: of a run, or made up."""
    if path is None:
        rng = np.random.default_rng(5)
        labels = np.repeat([1, 0], 125)
        factors = rng.normal(size=(250, 15)) + 0.3 * labels[:, None]
        return factors @ rng.normal(size=(15, 33)) + 3 * rng.normal(size=(250, 33)), labels
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows = [row for row in rows if row.get("label") is not None]
    names = [name for name in rows[0]["scores"] if name != "bows"]  # a check of the data
    scores = np.array([[row["scores"].get(name) for name in names] for row in rows], float)
    return scores, np.array([row["label"] for row in rows])


def headline_table(times: int, path: Path | None = None) -> Iterator[list[object]]:
    """Yields how often permuted labels make a headline, and intervals of the strongest attack."""
    scores, labels = matrix(path)
    rng = np.random.default_rng(6)
    yield [f"{scores.shape[1]} attacks, {len(labels)} texts", "share"]
    primary, family, null, chosen = [], [], [], []
    for repetition in range(times):
        permuted = rng.permutation(labels)
        tests = inference.permutation_tests(scores, permuted, permutations=999, seed=repetition)
        primary.append(tests.p[0] <= 0.025)
        family.append(tests.adjusted.min() <= 0.025)
        strongest = _strongest(scores, permuted)
        null.append(strongest[0] <= 0.5 <= strongest[1])
    yield ["permuted labels: the primary attack is claimed", np.mean(primary)]
    yield ["permuted labels: any attack is claimed, after correction", np.mean(family)]
    yield ["permuted labels: interval of the strongest attack holds 0.5", np.mean(null)]
    truth = [metrics.auc(*metrics.usable(column, labels)[:2]) for column in scores.T]
    for _ in range(times):
        drawn = np.concatenate(
            [rng.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in (1, 0)]
        )
        low, high, best = _strongest(scores[drawn], labels[drawn])
        chosen.append(low <= truth[int(best)] <= high)
    yield ["texts drawn anew: interval of the strongest attack holds its AUC", np.mean(chosen)]


def _strongest(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float, int]:
    """Returns the simultaneous interval of the attack with the highest AUC, and its column."""
    found = inference.simultaneous_intervals(scores, labels)
    best = int(np.nanargmax(found.auc))
    return found.low[best], found.high[best], best


def conformal_table(times: int) -> Iterator[list[object]]:
    """Yields what p-values, thresholds, false discoveries and collections do to non-members."""
    rng = np.random.default_rng(7)
    yield ["measured", "nominal", "found"]
    for kind, make in KINDS.items():
        model = make(0.5)
        p = []
        for _ in range(200):
            scores = model.of(rng.normal(size=400))
            broken = rng.random(200) if kind == "saturated" else None
            p.append(conformal.p_values(scores[:200], scores[200:], broken))
        yield [f"200 splits, {kind}: P(p <= .05)", 0.05, np.mean(np.array(p) <= 0.05)]
        one = [row[0] for row in p]  # texts that share a calibration set are not independent
        yield [
            f"200 splits, {kind}: p-value of KS over one text a split",
            "> .05",
            kstest(one, "uniform").pvalue,
        ]
    for n in (200, 1000):
        for guarantee in (None, 0.9):
            rank = conformal.rank_of(n, 0.05, guarantee)
            bars = np.sort(rng.random((times, n)), axis=1)[:, -rank]
            what = f"threshold from {n} texts at 5 %"
            if guarantee is None:
                yield [f"{what}: mean FPR", "at most .05", np.mean(1 - bars)]
            else:
                yield [
                    f"{what}, guaranteed: share within 5 %",
                    "at least .9",
                    np.mean(1 - bars <= 0.05),
                ]
    for q in (0.05, 0.1):
        false = []
        for _ in range(times):
            member = np.arange(200) < 40
            p = conformal.p_values(rng.normal(size=200) + 2.5 * member, rng.normal(size=1000))
            found = conformal.adjusted(p) <= q
            false.append((found & ~member).sum() / max(found.sum(), 1))
        yield [f"false discoveries, 20 % members, q = {q}", f"at most {q}", np.mean(false)]
    for m in (20, 100):
        auc = inference.detectable_auc(m, 500, alpha=0.05)
        assert auc is not None
        for true in (0.5, auc):
            shift = np.sqrt(2) * norm.ppf(true)
            claims = [
                conformal.collection_test(rng.normal(shift, 1, m), rng.normal(size=500), 499).p
                <= 0.05
                for _ in range(times)
            ]
            nominal = 0.05 if true == 0.5 else 0.8
            yield [
                f"collection of {m} against 500, AUC {true:.3f}: found",
                nominal,
                np.mean(claims),
            ]


def halves_table(times: int) -> Iterator[list[object]]:
    """Yields how often halves of non-members are told apart, and how often that voids an audit."""
    yield ["non-members", "documents of", "scores", "share told apart, mean", "highest", "void"]
    for count, group, (kind, make) in itertools.product((20, 100, 500), (1, 5), KINDS.items()):
        rng, model, shares = np.random.default_rng([8, count, group]), make(0.5), []
        for _ in range(times):
            scores = model.of(texts(rng, count * group, group=group, shared=0.5)[:, 0])
            found = negative_control("", scores, np.arange(count * group) // group)
            shares.append(found["statistic"] or 0.0)
        void = np.mean(np.array(shares) > bounds.HALVES_APART)
        yield [count * group, group, kind, np.mean(shares), max(shares), void]


TABLES = {
    "halves": halves_table,
    "auc": auc_table,
    "groups": group_table,
    "documents": documents_table,
    "paired": paired_table,
    "tpr": tpr_table,
    "headline": headline_table,
    "conformal": conformal_table,
}


def main() -> None:
    """Prints the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(TABLES), metavar="PART")
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--scores", type=Path)
    args = parser.parse_args()
    for part in args.parts:
        given = {"path": args.scores} if part == "headline" else {}
        for place, row in enumerate(TABLES[part](args.repetitions, **given)):
            cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row)
            print(f"| {' | '.join(cells)} |", flush=True)
            if place == 0:
                print("|" + " --- |" * len(row))
        print(flush=True)


if __name__ == "__main__":
    main()
