"""Counts how often `blind` weakens or voids: on fair draws, and where sources differ by so much.

python experiments/statistics/blind_void.py --draws 600

Texts are 24 words drawn from 400 by Zipf's law. Members prefer a twentieth of the words by a factor
that is 1 in a fair draw. Prints a row for each number of texts and each factor, with the mean AUC
of the best baseline.
"""

import argparse
from collections.abc import Iterable

import numpy as np

from sama_jax.validity.blind import blind

WORDS, LENGTH = 400, 24


def draw_texts(
    draw: np.random.Generator, labels: np.ndarray, factor: float
) -> tuple[list[str], list[int]]:
    """Draws a text for each label, and its number of words."""
    names = [f"w{i:03d}" for i in range(WORDS)]
    usual = 1 / np.arange(1, WORDS + 1)
    preferred = np.where(np.arange(WORDS) % 20 == 7, factor, 1.0)
    chances = [usual / usual.sum(), usual * preferred / (usual * preferred).sum()]
    texts = [" ".join(draw.choice(names, LENGTH, p=chances[label])) for label in labels]
    return texts, [LENGTH] * len(texts)


def count(texts: int, factor: float, seeds: Iterable[int]) -> tuple[dict[str, int], float]:
    """Returns how often each status was found, and the mean AUC of the best baseline."""
    statuses = dict.fromkeys(("pass", "warn", "void"), 0)
    aucs = []
    for seed in seeds:
        draw = np.random.default_rng(seed)
        labels = draw.permutation(texts) % 2
        found = blind(*draw_texts(draw, labels, factor), labels, np.arange(texts), seed=seed)
        statuses[found.gate["status"]] += 1
        aucs.append(found.auc)
    return statuses, float(np.mean(aucs))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=600)
    parser.add_argument("--texts", type=int, nargs="+", default=[40, 200])
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 4, 10])
    given = parser.parse_args()
    print("| texts | factor | weakened | void | of | best AUC |")
    print("| --- | --- | --- | --- | --- | --- |")
    for texts in given.texts:
        for factor in given.factors:
            found, auc = count(texts, factor, range(given.draws))
            print(
                f"| {texts} | {factor:g} | {found['warn']} | {found['void']} | {given.draws} | "
                f"{auc:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
