"""Attacks on partitions, circulated forms, SecMI, PIA, infilling: each against loops in NumPy."""

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scored import oracle, score_reading

from sama_jax import rng
from sama_jax.arrays import ProbePlan, Reading
from sama_jax.attacks import (
    circulated_forms,
    denoising,
    infill,
    partition,
    sama_other_models,
    select,
)
from sama_jax.attacks.likelihood import LikelihoodProbes
from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.core import losses, masking, token_statistics
from sama_jax.models.transformer import Architecture, TransformerModel

LENGTH = 24
SETTINGS = AuditSettings(max_length=LENGTH, passes=6, sama=SamaSettings(steps=6, subsets=5))
ARCH = Architecture(
    vocab_size=41, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, mlp_width=32,
    tied=False, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


def reading(
    masks: np.ndarray, seed: int = 0, num_tokens: int | None = None, **more: Any
) -> Reading:
    """Random losses in multiples of 2^-10 at the masks."""
    draw = np.random.default_rng(seed)

    def values(low: int, high: int) -> np.ndarray:
        numbers = draw.integers(low, high, masks.shape) / 1024
        return np.where(masks, numbers, np.nan).astype(np.float32)

    weights = masks.any(axis=1).astype(np.float32)
    plan = ProbePlan(masks, masks, weights, np.zeros((len(masks), 0, 1), np.int32))
    count = int(masks.any(axis=0).sum()) if num_tokens is None else num_tokens
    extra = {name: values(*bounds) for name, bounds in more.items()}
    return Reading(values(0, 9000), values(0, 9000), plan, count, 50, 70, extra)


def random_masks(passes: int, tokens: int, seed: int = 0, share: float = 0.4) -> np.ndarray:
    masks = np.random.default_rng(seed).random((passes, LENGTH)) < share
    masks[:, tokens:] = False
    return masks


jitted = functools.cache(lambda maker: jax.jit(maker.plan))


def drawn(maker, tokens: int, seed: int = 0) -> ProbePlan:
    maskable = np.arange(LENGTH) < tokens
    return jax.tree.map(np.asarray, jitted(maker)(jax.random.key(seed), jnp.asarray(maskable)))


def per_token(values: np.ndarray) -> dict[int, float]:
    """Mean over passes of what was read, by token."""
    return {
        i: float(np.mean(column[~np.isnan(column)]))
        for i, column in enumerate(values.T.astype(np.float64))
        if not np.isnan(column).all()
    }


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 23, 24])
def test_a_partition_reads_every_token_once_a_round(tokens: int):
    maskable = np.zeros(LENGTH, bool)
    maskable[np.random.default_rng(tokens).permutation(LENGTH)[:tokens]] = True
    drawn = masking.partition_masks(jax.random.key(1), jnp.asarray(maskable), 4, 3, LENGTH)
    masks = np.asarray(drawn)
    assert masks.shape == (12, LENGTH)
    for part in masks.reshape(3, 4, LENGTH):
        assert (part.sum(axis=0) == maskable).all()
        sizes = part.sum(axis=1)
        assert sizes.max() - sizes.min() <= 1
        assert (sizes <= partition.PartitionProbes(4, 3, LENGTH, 1, 1).slot_bounds(tokens)[0]).all()
    if tokens > 4:
        assert (masks[:4] != masks[4:8]).any()


def test_a_partition_does_not_depend_on_the_padded_length():
    short = jnp.arange(16) < 13
    long = jnp.arange(LENGTH) < 13
    a, b = (
        np.asarray(masking.partition_masks(jax.random.key(2), m, 3, 2, LENGTH))
        for m in (short, long)
    )
    assert (a == b[:, :16]).all()


def test_the_budget_is_split_into_rounds_of_parts():
    for passes, parts, rounds in [(16, 4, 4), (8, 4, 2), (6, 4, 1), (3, 3, 1), (1, 1, 1)]:
        made = partition.tail_probes(AuditSettings(passes=passes))
        assert (made.parts, made.rounds) == (parts, rounds)
        assert partition.complement_probes(AuditSettings(passes=passes)).parts == passes


# --- statistics ----------------------------------------------------------------------------------


def vectors() -> list[np.ndarray]:
    """Differences with gaps, ties and zeros; one token; none."""
    draw = np.random.default_rng(5)
    found = []
    for tokens in (24, 15, 7, 2, 1, 0):
        values = draw.integers(-40, 40, LENGTH) / 16
        values[draw.permutation(LENGTH)[tokens:]] = np.nan
        found.append(values.astype(np.float32))
    return found


@pytest.mark.parametrize("values", vectors(), ids=lambda v: f"{(~np.isnan(v)).sum()} tokens")
def test_statistics_against_loops(values: np.ndarray):
    read = [float(v) for v in values if not np.isnan(v)]
    n = len(read)
    expected: dict[Any, float] = {
        token_statistics.mean: np.mean(read) if n else np.nan,
        token_statistics.t: np.mean(read) / np.std(read, ddof=1) if n > 1 else np.nan,
    }
    for fraction in (0.2, 0.5, 1.0):
        taken = max(1, int(fraction * n + 1e-9))
        tail = partial(token_statistics.lower_tail, fraction=fraction)
        expected[tail] = np.mean(sorted(read)[:taken]) if n else np.nan
    moved = [v for v in read if v != 0]
    ranks = [
        sum(abs(w) < abs(v) for w in moved) + (sum(abs(w) == abs(v) for w in moved) + 1) / 2
        for v in moved
    ]
    total = len(moved) * (len(moved) + 1) / 2
    signed = sum(r if v > 0 else -r for r, v in zip(ranks, moved))
    expected[token_statistics.signed_rank] = signed / total if moved else np.nan
    shares = []
    for size in token_statistics.WINDOWS:
        width = min(size, n)
        sums = [sum(read[i : i + width]) for i in range(n - width + 1)]
        shares.append(np.mean([s > 0 for s in sums]) if n else np.nan)
    expected[token_statistics.windows] = np.mean(shares)
    for statistic, value in expected.items():
        np.testing.assert_allclose(statistic(jnp.asarray(values)), value, rtol=2e-6, atol=1e-7)


def test_windows_are_strict_and_contiguous():
    zeros = jnp.zeros(8)
    assert float(token_statistics.windows(zeros)) == 0.0
    alternating = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert float(token_statistics.windows(alternating, (2,))) == 0.0
    assert float(token_statistics.windows(alternating, (3,))) == 0.5
    # Unread tokens are skipped, not counted as zeros.
    gap = jnp.array([1.0, jnp.nan, 1.0, -3.0])
    assert float(token_statistics.windows(gap, (2,))) == 0.5


# --- attacks on losses ---------------------------------------------------------------------------


def scores(name: str, read: Reading) -> float:
    return score_reading(name, read, SETTINGS)


@pytest.mark.parametrize("tokens", [0, 1, 3, 19, 24])
@oracle(
    "complement", "complement:mean", "complement:t", "complement:votes", "complement:rank", "wbc"
)
def test_partition_attacks_against_loops(tokens: int):
    plan = drawn(partition.complement_probes(SETTINGS), tokens)
    read = reading(plan.masks, seed=tokens)._replace(plan=plan)
    gain = per_token(read.reference - read.target)
    values = np.array([gain[i] for i in sorted(gain)])
    assert len(values) == tokens
    taken = max(1, int(0.2 * tokens + 1e-9))
    by_part = []
    for t in range(len(plan.masks)):
        if plan.masks[t].any():
            sums = [
                sum(float(read.reference[t, i] - read.target[t, i]) for i in s if i >= 0)
                for s in plan.subsets[t]
            ]
            by_part.append(np.mean([s > 0 for s in sums]))
    empty = not tokens
    expected = {
        "complement": np.nan if empty else np.mean(np.sort(values)[:taken]),
        "complement:mean": np.nan if empty else np.mean(values),
        "complement:t": np.mean(values) / np.std(values, ddof=1) if tokens > 1 else np.nan,
        "complement:votes": np.nan if empty else np.mean(by_part),
        "complement:rank": float(token_statistics.signed_rank(token_statistics.differences(read))),
        "wbc": float(token_statistics.windows(token_statistics.differences(read))),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(scores(name, read), value, rtol=2e-6, atol=1e-7, err_msg=name)
    if empty:
        assert np.isnan(expected["wbc"])
        assert np.isnan(expected["complement:rank"])


@pytest.mark.parametrize("tokens", [0, 1, 4, 22])
@oracle("mink", "mink++")
def test_mink_against_loops(tokens: int):
    plan = drawn(partition.tail_probes(AuditSettings(max_length=LENGTH, passes=8)), tokens)
    assert len(plan.masks) == 8
    read = reading(plan.masks, tokens, mean=(-6000, -10), deviation=(0, 3000))
    taken = max(1, int(0.2 * tokens + 1e-9))
    likelihood = sorted(per_token(-read.target).values())
    mean, deviation = read.target_more["mean"], read.target_more["deviation"]
    z = sorted(per_token((-read.target - mean) / np.maximum(deviation, 1e-6)).values())
    for name, values in (("mink", likelihood), ("mink++", z)):
        value = np.mean(values[:taken]) if tokens else np.nan
        np.testing.assert_allclose(scores(name, read), value, rtol=3e-6, err_msg=name)


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.4), (1, 1.0), (1, 0.0), (12, 0.3), (24, 0.2)])
@oracle("mink:circulated", "mink++:circulated")
def test_circulated_mink_counts_tokens_that_were_never_masked(tokens: int, share: float):
    masks = random_masks(4, tokens, seed=tokens, share=share)
    read = reading(masks, seed=tokens, num_tokens=tokens)
    probability = per_token(np.exp(-read.target))
    likelihood = per_token(-read.target)
    plain = sorted(probability.get(i, 0.0) for i in range(tokens))
    logs = [likelihood.get(i, -1000.0) for i in range(tokens)]
    logs = sorted(logs + [-1000.0] * (20 - tokens))
    expected = {"mink:circulated": sum(plain[:20]), "mink++:circulated": sum(logs[:20])}
    for name, value in expected.items():
        value = value if tokens else np.nan
        np.testing.assert_allclose(scores(name, read), value, rtol=3e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("tokens", [0, 1, 2, 20])
@oracle("mink:its", "mink++:its")
def test_the_its_forms_of_mink_sum_the_largest_losses(tokens: int):
    plan = drawn(circulated_forms.random_share_probes(SETTINGS), tokens)
    read = reading(plan.masks, tokens, flat_mean=(-9000, -10), flat_deviation=(9, 3000))
    flat = read.target_more
    z = -((-read.target - flat["flat_mean"]) / (flat["flat_deviation"] + 1e-8))
    for name, values in (("mink:its", read.target), ("mink++:its", z)):
        sums = []
        for row in np.asarray(values, np.float64):
            found = sorted((v for v in row if not np.isnan(v)), reverse=True)
            if found:
                sums.append(sum(found[: int(0.8 * len(found))] if len(found) > 1 else found))
        value = -np.mean(sums) if tokens else np.nan
        np.testing.assert_allclose(scores(name, read), value, rtol=3e-6, err_msg=name)


def test_random_shares_are_uniform_and_never_empty():
    plan = drawn(circulated_forms.RandomShareProbes(400, LENGTH), LENGTH)
    counts = plan.masks.sum(axis=1)
    assert counts.min() >= 1
    assert counts.max() <= LENGTH
    assert abs(counts.mean() / LENGTH - 0.5) < 0.05
    assert (
        drawn(circulated_forms.RandomShareProbes(9, LENGTH), 1).masks.sum(axis=1).tolist()
        == [1] * 9
    )


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@oracle("ratio:circulated", "sama:ar")
def test_unmasked_attacks_read_every_token_but_the_first(tokens: int):
    plan = drawn(sama_other_models.UnmaskedProbes(7, 3), tokens)
    assert not plan.masks.any()
    assert plan.scored[0].tolist() == [1 <= i < tokens for i in range(LENGTH)]
    read = reading(plan.scored, tokens)._replace(plan=plan)
    target, reference = (np.asarray(x[0, 1:tokens], np.float64) for x in read[:2])
    ratio = -target.mean() / reference.mean() if tokens > 1 else np.nan
    np.testing.assert_allclose(scores("ratio:circulated", read), ratio, rtol=2e-6)
    sums = [
        sum(float(read.reference[0, i] - read.target[0, i]) for i in s if i >= 0)
        for s in plan.subsets[0]
    ]
    votes = np.mean([s > 0 for s in sums]) if tokens > 1 else np.nan
    np.testing.assert_allclose(scores("sama:ar", read), votes, rtol=2e-6)


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@oracle("loss:ar", "zlib:ar", "ratio:ar", "mink:ar", "mink++:ar")
def test_attacks_on_next_token_models_against_loops(tokens: int):
    plan = drawn(sama_other_models.UnmaskedProbes(7, 3), tokens)
    read = reading(plan.scored, tokens, mean=(-9000, 0), deviation=(1, 4000))._replace(plan=plan)
    target, reference, mean, deviation = (
        np.asarray(x[0, 1:tokens], np.float64)
        for x in (read.target, read.reference, *read.target_more.values())
    )
    lowest = max(len(target) // 5, 1)
    expected = dict.fromkeys(("loss:ar", "zlib:ar", "ratio:ar", "mink:ar", "mink++:ar"), np.nan)
    if tokens > 1:
        expected = {
            "loss:ar": -target.mean(),
            "zlib:ar": -target.mean() / read.zlib_bytes,
            "ratio:ar": -target.mean() / reference.mean(),
            "mink:ar": np.sort(-target)[:lowest].mean(),
            "mink++:ar": np.sort((-target - mean) / deviation)[:lowest].mean(),
        }
    for name, value in expected.items():
        np.testing.assert_allclose(scores(name, read), value, rtol=3e-6, err_msg=name)
        assert select([name])[0].kinds == ("autoregressive",)


def test_sama_on_masked_models_stays_within_their_training():
    made = sama_other_models.masked_model_probes(AuditSettings())
    assert (made.settings.min_density, made.settings.max_density) == (0.05, 0.15)
    share = drawn(made, LENGTH).masks.sum(axis=1) / LENGTH
    assert share.max() <= 0.17
    assert select(["sama:mlm"])[0].kinds == ("masked",)
    assert select(["sama:ar"])[0].kinds == ("autoregressive",)
    assert sama_other_models.next_token_probes(SETTINGS).draws == 6 * 5


@pytest.mark.parametrize("tokens", [0, 1, 3, 21])
@oracle("secmi", "secmi:uniform")
def test_secmi_against_loops(tokens: int):
    plan = drawn(denoising.noise_level_probes(AuditSettings(max_length=LENGTH, passes=5)), tokens)
    levels = [0.1, 0.275, 0.45, 0.625, 0.8]
    counts = [min(tokens, max(1, int(x * tokens + 1e-9))) for x in levels]
    assert plan.masks.sum(axis=1).tolist() == counts
    bounds = denoising.NoiseLevelProbes(5, LENGTH).slot_bounds(tokens or 1)
    assert (bounds >= plan.masks.sum(axis=1)).all()
    read = reading(plan.masks, tokens)._replace(plan=plan)
    errors = [np.nanmean(np.asarray(r, np.float64)) for r in read.target if tokens]
    weights = 1 / np.arange(1, 6)
    expected = {
        "secmi": -np.dot(weights, errors) / weights.sum() if tokens else np.nan,
        "secmi:uniform": -np.mean(errors) if tokens else np.nan,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(scores(name, read), value, rtol=2e-6, err_msg=name)


# --- attacks on a model --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "shifted"])
def tiny(request) -> tuple[TransformerModel, Any]:
    model = TransformerModel(arch=ARCH, mask_id=40, shift=request.param)
    params = jax.jit(model.init)(jax.random.key(0))
    draw = np.random.default_rng(0)  # logits of ordinary size
    return model, jax.tree.map(lambda x: x * 8 + draw.normal(size=x.shape) * 0.1, params)


def batch(tokens: int = 20) -> tuple[np.ndarray, ...]:
    """Two texts, the second shorter, and an empty row."""
    ids = np.random.default_rng(3).integers(0, 40, (3, LENGTH)).astype(np.int32)
    lengths = np.array([tokens, 7, 0])
    valid = np.arange(LENGTH)[None] < lengths[:, None]
    return np.where(valid, ids, 0), valid


def full_logits(model, params, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Logits that predict each token, float64."""
    raw = np.asarray(raw_logits(model, params, ids, valid), np.float64)
    return np.concatenate([raw[:, :1], raw[:, :-1]], axis=1) if model.shift else raw


def raw_logits(model, params, ids, valid):
    """What the network gives at each position, whichever token it predicts."""
    unshifted = replace(model, shift=False)
    return model.logits(params, unshifted.hidden(params, jnp.asarray(ids), jnp.asarray(valid)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def keys() -> Any:
    return jax.random.split(jax.random.key(9), 3)


def test_channels_against_the_whole_vocabulary(tiny):
    model, params = tiny
    ids, valid = batch()
    positions = np.array([[0, 3, 19], [1, 6, -1], [-1, -1, -1]], np.int32)
    masks = np.zeros_like(valid)
    for row, at in enumerate(positions):
        masks[row, at[at >= 0]] = True
    masked = np.where(masks, 40, ids)
    names = ("nll", "mean", "deviation", "flat_mean", "flat_deviation", losses.NEXT)

    def read(params, ids, valid, masked):
        stream = model.trunk(params, masked, valid)
        at = jnp.asarray(positions)
        return losses.scored_values(model, params, ids, valid, stream, at, names)

    found = dict(zip(names, np.asarray(jax.jit(read)(params, ids, valid, masked))))
    log_p = log_softmax(full_logits(model, params, masked, valid))
    plain = TransformerModel(arch=ARCH, mask_id=40, shift=True)
    before = log_softmax(full_logits(plain, params, masked, valid))
    for row, slot in np.ndindex(positions.shape):
        i = positions[row, slot]
        if i < 0:
            assert all(np.isnan(v[row, slot]) for v in found.values())
            continue
        here, p = log_p[row, i], np.exp(log_p[row, i])
        mean = (p * here).sum()
        expected = {
            "nll": -here[ids[row, i]],
            "mean": mean,
            "deviation": np.sqrt((p * here**2).sum() - mean**2),
            "flat_mean": here.mean(),
            "flat_deviation": here.std(ddof=1),
            losses.NEXT: -before[row, i][ids[row, i]],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][row, slot], value, rtol=2e-4, err_msg=name)


@oracle("pia", "pia:l1", "pia:loss")
def test_pia_against_the_whole_vocabulary(tiny, monkeypatch):
    model, params = tiny
    ids, valid = batch()
    distance = denoising.LogitDistance(LENGTH)
    run = jax.jit(partial(distance.run, model))
    found = np.asarray(run(params, keys(), ids, valid, valid))
    masks = np.asarray(jax.vmap(distance.mask)(keys(), jnp.asarray(valid)))
    assert masks.sum(axis=1).tolist() == [6, 2, 0]
    assert (np.isnan(found) == ~masks[None]).all()
    plain, masked = (full_logits(model, params, x, valid) for x in (ids, np.where(masks, 40, ids)))
    loss = [-log_softmax(x) for x in (plain, masked)]
    for row, i in zip(*np.nonzero(masks)):
        change = masked[row, i] - plain[row, i]
        expected = [
            (change**2).mean(),
            np.abs(change).mean(),
            loss[1][row, i, ids[row, i]] - loss[0][row, i, ids[row, i]],
        ]
        np.testing.assert_allclose(found[:, row, i], expected, rtol=1e-3, atol=1e-5)
    for row in range(3):
        read = reading(~np.isnan(found[:, row]))._replace(target=found[:, row])
        means = [np.nanmean(v) if masks[row].any() else np.nan for v in found[:, row]]
        for name, value in zip(("pia", "pia:l1", "pia:loss"), means):
            np.testing.assert_allclose(scores(name, read), -abs(value), rtol=1e-5, err_msg=name)
    monkeypatch.setattr(losses, "HEAD_BYTES", 4 * 2 * 41 * 5)  # five positions a chunk
    chunked = np.asarray(jax.jit(partial(distance.run, model))(params, keys(), ids, valid, valid))
    np.testing.assert_allclose(chunked, found, rtol=1e-5, atol=1e-6)


def test_pia_masks_neither_nothing_nor_everything():
    distance = denoising.LogitDistance(LENGTH)
    for tokens, count in [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (7, 2), (24, 7)]:
        mask = distance.mask(jax.random.key(tokens), jnp.arange(LENGTH) < tokens)
        assert int(mask.sum()) == count


def test_filling_shows_no_block_the_truth_before_it(tiny):
    """A model that reads clean text before a block gets what has been filled in so far."""
    model, params = tiny
    ids, valid = batch()

    def found(clean: bool) -> np.ndarray:
        arch = replace(model.arch, block_length=4, clean_context=clean)
        run = jax.jit(partial(infill.GreedyFilling(3, True).run, replace(model, arch=arch)))
        return np.asarray(run(params, keys(), ids, valid, valid))

    np.testing.assert_allclose(found(True), found(False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["infill", "infill:prefix"])
@pytest.mark.parametrize("passes", [3, 30])
@oracle("infill", "infill:prefix")
def test_filling_against_a_loop(tiny, name: str, passes: int):
    """Where two choices are nearer than rounding, either is right: such a text is not compared."""
    model, params = tiny
    edges, compared = name == "infill", 0
    ids, valid = batch()
    filling = infill.GreedyFilling(passes, edges)
    run = jax.jit(partial(filling.run, model))
    found = np.asarray(run(params, keys(), ids, valid, valid))
    logits_of = jax.jit(partial(raw_logits, model, params))
    for row, n in enumerate(valid.sum(axis=1)):
        hidden = list(range(n // 4, n - n // 4) if edges else range((n + 1) // 2, n))
        now, left = ids[row].copy(), list(hidden)
        now[hidden] = 40
        expected, margin = np.full((2, LENGTH), np.nan), np.inf
        for i in range(passes):
            raw = np.asarray(logits_of(now[None], valid[row : row + 1]), np.float64)[0]
            raw = np.concatenate([raw[:1], raw[:-1]]) if model.shift else raw
            raw[:, 40] = -np.inf
            with np.errstate(divide="ignore"):
                log_p = log_softmax(raw)
            goal = -(-len(hidden) * (i + 1) // passes)
            count = goal - (len(hidden) - len(left))
            order = sorted(left, key=lambda j: -log_p[j].max())
            if 0 < count < len(order):
                margin = min(margin, log_p[order[count - 1]].max() - log_p[order[count]].max())
            for j in order[:count]:
                guess = int(log_p[j].argmax())
                margin = min(margin, log_p[j, guess] - np.sort(log_p[j])[-2])
                expected[:, j] = guess == ids[row, j], np.exp(log_p[j, ids[row, j]])
                now[j] = guess
                left.remove(j)
        assert not left
        if margin < 1e-5:  # log-probabilities of about 4 nats, float32
            continue
        compared += 1
        np.testing.assert_allclose(found[:, row], expected, rtol=1e-4, atol=1e-6)
        read = reading(~np.isnan(found[:, row]))._replace(target=found[:, row])
        share, probability = (np.nanmean(v) if hidden else np.nan for v in expected)
        name = "infill" if edges else "infill:prefix"
        value = share + 1e-3 * probability
        np.testing.assert_allclose(scores(name, read), value, rtol=1e-4, err_msg=name)
    assert compared >= len(ids) // 2


def test_the_circulated_likelihood_is_the_published_bernoulli_one():
    (attack,) = select(["mink:circulated"])
    made = attack.queries(SETTINGS)["text"].reads
    assert made == LikelihoodProbes(6, "bernoulli", 1e-3, LENGTH)


def test_purposes_are_distinct_streams():
    values = [int(p) for p in rng.Purpose]
    assert len(set(values)) == len(values)
