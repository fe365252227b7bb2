"""Gates about texts and labels, against naive loops, unfair splits and fair ones."""

import itertools
import random

import numpy as np
import pytest

from sama_jax.core import metrics
from sama_jax.texts.read import Text
from sama_jax.validity import bounds, data, overlap
from sama_jax.validity.blind import blind, features, out_of_fold

WORDS = [a + b + c for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]


def sentence(draw: random.Random, count: int, words: list[str] = WORDS) -> str:
    return " ".join(draw.choices(words, k=count))


def corpus(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [sentence(draw, draw.randint(30, 60)) for _ in range(count)]


def halves(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count) % 2


def lengths(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


# --- overlap -------------------------------------------------------------------------------------


def naive_shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    size = min(size, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if words else set()


def edited(text: str, changes: int, draw: random.Random) -> str:
    words = text.split()
    for i in draw.sample(range(len(words)), changes):
        words[i] = "zz"
    return " ".join(words)


@pytest.mark.parametrize("many", [2, overlap._MANY])
def test_near_duplicates_are_those_of_a_loop_over_all_pairs(many, monkeypatch):
    monkeypatch.setattr(overlap, "_MANY", many)
    monkeypatch.setattr(overlap, "_ROWS", 7)
    draw = random.Random(1)
    texts = corpus(30)
    licence = sentence(draw, 40)
    texts += [edited(texts[i], draw.randint(0, 3), draw) for i in range(20)]
    texts += [f"{licence} {sentence(draw, 12)}" for _ in range(10)]  # all meet in the licence
    texts += ["", "one two", "One  two", "alpha beta gamma delta epsilon"]
    for least in (0.3, 0.5, 0.8):
        sets = [naive_shingles(text, 5) for text in texts]
        naive = {
            (a, b)
            for a, b in itertools.combinations(range(len(texts)), 2)
            if sets[a] | sets[b] and len(sets[a] & sets[b]) >= least * len(sets[a] | sets[b])
        }
        words = overlap.words_of(texts)
        found = overlap.near_duplicates([overlap.shingles(x, 5) for x in words], least)
        assert {tuple(pair) for pairs in found for pair in pairs.tolist()} == naive
        assert naive


def test_scripts_without_spaces_are_compared_by_characters():
    words = overlap.words_of(["会员推断攻击", "abc 会员"])
    assert [len(one) for one in words] == [6, 3]
    assert words[1][1:].tolist() == words[0][:2].tolist()


def test_the_shared_part_of_a_text_is_that_of_a_loop():
    texts = corpus(12, 2)
    cut = [f"{texts[0][:150]} {texts[7]}", texts[1], texts[9], ""]
    sets = [overlap.shingles(one, 13) for one in overlap.words_of([*cut, *texts[:5]])]
    pool = set().union(*(naive_shingles(text, 13) for text in texts[:5]))
    expected = [np.mean([one in pool for one in naive_shingles(text, 13)] or [0.0]) for text in cut]
    np.testing.assert_allclose(overlap.shared(sets[:4], sets[4:]), expected)
    assert 0 < expected[0] < expected[1] == 1


def test_too_many_shingles_are_thinned_to_the_same_ones_everywhere(monkeypatch):
    monkeypatch.setattr(bounds, "EXACT_SHINGLES", 5_000)
    sets = [overlap.shingles(one, 5) for one in overlap.words_of(corpus(400, 3))]
    thin = overlap.thinned([*sets, sets[0]])
    assert 2_000 < sum(map(len, thin)) < 6_500
    assert thin[0].tolist() == thin[-1].tolist()


def test_what_agrees_in_any_numbering_belongs_together():
    found = overlap.joined([0, 1, 1, 2, 3], [None, "a", None, "a", None])
    assert found.tolist() == [0, 1, 1, 1, 2]


# --- counting gates ------------------------------------------------------------------------------


def ids(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def test_what_no_attack_can_be_right_about_weakens_and_much_of_it_voids():
    texts = [f"t{i}" for i in range(40)] + ["t0"]
    labels = np.array([1, 0] * 20 + [0])
    one = data.contradictions(texts, labels)
    assert (one["status"], one["statistic"]) == ("warn", 2 / 41)
    assert "texts that occur as member and as non-member: 1;" in one["sentence"]
    many = data.contradictions([*texts, "t2", "t4"], np.append(labels, [0, 0]))
    assert (many["status"], many["bound"]) == ("void", bounds.WRONG_LABELS)
    assert data.contradictions(texts[:-1], labels[:-1])["status"] == "pass"


def test_texts_that_cutting_makes_equal_are_named_and_equal_texts_are_not():
    tokens = ids([1, 2], [1, 2], [3], [3], [], [])
    labels = np.array([1, 0, 1, 0, 1, 0])
    found = data.equal_after_cutting(["a", "b", "c", "c", "d", "e"], tokens, labels)
    assert (found["status"], found["statistic"]) == ("void", 0.5)
    copies = data.equal_after_cutting(
        ["a", "b"] * 3 + ["c"], ids(*[[1]] * 6, [2]), np.array([1, 0] * 3 + [1])
    )
    assert copies["statistic"] == 6 / 7  # one sequence of tokens, but six texts
    assert data.equal_after_cutting(list("abc"), tokens[:3], np.array([1, 1, 0]))["status"] == (
        "pass"
    )


def test_near_duplicates_count_across_classes_alone():
    draw = random.Random(2)
    words = [sentence(draw, 30) for _ in range(4)]
    labels = [1, 0, 1, 1, 1, 0, None]
    texts = [words[0], f"{words[0]} ka", words[1], f"{words[1]} ka", *words[2:], f"{words[3]} ka"]
    found = overlap.relate([Text(str(i), t, y, "") for i, (t, y) in enumerate(zip(texts, labels))])
    assert found.near_other.tolist() == [True, True, *[False] * 5]
    assert found.units.tolist() == [0, 0, 1, 1, 2, 3, 3]
    across = data.near_duplicates(found.near_other)
    assert (across["status"], across["statistic"]) == ("void", 2 / 7)
    assert data.near_duplicates(np.zeros(4, bool))["status"] == "pass"


def test_texts_of_one_template_are_not_compared_pair_by_pair(monkeypatch):
    draw, compared = random.Random(3), []
    template, fills = sentence(draw, 60), range(600)
    texts = [Text(str(i), f"{template} number {i} ka", i % 2, "") for i in fills]
    pairwise = overlap._jaccard
    monkeypatch.setattr(
        overlap, "_jaccard", lambda *given: compared.append(len(given[2])) or pairwise(*given)
    )
    found = overlap.relate(texts, [Text("p", f"{template} number 600 ka", None, "")])
    assert found.near_other.all()
    assert len(set(found.units.tolist())) == 1
    assert found.near_prefix == 600
    assert sum(compared) < 600  # of 180,300 pairs
    sets = [overlap.shingles(one, 5) for one in overlap.words_of(text.text for text in texts)]
    blocks = [len(pairs) for pairs in overlap.near_duplicates(sets, 0.8)]
    assert sum(blocks) == 600 * 599 // 2
    assert max(blocks) <= overlap._ROWS * 600


@pytest.mark.parametrize(("near", "status"), [(1, "pass"), (4, "warn"), (11, "void")])
def test_non_members_that_stand_in_members_are_counted(near: int, status: str):
    shares = np.r_[np.full(near, 0.8), np.full(200 - near, 0.79)]
    found = data.overlap(shares)
    assert (found["status"], found["statistic"]) == (status, near / 200)


def test_repeated_texts_mask_tokens_empty_texts_and_prefixes_weaken():
    twice = data.duplicates(["a", "a", "b", "b"], np.array([1, 1, 1, 0]))
    assert (twice["status"], twice["statistic"]) == ("warn", 1)
    masked = data.mask_tokens(ids([1, 9], [2], [9]), 9)
    assert masked["sentence"].startswith("texts that spell the mask token: 2;")
    assert data.mask_tokens(ids([1]), 9)["status"] == data.empty_texts([1, 2])["status"] == "pass"
    assert data.empty_texts([0, 2])["statistic"] == 1
    assert [data.prefixes(n)["status"] for n in (0, 2)] == ["pass", "warn"]


def test_a_class_that_is_cut_more_often_is_named():
    labels = np.array([1] * 50 + [0] * 50)
    cut = np.arange(100) < 30
    found = data.truncation(cut, labels)
    assert found["status"] == "warn"
    assert found["sentence"].startswith("Cut: 60% of the members, 0% of the non-members")
    assert data.truncation(np.arange(100) % 2 == 0, labels)["status"] == "pass"


def test_texts_that_belong_together_need_a_group():
    labels, units = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 2])
    assert data.repeated_sources(labels, units, [None] * 4)["statistic"] == 0.25
    assert data.repeated_sources(labels, units, [None] * 4)["status"] == "warn"
    assert data.repeated_sources(labels, units, ["a", "a", "b", "c"])["status"] == "pass"
    assert data.repeated_sources(labels, units, ["a", "a", None, None])["status"] == "pass"


def test_a_group_of_its_own_for_each_text_makes_none_independent():
    labels, units = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 2])
    for groups in (["a", "b", "c", "d"], ["a", None, "c", "d"]):
        found = data.repeated_sources(labels, units, groups)
        assert (found["status"], found["statistic"]) == ("warn", 0.25)
        assert "25% of the groups belong with others of their class" in found["sentence"]
    # A group of both classes is one on each side.
    both = data.repeated_sources(labels, np.zeros(4, int), ["a"] * 4)
    assert (both["status"], both["statistic"]) == ("pass", 0)


def test_rates_that_so_few_non_members_cannot_show_are_named():
    found = data.too_few(np.array([1] * 500 + [0] * 98))
    assert (found["status"], found["bound"]) == ("not run", 99)
    assert "No TPR at 1 % FPR and no TPR at 0.1 % FPR" in found["sentence"]
    assert data.too_few(np.zeros(1000, int))["status"] == "pass"


@pytest.mark.parametrize("count", [8, 9, 98, 99, 998, 999])
def test_rates_are_called_lacking_where_the_metrics_lack_them(count):
    labels = np.repeat([1, 0], [20, count])
    found = metrics.summarize(np.arange(len(labels)), labels)["tpr_at_fpr"]
    said = data.too_few(labels)["sentence"]
    lacking = {rate for rate in found if metrics.tpr_name(rate) in said}
    assert lacking == {rate for rate, result in found.items() if result is None}


# --- baselines -----------------------------------------------------------------------------------


def test_dates_in_texts_are_read():
    found = features(["on 2021-07-01 and 1999", "12021 2021x", "none"], [1, 1, 1])
    assert found["latest date"][0] == pytest.approx(2021.5, abs=0.01)
    assert found["earliest date"].tolist() == [1999.5, 2021.5, 0]


def test_out_of_fold_scores_are_those_of_ridge_regression_without_the_text():
    from sklearn.linear_model import Ridge

    draw = np.random.default_rng(0)
    x, folds = draw.normal(size=(40, 6)), np.arange(40) % 5
    labels = draw.integers(0, 2, (3, 40))
    found = out_of_fold(x @ x.T, folds, labels)
    for k, fold in itertools.product(range(3), range(5)):
        train = folds != fold
        wanted = labels[k, train] - labels[k, train].mean()
        model = Ridge(alpha=1.0, fit_intercept=False).fit(x[train], wanted)
        np.testing.assert_allclose(found[~train, k], model.predict(x[~train]), atol=1e-8)


def by_length(texts: list[str]) -> tuple[list[str], np.ndarray]:
    count = np.array(lengths(texts))
    return texts, (count > np.median(count)).astype(int)


def by_date(texts: list[str]) -> tuple[list[str], np.ndarray]:
    labels = halves(len(texts))
    years = np.random.default_rng(1).integers(0, 4, len(texts)) + np.where(labels == 1, 2015, 2020)
    return [f"{t} in {y} {t[:20]}" for t, y in zip(texts, years)], labels


def by_topic(texts: list[str]) -> tuple[list[str], np.ndarray]:
    labels, draw = halves(len(texts)), random.Random(5)
    own = {1: WORDS[:20], 0: WORDS[20:40]}
    return [f"{t} {sentence(draw, 6, own[int(y)])}" for t, y in zip(texts, labels)], labels


@pytest.mark.parametrize(
    ("unfair", "named"),
    [(by_length, "length in"), (by_date, "date"), (by_topic, "n-grams")],
)
def test_labels_that_follow_length_date_or_topic_void_the_result(unfair, named: str):
    texts, labels = unfair(corpus(120))
    found = blind(texts, lengths(texts), labels, np.arange(120))
    assert found.gate["status"] == "void"
    assert found.name is not None
    assert named in found.name
    assert named in found.gate["sentence"]
    members = found.scores[labels == 1]
    others = found.scores[labels == 0]
    wins = (members[:, None] > others).mean() + (members[:, None] == others).mean() / 2
    assert wins == pytest.approx(found.auc)


def test_fair_splits_pass_and_few_are_called_unfair():
    """At 2 %, four or more of 30 have a probability of .003."""
    texts = corpus(40, 7)
    draw = np.random.default_rng(0)
    found = [
        blind(texts, lengths(texts), draw.permutation(40) % 2, np.arange(40), seed=i).gate
        for i in range(30)
    ]
    assert sum(one["status"] != "pass" for one in found) < 4


def test_whole_documents_are_permuted():
    """Five chunks a document that share their words: as texts they would look like a shift."""
    draw, unfair = random.Random(0), []
    for seed in range(4):
        texts = []
        for _ in range(24):
            own = draw.sample(WORDS, 8)
            texts += [sentence(draw, 40, own) for _ in range(5)]
        units = np.repeat(np.arange(24), 5)
        labels = halves(24, seed)[units]
        unfair.append(
            [
                blind(texts, lengths(texts), labels, of).gate["status"] != "pass"
                for of in (units, np.arange(120))
            ]
        )
    grouped, single = np.sum(unfair, axis=0)
    assert grouped <= 1
    assert single >= 3


def test_too_many_texts_are_sampled_and_the_sentence_says_so(monkeypatch):
    monkeypatch.setattr(bounds, "BLIND_TEXTS", 60)
    texts, labels = by_length(corpus(100))
    found = blind(texts, lengths(texts), labels, np.arange(100))
    assert "on 60 of 100 texts" in found.gate["sentence"]
    assert np.isfinite(found.scores).sum() == 60


def test_a_class_of_one_document_and_tiny_classes_are_not_judged():
    texts, labels = corpus(20), np.arange(20) % 2
    found = blind(texts, lengths(texts), labels, labels)
    assert found.gate["status"] == "warn"
    assert "Members come from 1 and non-members from 1 documents" in found.gate["sentence"]
    one_of_many = np.array([0, *range(1, 20)]) * (np.arange(20) > 6)  # 7 texts of one, 13 others
    few = blind(texts, lengths(texts), (np.arange(20) < 7).astype(int), one_of_many)
    assert (few.gate["status"], few.auc) == ("warn", None)
    many, labels = corpus(199), (np.arange(199) < 100).astype(int)
    single = blind(many, lengths(many), labels, np.where(labels, 0, np.arange(199)))
    assert "Members come from 1 and non-members from 99 documents" in single.gate["sentence"]
    tiny = blind(texts[:6], lengths(texts[:6]), labels[:6], np.arange(6))
    assert (tiny.gate["status"], tiny.auc) == ("not run", None)
