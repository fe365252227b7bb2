"""Finds texts that share most of their words, pairwise and as a share of one text. NumPy, SciPy.

Exact up to `bounds.EXACT_SHINGLES`; beyond, on a sample of the shingles that is the same in every
text, so that shares stay comparable.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from sama_jax.texts.read import Text
from sama_jax.validity import bounds

_NO_SPACES = "\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af"
"""Thai to Korean: scripts that put no spaces between words, where a character counts as one."""
_WORDS = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")
_PAIRS = 1 << 14
"""Pairs whose shingles are compared at once: some 100 MB with shingles of long documents."""

Shingles = UInt64[np.ndarray, "_"]
"""Hashes of the runs of words of one text, sorted, each once."""


def words_of(texts: Iterable[str]) -> list[Int[np.ndarray, "_"]]:
    """Numbers the words of texts, without their case: equal words have equal numbers."""
    known: dict[str, int] = {}
    return [
        np.array(
            [known.setdefault(word, len(known)) for word in _WORDS.findall(text.casefold())],
            np.int64,
        )
        for text in texts
    ]


def shingles(words: Int[np.ndarray, " w"], size: int) -> Shingles:
    """Hashes every run of `size` words; a shorter text is one run, one without words has none."""
    if not len(words):
        return np.zeros(0, np.uint64)
    # Random odd factors: two runs of 2^64 collide by chance alone.
    factors = np.random.default_rng(size).integers(2**62, 2**63, size, np.uint64) * 2 + 1
    padded = np.pad(words + 1, (0, max(0, size - len(words)))).astype(np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(padded, size)
    return np.unique((runs * factors).sum(axis=1, dtype=np.uint64))


def thinned(sets: Sequence[Shingles]) -> list[Shingles]:
    """Keeps the same share of all shingles everywhere, so that `EXACT_SHINGLES` are left."""
    step = -(-sum(map(len, sets)) // bounds.EXACT_SHINGLES)
    if step <= 1:
        return list(sets)
    return [one[(one >> np.uint64(20)) % np.uint64(step) == 0] for one in sets]


def near_duplicates(sets: Sequence[Shingles], least: float) -> Int[np.ndarray, "p 2"]:
    """Finds all pairs of texts whose shingles have a Jaccard similarity of at least `least`.

    Two such sets share one of the rarest shingles of each: of k, the first k - ceil(least k) + 1
    (Bayardo et al., WWW 2007). So only pairs that meet there are compared, whatever else, such as
    a licence at the head of every file, they have in common.
    """
    columns, counts = _columns(sets)
    shape = len(sets), len(counts)
    rows = np.repeat(np.arange(len(sets)), [len(one) for one in columns])
    every = np.concatenate([*columns, np.zeros(0, np.int64)])
    matrix = _matrix(rows, every, shape)
    firsts = [one[: len(one) - int(np.ceil(least * len(one) - 1e-9)) + 1] for one in columns]
    rows = np.repeat(np.arange(len(sets)), [len(one) for one in firsts])
    rare = _matrix(rows, np.concatenate([*firsts, np.zeros(0, np.int64)]), shape)
    meet = (rare @ rare.T).tocoo()
    sizes = np.array([len(one) for one in columns])
    left, right = meet.row, meet.col
    fits = (left < right) & (
        np.minimum(sizes[left], sizes[right]) >= least * np.maximum(sizes[left], sizes[right])
    )
    found = [
        pairs[_jaccard(matrix, sizes, pairs) >= least - 1e-9]
        for pairs in _chunks(np.stack([left[fits], right[fits]], axis=1))
    ]
    return np.concatenate([np.zeros((0, 2), np.int64), *found])


def _columns(sets: Sequence[Shingles]) -> tuple[list[Int[np.ndarray, "_"]], Int[np.ndarray, " v"]]:
    """Returns each text's shingles as columns, the rarest first, and how many texts have each."""
    every = np.concatenate([*sets, np.zeros(0, np.uint64)])
    _, inverse, counts = np.unique(every, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    parts = np.split(rank[inverse], np.cumsum([len(one) for one in sets])[:-1])
    return [np.sort(part) for part in parts], counts


def _matrix(
    rows: Int[np.ndarray, " k"], columns: Int[np.ndarray, " k"], shape: tuple[int, int]
) -> csr_matrix:
    return csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=shape)


def _chunks(pairs: Int[np.ndarray, "p 2"]) -> Iterator[Int[np.ndarray, "c 2"]]:
    for start in range(0, len(pairs), _PAIRS):
        yield pairs[start : start + _PAIRS].astype(np.int64)


def _jaccard(
    matrix: csr_matrix, sizes: Int[np.ndarray, " n"], pairs: Int[np.ndarray, "c 2"]
) -> Float[np.ndarray, " c"]:
    left, right = pairs.T
    both = np.asarray(matrix[left].multiply(matrix[right]).sum(axis=1)).ravel()
    return both / (sizes[left] + sizes[right] - both)


def clusters(count: int, pairs: Int[np.ndarray, "p 2"]) -> Int[np.ndarray, " n"]:
    """Numbers the sets of texts that pairs connect, directly or over others."""
    ones = np.ones(len(pairs), np.int8)
    graph = csr_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def joined(*numberings: Sequence[object]) -> Int[np.ndarray, " n"]:
    """Numbers the sets of texts that agree in any of several numberings; None agrees with none."""
    count, pairs = len(numberings[0]), []
    for numbering in numberings:
        first: dict[object, int] = {}
        pairs += [
            (first.setdefault(value, i), i)
            for i, value in enumerate(numbering)
            if value is not None
        ]
    return clusters(count, np.array(pairs, np.int64).reshape(-1, 2))


def shared(sets: Sequence[Shingles], others: Sequence[Shingles]) -> Float[np.ndarray, " n"]:
    """Returns the share of each text's shingles that stand in any of the others; 0 without any."""
    pool = np.unique(np.concatenate([*others, np.zeros(0, np.uint64)]))
    return np.array(
        [np.isin(one, pool, assume_unique=True).mean() if len(one) else 0.0 for one in sets]
    )


# --- texts ------------------------------------------------------------------------------------


class Related(NamedTuple):
    """Which texts belong together by their words."""

    classes: list[set[int]]
    """Labels of each distinct text."""
    pairs: Int[np.ndarray, "p 2"]
    """Distinct texts that are near duplicates."""
    units: Int[np.ndarray, " n"]
    """For each text, the number of its group or near duplicates."""
    near_prefix: int
    """Distinct texts that nearly equal a prefix."""


def compared(text: Text) -> str:
    """Returns the words by which a text is compared with others.

    Of a conversation its answers, since many begin with the same instructions; where they are too
    short to mean anything ("yes"), all that is said.
    """
    scored = text.scored
    return scored if len(_WORDS.findall(scored)) >= bounds.OVERLAP_WORDS else text.words


def relate(texts: Sequence[Text], prefixes: Sequence[Text] = ()) -> Related:
    """Finds which texts belong together, and which nearly equal one of `prefixes`."""
    numbers: dict[str, int] = {}
    number = [numbers.setdefault(text.text, len(numbers)) for text in texts]
    classes: list[set[int]] = [set() for _ in numbers]
    for n, text in zip(number, texts):
        classes[n] |= set() if text.label is None else {text.label}
    found = {text.text: compared(text) for text in texts}
    words = words_of([*map(found.__getitem__, numbers), *map(compared, prefixes)])
    sets = thinned([shingles(one, bounds.SHINGLE_WORDS) for one in words])
    pairs = near_duplicates(sets, bounds.NEAR_DUPLICATE)
    inside = (pairs < len(numbers)).sum(axis=1)
    near = clusters(len(numbers), pairs[inside == 2])[number].tolist()
    units = joined(number, near, [text.group for text in texts])
    near_prefix = len(np.unique(pairs[inside == 1].min(axis=1))) if len(pairs) else 0
    return Related(classes, pairs[inside == 2], units, near_prefix)
