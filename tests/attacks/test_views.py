"""Attacks that read other texts than the text itself, against plain forward passes and loops."""

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import NETWORKS
from scored import SCORED, oracle, score_corpus

from sama_jax import attacks, rng
from sama_jax.arrays import Encoded, TextKeyData
from sama_jax.attacks import corpus, its, perturbed, queries, views
from sama_jax.config import AuditSettings, ItsSettings, PrefixSettings, SamaSettings
from sama_jax.core import masking, metrics
from sama_jax.engine import loop, plans, tasks
from sama_jax.engine.text_table import derived_view, original_view, table_of
from sama_jax.engine.views import generator_of
from sama_jax.errors import Interrupted, UsageError
from sama_jax.models.model import LinenModel
from sama_jax.models.registry import read_config
from sama_jax.models.transformer import TransformerModel
from sama_jax.programs.audit import AuditJob, AuditResult, run_audit
from sama_jax.programs.audit_inputs import Prefixes, choose_prefixes
from sama_jax.programs.rescore import run_score
from sama_jax.texts.read import Text, collect, read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import loading, model_folder, saving

SETTINGS = AuditSettings(
    max_length=32,
    passes=6,
    sama=SamaSettings(steps=6, subsets=8, subset_size=3),
    prefix=PrefixSettings(shots=3, tokens=16, gamma=0.5),
)
ROOM = 40
"""Context of the models: 8 tokens more than the longest text."""
WITHOUT_PREFIX = ("lowercase", "neighbor", "bows", "dfmia", "its", "its:code")
NAMES = (*WITHOUT_PREFIX, "recall", "recall:circulated", "conrecall")
# Losses are below 30 and agree to about 1e-6 of that between padded and plain passes; scores are
# differences or ratios of means of them.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def folder(path: Path, seed: int) -> Path:
    """A model whose losses depend on their context: weights four times the initial ones."""
    tiny.folder(path, seed=seed)
    full = tiny.config(max_sequence_length=ROOM)
    family = read_config(full, str(path))
    model = TransformerModel(arch=family.arch, mask_id=tiny.MASK_ID)
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(seed)))
    saving.save_folder(path, params, model, full, path, family.weights)
    return path


TEXTS = [t.capitalize() if i % 3 else t for i, t in enumerate(tiny.texts(26, (3, 8)))]
LONG, ONE, EMPTY, ONE_UPPER = 26, 27, 28, 29
TEXTS += [tiny.texts(1, (40, 40), seed=9)[0].upper(), "x", "", "X"]


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("views")
    folder(made / "target", 1)
    folder(made / "reference", 2)
    tiny.write_texts(made / "texts.jsonl", TEXTS)
    return made


def job(box: Path, out: Path, *names: str, **changes) -> AuditJob:
    given = {
        "target": box / "target",
        "reference": box / "reference",
        "texts": read_texts(box / "texts.jsonl"),
        "out": out,
        "attacks": names,
        "settings": SETTINGS,
        "quiet": True,
    }
    return AuditJob(**(given | changes))


def run(box: Path, out: Path, *names: str, **changes) -> AuditResult:
    result = run_audit(job(box, out, *names, **changes))
    assert result is not None
    return result


@pytest.fixture(scope="module")
def everything(box: Path) -> AuditResult:
    return run(box, box / "all", *NAMES)


# --- the oracle ----------------------------------------------------------------------------------


class Direct:
    """Plain forward passes: whole logits of tokens side by side, no plan, slot, view or store."""

    def __init__(self, path: Path):
        found = model_folder.open_folder(path, dtype="float32")
        model = found.model
        params = loading.load(found, jax.sharding.SingleDeviceSharding(jax.devices()[0]))

        @jax.jit
        def forward(tokens, valid):
            logits = model.logits(params, model.hidden(params, tokens, valid))
            return jax.nn.log_softmax(logits), model.attention(params, tokens, valid)

        self._forward = forward

    def forward(self, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        tokens, length = np.zeros((8, ROOM), np.int32), len(rows[0])
        for i, row in enumerate(rows):
            tokens[i, :length] = row
        valid = np.broadcast_to(np.arange(ROOM) < length, tokens.shape)
        log_p, attention = self._forward(tokens, valid)
        return (
            np.asarray(log_p, np.float64)[: len(rows), :length],
            np.asarray(attention)[: len(rows), :length, :length],
        )

    def log_p(self, ids: np.ndarray, masks: np.ndarray, before=()) -> np.ndarray:
        """Log-probabilities [t, n, v] at the text's own positions."""
        before = np.asarray(before, np.int32)
        rows = [np.r_[before, np.where(mask, tiny.MASK_ID, ids)] for mask in masks]
        return self.forward(rows)[0][:, len(before) :]

    def losses(self, ids: np.ndarray, masks: np.ndarray, before=()) -> np.ndarray:
        found = -self.log_p(ids, masks, before)[:, np.arange(len(ids)), ids]
        return np.where(masks, found, np.nan)

    def nll(self, ids: np.ndarray, masks: np.ndarray, before=()) -> float:
        """Mean over passes of the mean loss of what each masks."""
        return float(np.mean(np.nanmean(self.losses(ids, masks, before), axis=1)))


@pytest.fixture(scope="module")
def target(box: Path) -> Direct:
    return Direct(box / "target")


@pytest.fixture(scope="module")
def reference(box: Path) -> Direct:
    return Direct(box / "reference")


@functools.cache
def tokenizer() -> TextTokenizer:
    made = tiny.tokenizer()
    return TextTokenizer(made, "tiny")


def encode(text: str, length: int = 32) -> np.ndarray:
    return tokenizer().encode([text], length)[0].ids


def key_of(ids: np.ndarray) -> TextKeyData:
    return rng.text_key_data(ids)


def plan(made, key: TextKeyData, length: int, *guide: np.ndarray):
    """One text's plan by the program that the audit used."""
    pad = np.zeros((8, 32), bool)
    pad[0, :length] = True
    high, low = (np.full(8, k, np.uint32) for k in key)
    more = [np.broadcast_to(g, (8, *g.shape)) for g in guide]
    drawn = plans.draw(made, np.uint32(42), high, low, pad, *more)
    return jax.tree.map(lambda x: np.asarray(x)[0], drawn)


def masks(made, ids: np.ndarray, key: TextKeyData | None = None) -> np.ndarray:
    return plan(made, key or key_of(ids), len(ids)).masks[:, : len(ids)]


def scored_rows(result: AuditResult) -> list[int]:
    return [i for i, r in enumerate(result.rows) if r["status"] == "ok"]


def check(result: AuditResult, name: str, expected: dict[int, float | None]) -> None:
    SCORED.add(name)
    found = {i: result.rows[i]["scores"][name] for i in expected}
    nulls = [i for i, e in expected.items() if e is None]
    assert [i for i, f in found.items() if f is None] == nulls
    rest = [i for i in expected if i not in nulls]
    assert len(rest) > 3
    np.testing.assert_allclose([found[i] for i in rest], [expected[i] for i in rest], **CLOSE)
    assert len({found[i] for i in rest}) > 2


HALF = perturbed.shared_probes(SETTINGS, 2)
THIRD = perturbed.shared_probes(SETTINGS, 3)


def test_the_budget_is_split_over_the_forms_of_a_text():
    assert (HALF.passes, THIRD.passes) == (3, 2)
    for passes in range(1, 65):
        settings = dataclasses.replace(SETTINGS, passes=passes)
        for attack in attacks.select(NAMES):
            count = tasks.passes(attack, settings)
            forms = {"bows": 0, "its": 1, "its:code": 1, "conrecall": 3}.get(attack.name, 2)
            assert count["target"] <= max(passes, forms), attack.name
            assert count["reference"] <= max(passes, forms) + (forms == 1), attack.name
            assert count["target"] >= min(passes, forms)
    wanted = {1: (1, 1), 2: (1, 1), 4: (1, 2), 8: (3, 2), 16: (3, 4), 32: (5, 5), 64: (7, 8)}
    for passes, (count, share) in wanted.items():
        settings = dataclasses.replace(SETTINGS, passes=passes)
        assert perturbed.neighbors(settings) == count
        assert perturbed.shared_probes(settings, 1 + count).passes == share


# --- lower case and neighbours -------------------------------------------------------------------


@oracle("lowercase")
def test_lowercase_against_plain_passes(everything: AuditResult, target: Direct):
    expected = {}
    same_length = 0
    for i in scored_rows(everything):
        ids, lower = encode(TEXTS[i]), encode(TEXTS[i].lower())
        expected[i] = None
        if list(ids) != list(lower):
            same_length += len(ids) == len(lower)
            own = target.nll(ids, masks(HALF, ids))
            expected[i] = -own / target.nll(lower, masks(HALF, lower, key_of(ids)))
    assert same_length >= 2  # these have the same masks
    assert expected[ONE] is None
    assert expected[ONE_UPPER] is not None
    check(everything, "lowercase", expected)
    row = everything.rows[ONE]
    assert "lower case changes none" in row["undefined"]["lowercase"]
    assert row["passes"]["lowercase"] == 0


@oracle("neighbor")
def test_neighbours_are_the_references_best_guesses(
    everything: AuditResult, target: Direct, reference: Direct
):
    count = perturbed.neighbors(SETTINGS)
    share = perturbed.shared_probes(SETTINGS, 1 + count)
    assert (count, share.passes) == (2, 2)
    proposals = perturbed.NeighborProposals(count, 32)
    draw = jax.jit(proposals.masks)
    expected, swaps = {}, set()
    for i in scored_rows(everything):
        ids = encode(TEXTS[i])
        where = draw(rng.text_key(42, key_of(ids)), np.arange(32) < len(ids))
        where = np.asarray(where)[:, : len(ids)]
        swaps.add((len(ids), *where.sum(axis=1)))
        log_p = reference.log_p(ids, where).copy()
        log_p[..., tiny.MASK_ID] = -np.inf
        log_p[:, np.arange(len(ids)), ids] = -np.inf
        own = masks(share, ids)
        others = [np.where(w, p.argmax(axis=-1), ids) for w, p in zip(where, log_p)]
        expected[i] = np.mean([target.nll(o, own) for o in others]) - target.nll(ids, own)
    # 5 % of the tokens, at least one.
    assert {(1, 1, 1), (32, 2, 2)} <= swaps
    check(everything, "neighbor", expected)


class TableNetwork(nn.Module):
    """Its output at a position is a row of a table: that of the token it sees there."""

    def setup(self):
        self.table = self.param("table", nn.initializers.zeros, (12, 12))

    def trunk(self, tokens, valid):
        return self.table[tokens]

    def last_hidden(self, stream, valid, positions):
        return jnp.take_along_axis(stream, positions[..., None], axis=1)

    def logits(self, hidden):
        return hidden


class TableModel(LinenModel):
    network, vocab_size = TableNetwork(), 12


@pytest.mark.parametrize("shift", [False, True])
def test_neighbours_of_a_shifted_model_come_from_the_position_before(shift: bool):
    draw = np.random.default_rng(0)
    table = draw.normal(size=(12, 12)).astype(np.float32)
    table[:, 11] = 9.0  # the mask token is likeliest everywhere
    tokens = draw.integers(0, 11, (2, 14)).astype(np.int32)  # two more than may be masked
    may = np.arange(14) < np.array([[12], [5]])
    proposals = perturbed.NeighborProposals(3, 12)
    keys = jax.random.split(jax.random.key(0), 2)
    model = TableModel(arch=NETWORKS["bert"].arch, mask_id=11, shift=shift)
    args = (keys, *map(jnp.asarray, (tokens, may, may)))
    found = np.asarray(proposals.run(model, {"table": jnp.asarray(table)}, *args))
    where = np.asarray(jax.vmap(proposals.masks)(keys, may[:, :12])).swapaxes(0, 1)
    assert where.sum(axis=-1).tolist() == [[1, 1]] * 3
    np.testing.assert_array_equal(~np.isnan(found[..., :12]), where)
    assert np.isnan(found[..., 12:]).all()
    for t, b, i in np.argwhere(where):
        seen = np.where(where[t, b], 11, tokens[b, :12])
        odds = table[seen[max(i - 1, 0) if shift else i]].copy()
        odds[[11, tokens[b, i]]] = -np.inf
        assert found[t, b, i] == odds.argmax()


# --- prefixes ------------------------------------------------------------------------------------


def prefix_texts(result: AuditResult, label: int) -> list[str]:
    """The texts that were taken, in the order that the seed and their ids give them."""
    ids = [r["id"] for r in result.rows if r["status"] == "prefix" and r["label"] == label]
    ids.sort(key=lambda i: hashlib.sha256(f"42 {i}".encode()).digest())
    assert len(ids) == 3
    return [TEXTS[int(i[1:])] for i in ids]


@oracle("recall", "conrecall")
def test_recall_and_conrecall_against_passes_on_concatenated_tokens(
    everything: AuditResult, target: Direct
):
    before = [encode("".join(t + "\n\n" for t in prefix_texts(everything, c)), 999) for c in (0, 1)]
    assert min(map(len, before)) > 16  # both are cut
    recall, conrecall, cuts = {}, {}, set()
    for i in scored_rows(everything):
        ids = encode(TEXTS[i])
        cut = min(16, ROOM - len(ids))
        cuts.add(cut)
        half, third = masks(HALF, ids), masks(THIRD, ids)
        recall[i] = target.nll(ids, half, before[0][-cut:]) / target.nll(ids, half)
        non, mem = (target.nll(ids, third, b[-cut:]) for b in before)
        conrecall[i] = (non - 0.5 * mem) / target.nll(ids, third)
    assert {8, 16} <= cuts
    check(everything, "recall", recall)
    check(everything, "conrecall", conrecall)
    # No batch is padded beyond the models' context.
    log = [json.loads(line) for line in (everything.out / "log.jsonl").read_text().splitlines()]
    assert max(int(k) for e in log if e["event"] == "buckets" for k in e["texts"]) == ROOM


@oracle("recall:circulated")
def test_circulated_recall_masks_the_prefix_and_cuts_the_text(
    everything: AuditResult, target: Direct
):
    prefix = " ".join(prefix_texts(everything, 0))
    expected = {}
    for i in scored_rows(everything):
        ids, joined = encode(TEXTS[i]), encode(f"{prefix} {TEXTS[i]}")
        whole = target.nll(joined, masks(HALF, joined)) * len(joined)
        expected[i] = whole / (target.nll(ids, masks(HALF, ids)) * len(ids))
    check(everything, "recall:circulated", expected)


def test_prefix_texts_leave_the_evaluation(everything: AuditResult):
    taken = {r["id"] for r in everything.rows if r["status"] == "prefix"}
    assert len(taken) == 6
    ok = [r for r in everything.rows if r["status"] == "ok"]
    for row in everything.rows:
        if row["id"] in taken:
            assert set(row["scores"].values()) == {None}
            assert set(row["passes"].values()) == {0}
    for name in ("recall", "bows", "dfmia", "its"):
        summary = everything.metrics["attacks"][name]
        assert summary["n_members"] == sum(r["label"] for r in ok)
        assert summary["n_nonmembers"] == sum(1 - r["label"] for r in ok)


def one(name: str, text: str, label: int | None) -> Text:
    return Text(name, text, label, "here")


def test_a_text_that_serves_as_a_prefix_needs_no_label(box: Path, tmp_path: Path):
    texts = [one(f"t{i}", t, i % 2) for i, t in enumerate(TEXTS)]
    words = ("ka ro mi te sun", "dal fer no", "vi lo gra")
    file = collect([one(text, text, None) for text in words])
    names, found = ("recall", "bows"), []
    for label in (0, None):
        both = collect([*texts, one("same", file.texts[0].text, label)])
        result = run(box, tmp_path / f"{label}", *names, texts=both, prefixes=file)
        found.append({row["id"]: row["scores"] for row in result.rows})
    assert found[0] == found[1]
    assert sum(scores["bows"] is not None for scores in found[1].values()) > 20


def chosen(box: Path, texts: list[Text], name: str = "conrecall", **changes) -> Prefixes:
    made = job(box, box / "none", name, texts=collect(texts), **changes)
    return choose_prefixes(made, attacks.select([name]), texts, [])


def test_the_choice_of_prefixes_knows_seed_ids_and_classes_alone(box: Path):
    texts = [one(f"t{i}", t, (i + 1) % 2) for i, t in enumerate(TEXTS)]
    first = chosen(box, texts)
    assert {k: len(v) for k, v in first.texts.items()} == {"nonmember": 3, "member": 3}
    # Neither the file's order nor what the texts say.
    assert chosen(box, texts[::-1]) == first
    other = [t._replace(text=f"{t.text}!") for t in texts]
    assert chosen(box, other).taken == first.taken
    # Labels of texts that were not chosen may vanish: the rest is chosen all the same.
    unknown = [t if t.id in first.taken or i % 4 > 1 else t._replace(label=None)
               for i, t in enumerate(texts)]  # fmt: skip
    assert chosen(box, unknown) == first
    assert chosen(box, texts, settings=dataclasses.replace(SETTINGS, seed=1)) != first
    # A text that repeats a prefix goes, too, whatever its label.
    twin = next(t for t in texts if t.id in first.taken)
    again = [*texts, one("twin", twin.text, None)]
    assert chosen(box, again).taken == first.taken | {"twin"}
    # Too few texts of a class: none of it, and none of the other that nothing reads without it.
    few = [t for t in texts if t.label == 0] + [t for t in texts if t.label == 1][:5]
    assert chosen(box, few) == Prefixes({}, set(), frozenset({"nonmember"}))
    assert set(chosen(box, few, "recall").texts) == {"nonmember"}
    # A file of prefixes takes nothing but texts that stand in it.
    file = collect([one("a", "ka ro", 0), one("b", TEXTS[4], None), one("d", "mi te", 0)])
    given = chosen(box, texts, "recall", prefixes=file)
    classes = frozenset({"nonmember"})
    assert given == Prefixes({"nonmember": ["ka ro", TEXTS[4], "mi te"]}, {"t4"}, classes)
    # ... and that an attack reads.
    members = [one("c", TEXTS[6], 1), one("e", "sun", 1), one("f", "dal", 1)]
    file = collect([*file.texts, *members])
    assert chosen(box, texts, "recall", prefixes=file).taken == {"t4"}
    assert chosen(box, texts, prefixes=file).taken == {"t4", "t6"}
    # Fewer than are read are refused, where an attack reads them.
    file = collect(file.texts[:-1])
    assert chosen(box, texts, "recall", prefixes=file).taken == {"t4"}
    with pytest.raises(UsageError, match=r"holds 2 texts of the class member.* prefix\.shots is 3"):
        chosen(box, texts, prefixes=file)


# --- all texts together --------------------------------------------------------------------------


@oracle("dfmia")
def test_dfmia_against_plain_passes(everything: AuditResult, target: Direct, reference: Direct):
    rows = scored_rows(everything)
    half = corpus.HalfProbes(3, 32)

    def nll(model: Direct, ids: np.ndarray) -> float:
        found = model.losses(ids, masks(half, ids))
        covered = ~np.isnan(found).all(axis=0)
        return float(np.nanmean(found[:, covered], axis=0).mean())

    copies = {}
    for i in rows:
        ids = encode(TEXTS[i])
        seed = [42, int(key_of(ids).high), int(key_of(ids).low)]
        count = min(max(round(0.15 * len(ids)), 1), len(ids) - 1)
        gone = np.random.default_rng(seed).choice(len(ids), count, replace=False)
        copies[i] = [t for n, t in enumerate(ids) if n not in gone.tolist()]
    assert [len(copies[i]) for i in (ONE, LONG)] == [1, 27]
    # Fewer than 64 texts: all of them are the pool.
    gaps = []
    for i in rows:
        for ids in (encode(TEXTS[i]), np.array(copies[i], np.int32)):
            gaps.append(nll(reference, ids) - nll(target, ids))
    centre = np.median(gaps)
    scale = 1.4826 * np.median(np.abs(np.array(gaps) - centre))
    expected = {i: (-nll(target, encode(TEXTS[i])) - centre) / scale for i in rows}
    check(everything, "dfmia", expected)


def test_dfmia_reads_the_pool_of_the_highest_losses():
    draw = np.random.default_rng(0)
    for size, pool in ((40, 40), (100, 64), (300, 150), (900, 256)):
        parts = draw.normal(size=(size, 3)).astype(np.float32)
        top = sorted(range(size), key=lambda i: -parts[i, 0])[:pool]
        sample = [float(parts[i, k]) for i in top for k in (1, 2)]
        middle = float(np.median(sample))
        spread = 1.4826 * float(np.median([abs(s - middle) for s in sample]))
        found = corpus.calibrated(queries.CorpusReading(parts, None, None), SETTINGS)
        np.testing.assert_allclose(found, (-np.float64(parts[:, 0]) - middle) / spread)
    flat = np.tile(np.float32([2, 1, 1]), (5, 1))
    found = corpus.calibrated(queries.CorpusReading(flat, None, None), SETTINGS)
    assert found.tolist() == [-3.0] * 5  # a scale of 0 becomes 1
    flat[2, 1] = np.nan
    found = corpus.calibrated(queries.CorpusReading(flat, None, None), SETTINGS)
    assert np.isnan(found).tolist() == [False, False, True, False, False]


def test_half_masks_are_half_of_a_text():
    for length, count in ((1, 1), (2, 1), (3, 2), (5, 2), (7, 4), (32, 16)):
        assert (
            masks(corpus.HalfProbes(3, 32), np.arange(length)).sum(axis=1).tolist() == [count] * 3
        )


def word_list(labels: np.ndarray, seed: int, hint: float) -> list[str]:
    """Texts of 12 random words; members have `hint` more of the first five."""
    draw = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(30)]
    odds = np.ones((2, 30))
    odds[1, :5] += hint
    return [" ".join(draw.choice(words, 12, p=odds[k] / odds[k].sum())) for k in labels]


@oracle("bows")
def test_bag_of_words_against_scikit_learns_own_folds():
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    labels = np.arange(60) % 2
    texts = word_list(labels, 0, 9.0)
    found = score_corpus("bows", queries.CorpusReading(np.zeros((60, 0)), texts, labels), SETTINGS)
    order = np.array(sorted(range(60), key=lambda i: hashlib.sha256(texts[i].encode()).hexdigest()))
    forest = RandomForestClassifier(100, max_depth=2, min_samples_leaf=5, random_state=42)
    expected = cross_val_predict(
        make_pipeline(CountVectorizer(min_df=0.05), forest),
        [texts[i] for i in order],
        labels[order],
        cv=StratifiedKFold(5, shuffle=True, random_state=42),
        method="predict_proba",
    )
    np.testing.assert_array_equal(found[order], expected[:, 1])
    assert roc_auc_score(labels, found) > 0.85
    # Another order of the file changes nothing.
    turned = queries.CorpusReading(np.zeros((60, 0)), texts[::-1], labels[::-1])
    np.testing.assert_array_equal(corpus.bows(turned, SETTINGS)[::-1], found)


def test_bag_of_words_cannot_learn_permuted_labels():
    labels = np.arange(60) % 2
    texts = word_list(labels, 0, 9.0)
    mixed = np.random.default_rng(0).permutation(labels)
    found = corpus.bows(queries.CorpusReading(np.zeros((60, 0)), texts, mixed), SETTINGS)
    low, high = metrics.summarize(found, mixed)["auc_ci"]
    assert low <= 0.5 <= high


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ([f"w{i}a w{i}b" for i in range(40)], np.arange(40) % 2),  # every word in one text only
        (["same words"] * 14, np.arange(14) >= 10),  # four members
    ],
)
def test_bag_of_words_is_null_without_vocabulary_or_texts(texts, labels):
    read = queries.CorpusReading(np.zeros((len(texts), 0)), texts, labels.astype(int))
    assert np.isnan(corpus.bows(read, SETTINGS)).all()


# --- independent tokens --------------------------------------------------------------------------


def slow_groups(key, attention, length: int, counts, size: int, settings: ItsSettings):
    """Section by section as the published sampler is described, on the same random numbers."""
    noise_key, pick_key = jax.random.split(jax.random.fold_in(key, 10))
    both = np.float32(attention) + np.float32(attention).T
    taken = np.zeros(length, np.float32)
    out = np.full((len(counts), length), -1)
    for t, count in enumerate(counts):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(noise_key, t), (32,)))
        bits = np.asarray(jax.random.bits(jax.random.fold_in(pick_key, t), (32,), jnp.uint32))
        chosen: list[int] = []
        for n in range(count):
            free = [i for i in range(length) if i not in chosen]
            if n % size == 0:
                token = min(free, key=lambda i: taken[i] + np.float32(0.01) * noise[i])
                tie = both[token].copy()
            else:
                weight = {
                    i: settings.attention * tie[i] + settings.balance * taken[i] for i in free
                }
                lowest = sorted(free, key=lambda i: (weight[i], i))[: settings.least]
                token = lowest[int(bits[n]) % len(lowest)]
                tie = tie + both[token]
            chosen.append(token)
            out[t, token] = n // size
        for token in chosen:
            taken[token] += 1
    return out


@pytest.mark.parametrize("size", [3, 32])
def test_the_sampler_of_independent_groups_against_loops(size: int):
    settings = ItsSettings(balance=0.5)
    sample = jax.jit(
        lambda key, a, may, counts: its.independent_groups(key, a, may, counts, size, settings, 32)
    )
    draw = np.random.default_rng(1)
    for seed, length in enumerate((1, 2, 5, 19, 32)):
        # Multiples of 1/64 add up exactly; equal weights go by position.
        attention = draw.integers(0, 64, (32, 32)).astype(np.float32) / 64
        attention[length:] = attention[:, length:] = 0
        counts = np.minimum([1, 2, 4, 7, 12], length).astype(np.int32)
        key = jax.random.key(seed)
        found = np.asarray(sample(key, attention, np.arange(32) < length, counts))
        slow = slow_groups(key, attention[:length, :length], length, counts, size, settings)
        np.testing.assert_array_equal(found[:, :length], slow)
        assert (found[:, length:] == -1).all()


def slow_votes(target, reference, groups: list[list[list[int]]]) -> float:
    """Unweighted mean over steps of the share of groups whose sum the target lowers."""
    shares = []
    for t, step in enumerate(groups):
        wins = [sum(reference[t, g]) > sum(target[t, g]) for g in step]
        shares.append(np.mean(wins))
    return float(np.mean(shares))


@pytest.mark.parametrize("name", ["its", "its:code"])
@oracle("its", "its:code")
def test_its_against_plain_passes_and_loops(
    everything: AuditResult, target: Direct, reference: Direct, name: str
):
    size = 3 if name == "its" else 32
    schedule = dataclasses.replace(SETTINGS.sama, schedule="code_linear", nesting="fresh")
    table = masking.count_table(schedule, 32)
    made = its.GroupProbes(schedule, 32, name == "its")
    expected = {}
    for i in scored_rows(everything):
        ids = encode(TEXTS[i])
        key, n = rng.text_key(42, key_of(ids)), len(ids)
        attention = reference.forward([ids])[1][0]
        found = slow_groups(key, attention, n, table[n], size, SETTINGS.its)
        if name == "its":
            groups = [[np.flatnonzero(s == g).tolist() for g in range(s.max() + 1)] for s in found]
        else:
            guide = np.full((6, 32), np.nan, np.float32)
            guide[:, :n] = np.where(found >= 0, found, np.nan)
            drawn = plan(made, key_of(ids), n, guide).subsets
            groups = [[[p for p in g if p >= 0] for g in step] for step in drawn]
            for step, mask in zip(groups, found >= 0):
                assert {len(g) for g in step} == {min(3, mask.sum())}
                assert all(mask[g].all() for g in step)
        assert [sum(s >= 0) for s in found] == [max(1, c) for c in table[n]]
        losses = [m.losses(ids, found >= 0) for m in (target, reference)]
        expected[i] = slow_votes(*losses, groups)
    check(everything, name, expected)
    assert everything.rows[LONG]["passes"][name] == 7  # six and the one that reads attention


# --- views of one text ---------------------------------------------------------------------------


def tools(ids: np.ndarray, **changes) -> queries.ViewTools:
    given = {
        "encode": lambda text: tokenizer().encode([text], 32)[0],
        "contexts": {"member": np.arange(5, 25, dtype=np.int32)},
        "joined": {"member": "ka ro"},
        "room": ROOM,
        "guide": None,
    }
    generator = generator_of(SETTINGS.seed, key_of(ids))
    return queries.ViewTools(**(given | changes), generator=generator)


def test_a_prefix_gives_way_to_the_text():
    view = views.Context("member", 16)
    ids = np.arange(30, dtype=np.int32)
    for room, kept in ((99, 16), (40, 10), (31, 1)):
        made = view.make("", ids, tools(ids, room=room))
        assert made is not None
        assert made.before.tolist() == list(range(25 - kept, 25))  # cut at its beginning
        assert made.ids is ids
        assert made.same_masks
    for room in (30, 8):
        assert view.make("", ids, tools(ids, room=room)) is None
    nothing = {"member": np.zeros(0, np.int32)}
    assert view.make("", ids, tools(ids, contexts=nothing)) is None


def test_a_deleted_share_is_at_least_one_token_and_leaves_one():
    view = views.Deleted(0.15)
    for text, left in ((TEXTS[LONG], 27), ("x", 1), ("xz", 1)):
        ids = encode(text)
        made = view.make(text, ids, tools(ids))
        assert made is not None
        assert len(made.ids) == left
        again = view.make(text, ids, tools(ids))
        assert again is not None
        np.testing.assert_array_equal(made.ids, again.ids)
    # What the tokenizer added stays.
    special = np.array([True, False, False, True])
    ids = np.array([7, 8, 9, 7], np.int32)
    made = view.make("", ids, tools(ids, encode=lambda _: Encoded(ids, special, False, 9, 12)))
    assert made is not None
    assert made.ids.tolist() in ([7, 8, 7], [7, 9, 7])
    assert made.special is not None
    assert made.special.tolist() == [True, False, True]


def test_replaced_and_lowercase_are_none_where_nothing_changes():
    ids = encode("ka ro")
    guide = np.full((2, 32), np.nan, np.float32)
    guide[1, 1] = 77
    assert views.Replaced(0).make("ka ro", ids, tools(ids, guide=guide)) is None
    made = views.Replaced(1).make("ka ro", ids, tools(ids, guide=guide))
    assert made is not None
    assert made.ids.tolist() == [ids[0], 77, *ids[2:]]
    assert views.Lowercase().make("ka ro", ids, tools(ids)) is None
    made = views.Lowercase().make("KA", encode("KA"), tools(encode("KA")))
    assert made is not None
    assert made.ids.tolist() == encode("ka").tolist()


def test_views_of_one_length_share_masks_and_maskable_positions():
    settings = dataclasses.replace(
        SETTINGS, sama=dataclasses.replace(SETTINGS.sama, exclude_special=True)
    )
    special = np.array([True, False, False])
    ids = np.array([1, 2, 3], np.int32)
    original = original_view(Encoded(ids, special, False, 9, 12), settings, shift=False)
    for before in (None, np.array([4, 5], np.int32)):
        made = queries.ViewText(ids + 1, None, before, same_masks=True)
        view = derived_view(made, original, settings, shift=False, room=128)
        assert view.key == original.key
        assert view.maskable.tolist() == [False, True, True]
        assert table_of([view]).lengths.tolist() == [3 + 2 * (before is not None)]
        assert view.store_key not in (original.store_key, "")
    apart = derived_view(queries.ViewText(ids + 1), original, settings, shift=False, room=128)
    assert apart.key != original.key


# --- whole runs ----------------------------------------------------------------------------------


def test_scores_come_back_from_the_store_without_a_pass(
    box: Path, everything: AuditResult, tmp_path: Path, monkeypatch
):
    shutil.copytree(everything.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "parts")
    (tmp_path / "run" / "scores.jsonl").unlink()

    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loop, "load", never)
    again = run(box, tmp_path / "run", *NAMES)
    assert again.rows == everything.rows
    assert again.metrics == everything.metrics
    # Neither does another attack forget which texts are prefixes.
    part = run(box, tmp_path / "run", "its")
    assert part.metrics == everything.metrics
    assert run_audit(job(box, tmp_path / "run", *NAMES, dry_run=True)) is None


def test_stored_views_are_scored_without_texts_and_models(everything: AuditResult, tmp_path: Path):
    shutil.copytree(everything.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "parts")
    names = [n for n in NAMES if n != "bows"]
    found = run_score(tmp_path / "run", names, quiet=True)
    for row, expected in zip(found.rows, everything.rows, strict=True):
        assert row["scores"] == {n: expected["scores"][n] for n in names}


def test_a_run_cut_off_before_a_guided_view_goes_on_with_it(
    box: Path, everything: AuditResult, tmp_path: Path, monkeypatch
):
    whole = loop.run_batches

    def cut(fill, readings, tasks, *rest):
        if tasks[0].view == "neighbor-1":
            raise KeyboardInterrupt
        whole(fill, readings, tasks, *rest)

    monkeypatch.setattr(loop, "run_batches", cut)
    with pytest.raises(Interrupted):
        run(box, tmp_path / "run", *NAMES)
    monkeypatch.undo()
    again = run(box, tmp_path / "run", *NAMES)
    assert again.rows == everything.rows
    # Two passes of the second neighbour. The two texts of one token have but one neighbour.
    assert again.cost["passes_run"] == 2 * (len(scored_rows(everything)) - 2)


def test_recall_added_to_a_finished_run_gives_the_run_with_recall(
    box: Path, everything: AuditResult, tmp_path: Path
):
    first = run(box, tmp_path / "run", *WITHOUT_PREFIX)
    assert {r["status"] for r in first.rows} == {"ok", "empty"}
    # With `its`, so that programs are those of the run with everything.
    added = run(box, tmp_path / "run", "its", *NAMES[len(WITHOUT_PREFIX) :])
    by_id = {r["id"]: r for r in everything.rows}
    for row in added.rows:
        expected = by_id[row["id"]]
        assert row["status"] == expected["status"]
        assert row["scores"] == expected["scores"]
        assert row.get("undefined") == expected.get("undefined")
    for name, summary in everything.metrics["attacks"].items():
        assert added.metrics["attacks"][name] == summary
    before = {r["id"]: r["scores"] for r in first.rows}
    moved = [r for r in added.rows if r["status"] == "ok"]
    assert any(before[r["id"]]["bows"] != r["scores"]["bows"] for r in moved)
    assert all(before[r["id"]]["its"] == r["scores"]["its"] for r in moved)
    # Views of the first part are still in the index, so that its scores can be made again.
    run_score(tmp_path / "run", ["neighbor", "lowercase"], quiet=True)


def test_neither_the_order_of_texts_nor_the_batch_changes_a_score(
    box: Path, everything: AuditResult, tmp_path: Path
):
    turned = collect(read_texts(box / "texts.jsonl").texts[::-1])
    again = run(box, tmp_path / "run", *NAMES, texts=turned)
    for row, expected in zip(again.rows[::-1], everything.rows, strict=True):
        assert row == expected


def test_texts_without_tokens_have_no_score(everything: AuditResult):
    row = everything.rows[EMPTY]
    assert row["status"] == "empty"
    assert set(row["scores"]) == set(NAMES)
    assert set(row["scores"].values()) == {None}
    one = everything.rows[ONE]["scores"]
    assert everything.rows[ONE]["n_tokens"] == 1
    assert [n for n, s in one.items() if s is None] == ["lowercase"]


def test_a_corpus_in_lower_case_has_no_lowercase_scores(box: Path, tmp_path: Path):
    file = tiny.write_texts(tmp_path / "texts.jsonl", [t.lower() for t in TEXTS[:4]])
    # With others, so that programs are those of the run with everything.
    names = ("neighbor", "lowercase", "dfmia", "its")
    result = run(box, tmp_path / "run", *names, texts=read_texts(file))
    for row in result.rows:
        assert [n for n, s in row["scores"].items() if s is None] == ["lowercase"]
        assert "lower case" in row["undefined"]["lowercase"]
    assert "lowercase" in (tmp_path / "run" / "report.md").read_text()


def test_a_text_as_long_as_the_context_has_no_room_for_a_prefix(box: Path, tmp_path: Path):
    for name in ("target", "reference"):
        shutil.copytree(box / name, tmp_path / name)
        config = tmp_path / name / "config.json"
        short = json.loads(config.read_text()) | {"max_sequence_length": 32}
        config.write_text(json.dumps(short))
    given = collect([one(f"p{i}", TEXTS[i], 0) for i in (1, 3, 5)])
    paths = {"target": tmp_path / "target", "reference": tmp_path / "reference"}
    result = run(box, tmp_path / "run", "recall", prefixes=given, **paths)
    row = result.rows[LONG]
    assert row["n_tokens"] == 32
    assert row["scores"]["recall"] is None
    assert "room before it" in row["undefined"]["recall"]
    assert result.rows[1]["status"] == "prefix"
    scored = [r for r in result.rows if r["scores"]["recall"] is not None]
    assert len(scored) == len(TEXTS) - 5  # neither prefixes nor this one nor the empty one
