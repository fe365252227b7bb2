"""A text's score depends on the text: not on batch, order, mates, bucket, file or devices.

Masks and subsets bitwise; losses within 1e-5 relative in float32. A vote is a strict comparison, so
scores are compared where no vote's sum lies within the loss tolerance of zero.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sama_jax.arrays import ForwardBatch
from sama_jax.cli.flags import STANDARD
from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.core import losses
from sama_jax.devices import memory
from sama_jax.devices.strategy import local_layout
from sama_jax.engine import batching
from sama_jax.engine.roles import ModelRole, resident_bytes
from sama_jax.errors import ValidityError
from sama_jax.programs import audit
from sama_jax.storage import replay
from sama_jax.texts.buckets import bucket_lengths
from sama_jax.texts.read import Text, Texts, read_texts
from sama_jax.weights import loading, model_folder

LOSS_TOLERANCE = 1e-5
SETTINGS = AuditSettings(
    sama=SamaSettings(steps=4, subsets=16, subset_size=3), max_length=64, seed=3
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("invariance")
    wide = {"n_layers": 2, "d_model": 32, "mlp_hidden_size": 48}
    return (
        tiny.folder(root / "target", seed=1, **wide),
        tiny.folder(root / "reference", seed=2, **wide),
    )


@pytest.fixture(scope="module")
def texts():
    return [
        Text(f"t{i}", text, i % 2, f"memory:{i}")
        for i, text in enumerate(tiny.texts(24, words=(2, 40)))
    ]


def run(models, texts, out, **changes):
    """Rows by id, losses by id, and the replayed plan of an audit."""
    job = audit.AuditJob(
        target=models[0],
        reference=models[1],
        texts=Texts(texts, 0, []),
        out=out / "run",
        attacks=STANDARD.split(","),
        settings=SETTINGS,
        save_plan=out / "plan.npz",
        save_losses=out / "losses.npz",
        include_votes=True,
        quiet=True,
    )
    result = audit.run_audit(dataclasses.replace(job, **changes))
    assert result is not None
    plan = replay.load_plan(out / "plan.npz", SETTINGS.max_length)
    with np.load(out / "losses.npz") as file:
        stored = {k: file[k] for k in file.files}
    return {
        name: (result.rows[i], jax.tree.map(lambda x, i=i: x[i], plan.plan), stored["target"][i],
               stored["reference"][i])
        for i, name in enumerate(plan.ids)
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected(models, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected")
    found = run(models, texts, out)
    assert buckets_of(out) == {"64"}  # one more program does not pay
    return found


def buckets_of(out: Path) -> set[str]:
    """Padded lengths of a run."""
    log = read_lines(out / "run" / "log.jsonl")
    return set(next(e["texts"] for e in log if e["event"] == "buckets"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def near_ties(plan, target, reference) -> bool:
    """Whether some vote's sum is so close to zero that the loss tolerance could turn it."""
    for t, subsets in enumerate(plan.subsets):
        for subset in subsets:
            used = subset[subset >= 0]
            total = reference[t, used].sum() - target[t, used].sum()
            scale = np.abs(reference[t, used]).sum() + np.abs(target[t, used]).sum()
            if abs(total) <= LOSS_TOLERANCE * scale:
                return True
    return False


def assert_same(actual, expected):
    assert actual.keys() <= expected.keys()
    compared = 0
    for name, (row, plan, target, reference) in actual.items():
        other_row, other_plan, other_target, other_reference = expected[name]
        for a, b in zip(plan, other_plan):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(target, other_target, rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(reference, other_reference, rtol=LOSS_TOLERANCE)
        for attack, score in row["scores"].items():
            if attack != "sama":
                assert score == pytest.approx(other_row["scores"][attack], rel=1e-4)
            elif not near_ties(plan, target, reference):
                assert score == pytest.approx(other_row["scores"]["sama"], abs=1e-6)
                compared += 1
    # Models with random weights differ little, so about one text in four has such a vote.
    assert compared >= len(actual) // 2


@pytest.mark.parametrize("rows", [1, 8])
def test_scores_do_not_depend_on_batch_size(rows, models, texts, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "bucket_lengths", lambda max_length: (max_length,))
    assert_same(run(models, texts, tmp_path, batch_size=rows), expected)


def test_scores_do_not_depend_on_order(models, texts, expected, tmp_path):
    shuffled = random.Random(1).sample(texts, len(texts))
    actual = run(models, shuffled, tmp_path)
    assert list(actual) == [t.id for t in shuffled]
    assert_same(actual, expected)


def test_scores_do_not_depend_on_batch_mates(models, texts, expected, tmp_path):
    others = [Text(f"o{i}", t, None, "") for i, t in enumerate(tiny.texts(9, seed=5))]
    mixed = others[:4] + texts[5:11] + others[4:]
    actual = run(models, mixed, tmp_path)
    assert_same({t.id: actual[t.id] for t in texts[5:11]}, expected)


def test_scores_do_not_depend_on_the_file(models, texts, expected, tmp_path):
    """A file with fewer texts, under other ids."""
    file, some = tmp_path / "texts.jsonl", texts[3:9]
    file.write_text("".join(json.dumps({"text": t.text, "id": f"x-{t.id}"}) + "\n" for t in some))
    actual = run(models, read_texts(file).texts, tmp_path)
    assert_same({t.id: actual[f"x-{t.id}"] for t in some}, expected)


def test_scores_do_not_depend_on_the_bucket(models, texts, expected, tmp_path, monkeypatch):
    """Batches of 8 texts fill two buckets, and the longer one holds all that is expected."""
    monkeypatch.setattr(batching, "PROGRAM_FLOPS", {"cpu": 0.0})
    found = run(models, texts, tmp_path, batch_size=1)
    assert buckets_of(tmp_path) == {"32", "64"}
    assert_same(found, expected)


def test_scores_do_not_depend_on_devices(models, texts, expected, tmp_path):
    """This process has 8 CPU devices; the other one has 1."""
    assert jax.device_count() == 8
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t.text, "id": t.id}) + "\n" for t in texts))
    flags = ["--set", "sama.steps=4", "--set", "sama.subsets=16", "--set", "sama.subset_size=3"]
    command = [
        sys.executable, "-m", "sama_jax", "audit", "--target", models[0], "--reference", models[1],
        "--data", file, "--out", tmp_path / "run", "--max-length", 64, "--seed", 3, *flags,
        "--save-plan", tmp_path / "plan.npz", "--save-losses", tmp_path / "losses.npz", "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run([str(c) for c in command], check=True, env=environment, timeout=300)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["device"].startswith("1 x ")
    rows = read_lines(tmp_path / "run" / "scores.jsonl")
    plan = replay.load_plan(tmp_path / "plan.npz", 64)
    with np.load(tmp_path / "losses.npz") as stored:
        actual = {
            name: (rows[i], jax.tree.map(lambda x, i=i: x[i], plan.plan),
                   stored["target"][i], stored["reference"][i])
            for i, name in enumerate(plan.ids)
        }  # fmt: skip
    assert_same(actual, expected)


def test_identical_models_score_zero_or_one_half(models, texts, tmp_path):
    same = (models[0], tiny.same_weights(models[0], tmp_path / "copy"))
    for ties, score in (("zero", 0.0), ("half", 0.5)):
        sama = dataclasses.replace(SETTINGS.sama, ties=ties)
        settings = dataclasses.replace(SETTINGS, sama=sama)
        (tmp_path / ties).mkdir()
        with pytest.raises(ValidityError, match=r"same_losses: .* same loss at 100"):
            run(same, texts[:6], tmp_path / ties, settings=settings)
        rows = read_lines(tmp_path / ties / "run" / "scores.jsonl")
        assert {row["scores"]["sama"] for row in rows} == {score}
        assert {row["scores"]["ratio"] for row in rows} == {-1.0}


def test_one_model_in_both_roles_is_void(models, texts, tmp_path):
    copy = Path(shutil.copytree(models[0], tmp_path / "copy"))
    with pytest.raises(ValidityError, match="target and reference are the same model"):
        run((models[0], copy), texts[:6], tmp_path)
    assert not (tmp_path / "run").exists()


def test_swapping_the_models_gives_one_minus_the_score(models, texts, expected, tmp_path):
    swapped = run(models[::-1], texts[:8], tmp_path)
    for name, (row, *_) in swapped.items():
        tied = row["votes"]["tie_rate"]
        both = row["scores"]["sama"] + expected[name][0]["scores"]["sama"]
        assert both == pytest.approx(1 - tied, abs=1e-6)


def test_a_replayed_plan_gives_the_same_scores(models, texts, expected, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    run(models, texts[:8], first)
    actual = run(models, texts[:8], tmp_path, plan=first / "plan.npz")
    assert_same(actual, expected)


def test_visible_padding_changes_losses_and_hidden_padding_does_not(models, texts, tmp_path):
    settings = dataclasses.replace(SETTINGS, padding="visible", pad_to=64)
    (tmp_path / "a").mkdir()
    visible = run(models, texts[:6], tmp_path / "a", settings=settings)
    (tmp_path / "b").mkdir()
    hidden = run(models, texts[:6], tmp_path / "b")
    name = min(hidden, key=lambda n: hidden[n][0]["n_tokens"])
    for a, b in zip(visible[name][1], hidden[name][1]):
        np.testing.assert_array_equal(a, b)
    assert np.nanmax(np.abs(visible[name][2] - hidden[name][2])) > 1e-3


def batch_shapes(folders, layout, room: int) -> batching.BatchShapes:
    roles = [ModelRole(n, f, n) for n, f in zip(("target", "reference"), folders)]
    resident, context = resident_bytes(roles, layout), folders[0].max_length
    return batching.BatchShapes(folders[0].model, context, SETTINGS, layout, resident, room)


def test_a_bucket_pays_if_it_saves_what_its_program_costs(models):
    """On 8 devices, for both models' passes."""
    folders = [model_folder.open_folder(path, dtype="float32") for path in models]
    shapes = batch_shapes(folders, local_layout(), 2**30)
    model, passes = folders[0].model, SETTINGS.sama.steps
    saved = model.flops_per_text(48, 0.0) - model.flops_per_text(32, 0.0)
    cost = batching.PROGRAM_FLOPS["cpu"] * jax.device_count()
    enough = int(np.ceil(cost / (2 * passes * saved)))
    assert shapes.pays(enough, 32, 48)
    assert not shapes.pays(enough - 1, 32, 48)


def test_rows_shrink_to_what_fits_beside_the_models(models):
    """Rows by the closed form; every one of them fits, one more would not, and one always runs."""
    folders = [model_folder.open_folder(path, dtype="float32") for path in models]
    layout = local_layout(jax.devices()[:1])

    def rows_of_a_batch(room: int) -> int:
        return batch_shapes(folders, layout, room).rows(64)

    assert rows_of_a_batch(2**40) == 24  # 1,536 tokens
    parameters = batch_shapes(folders, layout, 2**40).parameter_bytes
    assert parameters == 2 * 4 * folders[0].num_params
    # Up to 8, whose plans are drawn at once, any number; above, its multiples.
    for rows, fewer in ((1, 1), (2, 1), (3, 2), (8, 7), (16, 8), (24, 16)):
        shape, model = memory.BatchShape(rows, 64, 64), folders[0].model
        found = memory.footprint(model.arch, model.dtype, shape, parameters)
        room = int((parameters + found.inputs + 1.15 * found.temporaries.peak) / 0.96) + 2
        assert memory.fits(found, room)
        assert not memory.fits(found, room - 8)
        assert rows_of_a_batch(room) == rows
        assert rows_of_a_batch(room - 8) == fewer
    assert rows_of_a_batch(1) == 1


def test_at_most_two_programs_a_bucket(tmp_path, record_property):
    """1,000 texts of mixed length, all plans: one program a bucket serves plans and models."""
    # A network of its own, so that no other test has compiled its programs already.
    models = [tiny.folder(tmp_path / f"{i}", seed=i, d_model=24) for i in range(2)]
    texts = [Text(f"t{i}", t, None, "") for i, t in enumerate(tiny.texts(1000, words=(1, 60)))]
    settings = dataclasses.replace(SETTINGS, sama=SamaSettings(steps=3, subsets=4, subset_size=2))
    traces = []
    traced = losses.loss_batch

    def counted(*args):
        traces.append(args[3].tokens.shape)
        return traced(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "loss_batch", counted)
        patch.setattr(batching, "PROGRAM_FLOPS", {"cpu": 0.0})
        with pytest.raises(ValidityError, match="target_learnt: "):  # they are random
            run(models, texts, tmp_path, settings=settings, batch_size=8)
    log = read_lines(tmp_path / "run" / "log.jsonl")
    used = next(e["texts"] for e in log if e["event"] == "buckets")
    assert {int(length) for length in used} == set(bucket_lengths(64))
    assert sum(used.values()) == 1000
    record_property("programs", f"{len(traces)} programs for {len(used)} buckets: {used}")
    assert 0 < len(traces) <= 2 * len(used)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["cost"]["programs"] == len(traces)


def test_only_scored_slots_reach_the_vocabulary(models):
    """The compiled scorer holds no array of [rows, length, vocabulary] or larger."""
    folder = model_folder.open_folder(models[0])
    model = dataclasses.replace(folder.model)
    params = loading.load(folder, local_layout(jax.devices()[:1]).shardings)
    t, b, length, slots = 2, 4, 64, 8
    batch = ForwardBatch(
        tokens=np.zeros((b, length), np.int32),
        valid=np.ones((b, length), bool),
        masks=np.zeros((t, b, length), bool),
        positions=np.zeros((t, b, slots), np.int32),
        group=np.zeros(t, np.int32),
        passes=np.int32(t),  # pyright: ignore
    )
    text = jax.jit(partial(losses.loss_batch, model, (slots,))).lower(params, batch).as_text()
    assert f"{b * slots}x{model.vocab_size}xf32" in text
    assert f"{b}x{length}x{model.vocab_size}" not in text
    assert f"{b * length}x{model.vocab_size}" not in text


def test_the_head_in_chunks_gives_the_same_losses(models, monkeypatch):
    folder = model_folder.open_folder(models[0])
    model = folder.model
    params = loading.load(folder, local_layout(jax.devices()[:1]).shardings)
    hidden = jax.random.normal(jax.random.key(0), (37, model.arch.width))
    targets = jax.random.randint(jax.random.key(1), (37,), 0, model.vocab_size)
    whole = losses.token_nll(model, params, hidden, targets)
    monkeypatch.setattr(losses, "HEAD_BYTES", 4 * model.vocab_size * 5)
    chunked = losses.token_nll(model, params, hidden, targets)
    np.testing.assert_allclose(whole, chunked, rtol=1e-6)


def test_a_shifted_model_reads_the_output_before(models):
    folder = model_folder.open_folder(models[0])
    plain = folder.model
    shifted = dataclasses.replace(plain, shift=True)
    params = loading.load(folder, local_layout(jax.devices()[:1]).shardings)
    tokens = jnp.arange(10, 22, dtype=jnp.int32)[None]
    valid, positions = jnp.ones((1, 12), bool), jnp.array([[0, 1, 5, -1]], jnp.int32)
    stream = plain.trunk(params, tokens, valid)
    out = np.asarray(losses.scored_nll(shifted, params, tokens, valid, stream, positions))
    logits = plain.logits(params, plain.hidden(params, tokens, valid))
    nll = -np.asarray(jax.nn.log_softmax(logits, axis=-1))[0]
    np.testing.assert_allclose(
        out[0, :3], [nll[0, tokens[0, 0]], nll[0, tokens[0, 1]], nll[4, tokens[0, 5]]], rtol=1e-5
    )
    assert np.isnan(out[0, 3])
