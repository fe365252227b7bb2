"""Loss, ZLIB, Ratio and SAMA's forms for other models, each against loops in NumPy."""

import functools
import zlib

import jax
import numpy as np
import pytest
from scored import oracle, score_reading

from sama_jax import rng
from sama_jax.arrays import ProbePlan, Reading, TextKeyData
from sama_jax.attacks import select
from sama_jax.attacks.likelihood import LikelihoodProbes
from sama_jax.config import AuditSettings, SamaSettings

LENGTH = 24
SETTINGS = AuditSettings(max_length=LENGTH, passes=5, sama=SamaSettings(steps=5, subsets=8))
TEXT = "Ein Text, der gepackt wird: aaaa bbbb aaaa bbbb aaaa bbbb aaaa bbbb."


jitted = functools.cache(lambda probes: jax.jit(probes.plan))


def read(probes, tokens: int, seed: int = 0) -> Reading:
    """Random losses in multiples of 2^-10 at what a plan scores, NaN elsewhere."""
    key = rng.text_key(7, TextKeyData(np.uint32(tokens), np.uint32(seed)))
    plan = jax.tree.map(np.asarray, jitted(probes)(key, np.arange(LENGTH) < tokens))
    numbers = np.random.default_rng([tokens, seed]).integers(1, 9000, (2, *plan.scored.shape))
    losses = np.where(plan.scored, numbers / 1024, np.nan).astype(np.float32)
    sizes = len(zlib.compress(TEXT.encode())), len(TEXT)
    return Reading(losses[0], losses[1], plan, np.int32(tokens), *sizes)


def score(name: str, reading: Reading) -> float:
    return score_reading(name, reading, SETTINGS)


def slow_nll(losses: np.ndarray, plan: ProbePlan, tokens: int, estimator: str) -> float:
    """Nats a token: the mean over passes that masked something of the text's estimated sum."""
    sums = []
    for row, scored, weight in zip(losses, plan.scored, plan.weights):
        masked = [float(loss) for loss, s in zip(row, scored) if s]
        if masked:
            # k of L tokens stand for all of them: L/k. Published: 1/p, where p is the pass's own.
            scale = tokens / len(masked) if estimator == "exact" else float(weight) * tokens
            sums.append(scale * sum(masked))
    return float(np.mean(sums)) / tokens if sums else np.nan


@pytest.mark.parametrize("estimator", ["exact", "bernoulli"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 24])
@oracle("loss", "loss:sum", "zlib", "zlib:sum", "ratio")
def test_loss_zlib_and_ratio_against_loops(tokens: int, estimator: str):
    probes = LikelihoodProbes(5, estimator, 1e-3, LENGTH)
    reading = read(probes, tokens)
    target, reference = (
        slow_nll(losses, reading.plan, tokens, estimator) for losses in reading[:2]
    )
    packed = len(zlib.compress(TEXT.encode()))
    expected = {
        "loss": -target,
        "loss:sum": -target * tokens,
        "zlib": -target / packed,
        "zlib:sum": -target * tokens / (packed / len(TEXT)),
        "ratio": -target / reference,
    }
    for name, value in expected.items():
        # 5 x 24 products and sums in float32.
        np.testing.assert_allclose(score(name, reading), value, rtol=5e-6, err_msg=name)
    if estimator == "exact":
        assert np.isnan(target) == (tokens == 0)


def test_the_probability_of_a_pass_is_in_its_weight():
    """Published form: p = (1 - eps) u + eps, one u a pass; the weight is 1/(p L)."""
    probes = LikelihoodProbes(400, "bernoulli", 1e-3, LENGTH)
    plan = read(probes, LENGTH).plan
    used = plan.weights > 0
    assert (used == plan.masks.any(axis=1)).all()
    share = 1 / (plan.weights[used] * LENGTH)
    assert share.min() >= 1e-3
    assert share.max() <= 1.001
    masked = plan.masks[used].mean(axis=1)
    # Binomial: L p (1 - p) at most 6, so a share's deviation is at most 0.102; 329 passes or more.
    assert abs(np.mean(masked - share)) < 5 * 0.102 / np.sqrt(used.sum()) + 0.01
    assert np.corrcoef(masked, share)[0, 1] > 0.9


def slow_votes(reading: Reading) -> float:
    """Weighted mean over recorded steps of the share of subsets that the target lowers."""
    plan, votes = reading.plan, []
    for t, weight in enumerate(plan.weights):
        if weight > 0:
            wins = []
            for subset in plan.subsets[t]:
                chosen = [i for i in subset if i >= 0]
                assert chosen
                sums = [sum(float(x[t, i]) for i in chosen) for x in (reading[1], reading[0])]
                wins.append(sums[0] > sums[1])
            votes.append((float(weight), np.mean(wins)))
    return float(np.average([v for _, v in votes], weights=[w for w, _ in votes]))


@pytest.mark.parametrize("name", ["sama", "sama:mlm"])
@pytest.mark.parametrize("tokens", [1, 2, 24])
@oracle("sama", "sama:mlm")
def test_sama_and_its_masked_form_against_loops(name: str, tokens: int):
    query = select([name])[0].queries(SETTINGS)["text"]
    reading = read(query.reads, tokens, seed=3)
    share = reading.plan.masks.sum(axis=1) / tokens
    limit = 0.5 if name == "sama" else 0.15
    assert share.max() <= max(limit, 1 / tokens) + 0.5 / tokens
    np.testing.assert_allclose(score(name, reading), slow_votes(reading), rtol=1e-6)
