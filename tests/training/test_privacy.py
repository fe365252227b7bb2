"""Private training: clipping and noise by a naive loop, the accountant by hand, honest resume."""

import contextlib
import dataclasses
import functools
import json
import secrets
import signal
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file

from sama_jax import rng
from sama_jax.arrays import TextKeyData
from sama_jax.cli import entry
from sama_jax.config import LoraSettings, PrivacySettings, TrainSettings
from sama_jax.errors import Interrupted, UsageError
from sama_jax.models.registry import build_model, read_config
from sama_jax.programs import finetune
from sama_jax.training import lora, privacy
from sama_jax.training.held_out import text_keys
from sama_jax.training.sequences import Tokens, pad
from sama_jax.training.step import init_state, loss_of_kind, make_optimizer, make_recipe
from sama_jax.weights import model_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:optax.global_norm:DeprecationWarning"
)  # jax_privacy
SECRET = bytes(range(32))
LENGTH = 32
SETTINGS = TrainSettings(
    epochs=4, batch_size=4, learning_rate=1e-2, max_length=LENGTH, dp=PrivacySettings(noise=2.0)
)


@functools.cache
def network() -> Any:
    family = read_config(tiny.config(), "config.json")
    return family, build_model(family, tiny.MASK_ID, np.dtype("float32"))


def random_tokens(count: int) -> list[Tokens]:
    draw = np.random.default_rng(0)
    ids = [
        draw.integers(1, 290, draw.integers(6, LENGTH + 1)).astype(np.int32) for _ in range(count)
    ]
    return [Tokens(one, np.arange(len(one)) >= 2) for one in ids]


# --- the mechanism --------------------------------------------------------------------------------


def mechanism(plan: privacy.Plan, rank: int, rows: int) -> tuple[privacy.Mechanism, Any]:
    """A mechanism over random texts, of all weights or of an adapter, and its first weights."""
    family, model = network()
    base = jax.tree.map(lambda x: 5 * x, jax.jit(model.init)(jax.random.key(1)))
    trained, layout = base, None
    if rank:
        settings = LoraSettings(r=rank, alpha=4)
        adapter = lora.plan(settings, base, family.weights, model.num_layers, "base")
        trained, layout = lora.init(adapter, jax.random.key(2)), adapter.layout
        draw = jax.random.normal(jax.random.key(3), (1000,))
        trained["lora_b"] = jax.tree.map(
            lambda x: jnp.resize(draw, x.shape) / 10, trained["lora_b"]
        )
    found = random_tokens(plan.texts)
    recipe = make_recipe(SETTINGS, plan.steps)._replace(grad_clip=np.float32(np.inf))
    made = privacy.Mechanism(
        plan, SECRET, rows, model, recipe, layout, base if rank else None,
        pad(found, LENGTH, 0), text_keys(found), 7,
    )  # fmt: skip
    return made, trained


def naive_sum(
    made: privacy.Mechanism, trained: Any, rows: Any, key: Any
) -> tuple[Any, list[float]]:
    """Clipped gradients text by text in float64, and the norms before."""
    total = jax.tree.map(lambda x: np.zeros(x.shape), trained)
    norms = []
    for row in rows:
        one = np.array([row])
        tokens, valid, learned = (
            jnp.asarray(x)
            for x in (made.padded.tokens[one], made.padded.valid(one), made.padded.learned[one])
        )
        keys = TextKeyData(made.keys.high[row], made.keys.low[row])
        mask_key = jax.random.fold_in(jax.random.fold_in(key, keys.high), keys.low)

        def loss(
            trained: Any, mask_key: Any = mask_key, given: Any = (tokens, valid, learned)
        ) -> Any:
            params = lora.beside(made.layout, made.base, trained)
            return loss_of_kind(
                made.model, params, *given[:2], mask_key, float(made.recipe.eps), given[2]
            )

        gradient = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.grad(loss)(trained))
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradient)))
        norms.append(float(norm))
        factor = min(1.0, made.plan.clip / norm)
        total = jax.tree.map(lambda t, g, f=factor: t + f * g, total, gradient)
    return total, norms


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapter"])
def test_a_step_is_that_of_a_naive_loop_over_texts(rank):
    plan = privacy.Plan(noise=1.5, clip=0.8, delta=1e-5, texts=9, batch=5, steps=10)
    made, trained = mechanism(plan, rank, rows=3)  # pieces of three, the last one filled up
    drawn = (privacy.sampled_rows(SECRET, step, plan.texts, plan.rate) for step in range(99))
    # More than one piece, and the last one filled up.
    number, rows = next((i, x) for i, x in enumerate(drawn) if len(x) > 3 and len(x) % 3)
    key = jax.random.fold_in(rng.run_key(7, rng.Purpose.TRAINING_MASKS), number)
    expected, norms = naive_sum(made, trained, rows, key)
    assert min(norms) < plan.clip < max(norms) or min(norms) > plan.clip
    sums = None
    for start in range(0, len(rows), made.rows):
        part, _ = made._piece(trained, rows[start : start + made.rows], key)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)

    noise_key = jax.random.wrap_key_data(np.frombuffer(SECRET[:8], "<u4"))
    noise_key = jax.random.fold_in(jax.random.fold_in(noise_key, rng.Purpose.NOISE), number)
    leaves, tree = jax.tree.flatten(expected)
    keys = jax.random.split(noise_key, len(leaves))
    noisy = [
        (x + plan.noise * plan.clip * np.asarray(jax.random.normal(k, x.shape), np.float64))
        / plan.batch
        for x, k in zip(leaves, keys)
    ]
    gradients = jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in noisy])
    state = init_state(trained, made.recipe)
    updates, _ = make_optimizer(made.recipe).update(gradients, state.opt_state, trained)
    wanted = optax.apply_updates(trained, updates)
    copy = init_state(jax.tree.map(jnp.array, trained), made.recipe)
    after, loss, read = made.step(copy, number)
    np.testing.assert_array_equal(read, rows)
    assert float(loss) > 0
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_one_text_moves_the_sum_by_the_norm_at_most():
    """Another text's masks stay what they were, so that nothing else moves."""
    plan = privacy.Plan(noise=1, clip=0.3, delta=1e-5, texts=6, batch=3, steps=1)
    made, trained = mechanism(plan, 2, rows=6)
    key = jax.random.key(5)
    whole, _ = made._piece(trained, np.arange(6, dtype=np.int32), key)
    for left_out in range(6):
        rest = np.array([i for i in range(6) if i != left_out], np.int32)
        without, _ = made._piece(trained, rest, key)
        gap = optax.tree.norm(jax.tree.map(jnp.subtract, whole, without))
        assert float(gap) <= plan.clip * (1 + 1e-4)
    alone, _ = made._piece(trained, np.array([2], np.int32), key)
    assert float(optax.tree.norm(alone)) == pytest.approx(plan.clip, rel=1e-4)


def test_every_text_has_a_coin_of_its_own_in_every_step():
    texts, rate, steps = 40, 0.15, 3000
    drawn = np.zeros((steps, texts))
    for step in range(steps):
        drawn[step, privacy.sampled_rows(SECRET, step, texts, rate)] = 1
    spread = (rate * (1 - rate) / steps) ** 0.5
    assert np.abs(drawn.mean(axis=0) - rate).max() < 4.5 * spread
    sizes = drawn.sum(axis=1)
    variance = texts * rate * (1 - rate)
    # The variance of a sample variance of nearly normal numbers is 2 / steps of its square.
    assert abs(sizes.var() / variance - 1) < 4.5 * (2 / steps) ** 0.5
    pairs = np.corrcoef(drawn.T)[np.triu_indices(texts, 1)]
    later = [np.corrcoef(drawn[:-1, i], drawn[1:, i])[0, 1] for i in range(texts)]
    assert np.abs([*pairs, *later]).max() < 5 / steps**0.5
    other = privacy.sampled_rows(SECRET[::-1], 0, texts, rate)
    assert not np.array_equal(other, np.flatnonzero(drawn[0]))


# --- accounting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "batch", "texts", "steps"), [(1.1, 16, 1000, 200), (3.0, 8, 40, 25), (0.6, 1, 500, 1)]
)
def test_epsilon_is_that_of_dp_accounting(noise, batch, texts, steps):
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    event = dp_accounting.PoissonSampledDpEvent(batch / texts, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(event, steps)
    found = privacy.epsilon_of(noise, batch, texts, steps, 1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def test_noise_is_the_least_that_epsilon_takes():
    noise = privacy.noise_for(0.9, 8, 100, 30, 1e-5)
    assert privacy.epsilon_of(noise, 8, 100, 30, 1e-5) <= 0.9
    assert privacy.epsilon_of(0.998 * noise, 8, 100, 30, 1e-5) > 0.9
    assert privacy.epsilon_of(noise, 8, 100, 0, 1e-5) == 0


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("private")
    tiny.folder(root / "base")
    tiny.write_texts(root / "texts.jsonl", tiny.texts(12, (8, 14)), labels=False)
    return root


def tune(root: Path, out: str, settings: TrainSettings = SETTINGS) -> dict[str, Any]:
    given = root / "base", root / "texts.jsonl", root / out, settings
    return finetune.finetune(*given, quiet=True)


def weights(path: Path) -> Any:
    return load_file(path / "model.safetensors")


def test_a_private_run_that_is_continued_tosses_the_same_coins(inputs, monkeypatch):
    monkeypatch.setattr(secrets, "token_bytes", lambda n: SECRET[:n])
    whole = tune(inputs, "whole")
    told = whole["privacy"]
    assert told["epsilon"] == privacy.epsilon_of(2.0, 4, 12, 12, 1e-5)
    assert (told["steps"], told["rate"], told["noise"]) == (12, 4 / 12, 2.0)
    assert told["unit"] == "one text, added or removed"
    monkeypatch.undo()
    sample = privacy.sampled_rows

    def stopping(secret, step, *given):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)
        return sample(secret, step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda n: SECRET[:n])
        patch.setattr(privacy, "sampled_rows", stopping)
        with pytest.raises(Interrupted, match="saved after step 7 of 12"):
            tune(inputs, "resumed")
    kept = inputs / "resumed/private"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert (kept / "secret").stat().st_mode & 0o777 == 0o600
    result = tune(inputs, "resumed")
    assert result["privacy"] == told  # not a step more
    for name, array in weights(inputs / "whole").items():
        np.testing.assert_array_equal(array, weights(inputs / "resumed")[name])
    assert not kept.exists()
    assert not (inputs / "resumed/checkpoints").exists()
    with pytest.raises(UsageError, match="belongs to another training run"):  # no more epochs
        tune(inputs, "whole", dataclasses.replace(SETTINGS, epochs=5))


def test_noise_is_not_that_of_the_seed(inputs):
    """What outputs tell does not make the noise again, and no output holds the secret."""
    settings = dataclasses.replace(SETTINGS, epochs=0.6, snapshot_every=1)
    found = []
    for name in ("first", "second"):
        tune(inputs, name, settings)
        found.append(weights(inputs / name))
        assert not list((inputs / name).rglob("secret"))
    assert any(np.any(found[0][name] != found[1][name]) for name in found[0])


def test_a_lost_secret_stops_the_run(inputs, monkeypatch):
    sample = privacy.sampled_rows

    def stopping(secret, step, *given):
        signal.raise_signal(signal.SIGTERM)
        return sample(secret, step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(privacy, "sampled_rows", stopping)
        with pytest.raises(Interrupted):
            tune(inputs, "lost")
    (inputs / "lost/private/secret").unlink()
    with pytest.raises(UsageError, match="the secret of this private training is lost"):
        tune(inputs, "lost")


def test_flags_make_a_private_adapter(inputs):
    command = ["finetune", "--base", inputs / "base", "--data", inputs / "texts.jsonl", "--quiet"]
    command += ["--out", inputs / "flags", "--epochs", 1, "--max-length", LENGTH]
    command += ["--batch-size", 4, "--accumulate", 2, "--lora", "r=2,alpha=4"]
    command += ["--dp", "epsilon=2,delta=1e-4,clip=0.5"]
    assert entry.main([str(x) for x in command]) == 0
    told = json.loads((inputs / "flags/train.json").read_text())
    private = told["result"]["privacy"]
    assert 1.9 < private["epsilon"] <= 2
    assert (private["delta"], private["clip"]) == (1e-4, 0.5)
    assert told["privacy"] == private
    assert model_folder.open_folder(inputs / "base", adapter=inputs / "flags").adapter


WRONG = {
    "epsilon=1,noise=2": "the one follows from the other",
    "noise=1,delta=0.1": "expected less than one over the number of texts",
    "noise=1,clip=0": "expected dp.clip above 0",
    "noise=-1": "must lie in",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_would_be_no_guarantee_is_one_line(given, inputs, tmp_path, capsys):
    command = ["finetune", "--base", inputs / "base", "--data", inputs / "texts.jsonl", "--quiet"]
    command += ["--out", tmp_path / "out", "--max-length", LENGTH, "--batch-size", 4, "--dp", given]
    with contextlib.suppress(SystemExit):
        assert entry.main([str(x) for x in command]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert WRONG[given] in said


def test_more_texts_in_a_step_than_there_are_and_windows_are_refused():
    with pytest.raises(UsageError, match="batch_size is 9, but there are 8 texts"):
        privacy.plan_of(PrivacySettings(noise=1), 8, 9, 10)
    with pytest.raises(UsageError, match="dp with windows"):
        dataclasses.replace(SETTINGS, windows=True)
