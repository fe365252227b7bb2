"""Finds texts that share most of their words, pairwise and as a share of one text. NumPy, SciPy.

Exact up to `bounds.EXACT_SHINGLES`; beyond, on a sample of the shingles that is the same in every
text, so that shares stay comparable.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int, UInt64

from sama_jax.texts.read import Text
from sama_jax.validity import bounds

_NO_SPACES = "\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af"
"""Thai to Korean: scripts that put no spaces between words, where a character counts as one."""
_WORDS = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")
_PAIRS = 1 << 14
"""Pairs whose shingles are compared at once: some 100 MB with shingles of long documents."""
_ROWS = 256
"""Texts that are compared with all others at once: with 12,000, some 100 MB of pairs."""
_MANY, _CELLS = 64, 1 << 26
"""Texts that must have a shingle to make it a column of the dense matrix, and most values of that:
256 MiB. 12,000 texts of one template take 15 s of a core and 0.6 GB; pair by pair, 20 minutes."""

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


def near_duplicates(sets: Sequence[Shingles], least: float) -> Iterator[Int[np.ndarray, "p 2"]]:
    """Yields the pairs of texts whose shingles have a Jaccard similarity of at least `least`.

    Two such sets share one of the rarest shingles of each: of k, the first k - ceil(least k) + 1
    (Bayardo et al., WWW 2007). So only pairs that meet there are compared, whatever else, such as
    a licence at the head of every file, they have in common. Where many texts meet in one shingle,
    as those of one template do, they are all compared by a product of matrices, some rows at a
    time. A pair may come twice.
    """
    columns, counts = _columns(sets)
    count, sizes = len(sets), np.array([len(one) for one in columns], np.int64)
    common = min(int((counts > _MANY).sum()), _CELLS // max(count, 1))
    start = len(counts) - common  # of the columns that many texts have
    matrix = _matrix(columns, len(counts))
    firsts = [one[: len(one) - int(np.ceil(least * len(one) - 1e-9)) + 1] for one in columns]
    rare = _matrix([one[one < start] for one in firsts], len(counts))
    for block in range(0, count, _ROWS):
        meet = (rare[block : block + _ROWS] @ rare.T).tocoo()
        left, right = meet.row + block, meet.col
        small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
        fits = (left < right) & (small >= least * large)
        for pairs in _chunks(np.stack([left[fits], right[fits]], axis=1)):
            yield pairs[_jaccard(matrix, sizes, pairs) >= least - 1e-9]
    dense = np.flatnonzero([len(one) > 0 and one[-1] >= start for one in firsts])
    few, many = matrix[dense][:, :start], matrix[dense][:, start:].toarray().astype(np.float32)
    for block in range(0, len(dense), _ROWS):
        rows = slice(block, block + _ROWS)
        both = many[rows] @ many.T + (few[rows] @ few.T).toarray()
        union = sizes[dense[rows], None] + sizes[dense] - both
        left, right = np.nonzero(both >= (least - 1e-9) * union)
        later = left + block < right
        yield dense[np.stack([left[later] + block, right[later]], axis=1)]


def _columns(sets: Sequence[Shingles]) -> tuple[list[Int[np.ndarray, "_"]], Int[np.ndarray, " v"]]:
    """Returns each text's shingles as columns, the rarest first, and how many texts have each."""
    every = np.concatenate([*sets, np.zeros(0, np.uint64)])
    _, inverse, counts = np.unique(every, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    parts = np.split(rank[inverse], np.cumsum([len(one) for one in sets])[:-1])
    return [np.sort(part) for part in parts], counts


def _matrix(columns: Sequence[Int[np.ndarray, "_"]], width: int) -> Any:
    """Makes a sparse matrix of a row a text, with ones in these columns."""
    every = np.concatenate([*columns, np.zeros(0, np.int64)])
    ends = np.cumsum([0, *map(len, columns)])
    return scipy.sparse.csr_matrix(
        (np.ones(len(every), np.int32), every, ends), shape=(len(columns), width)
    )


def _chunks(pairs: Int[np.ndarray, "p 2"]) -> Iterator[Int[np.ndarray, "c 2"]]:
    for start in range(0, len(pairs), _PAIRS):
        yield pairs[start : start + _PAIRS].astype(np.int64)


def _jaccard(
    matrix: Any, sizes: Int[np.ndarray, " n"], pairs: Int[np.ndarray, "c 2"]
) -> Float[np.ndarray, " c"]:
    left, right = pairs.T
    both = np.asarray(matrix[left].multiply(matrix[right]).sum(axis=1)).ravel()
    return both / (sizes[left] + sizes[right] - both)


def clusters(count: int, pairs: Int[np.ndarray, "p 2"]) -> Int[np.ndarray, " n"]:
    """Numbers the sets of texts that pairs connect, directly or over others."""
    ones = np.ones(len(pairs), np.int8)
    graph = scipy.sparse.csr_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


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

    near_other: Bool[np.ndarray, " d"]
    """For each distinct text, whether it nearly equals another one of the other class."""
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
    found = {text.text: compared(text) for text in texts}
    words = words_of([*map(found.__getitem__, numbers), *map(compared, prefixes)])
    sets = thinned([shingles(one, bounds.SHINGLE_WORDS) for one in words])
    # What each is (non-member, member, prefix), and what its near duplicates are. Nothing else of
    # the pairs is kept: 12,000 texts of one template have 72 million.
    kinds = np.zeros((len(sets), 3), bool)
    kinds[len(numbers) :, 2] = True
    for n, text in zip(number, texts):
        if text.label is not None:
            kinds[n, text.label] = True
    beside, near = np.zeros_like(kinds), np.arange(len(sets))
    for pairs in near_duplicates(sets, bounds.NEAR_DUPLICATE):
        for one, other in (pairs.T, pairs.T[::-1]):
            for kind in range(3):
                beside[one[kinds[other, kind]], kind] = True
        inside = pairs[pairs.max(axis=1, initial=0) < len(numbers)]
        near = clusters(len(sets), near[inside])[near]
    units = joined(number, near[number].tolist(), [text.group for text in texts])
    own, beside = kinds[: len(numbers)], beside[: len(numbers)]
    near_other = (own[:, 0] & beside[:, 1]) | (own[:, 1] & beside[:, 0])
    return Related(near_other, units, int(beside[:, 2].sum()))
