"""One device, pmap, and every mesh of eight devices give the same masks, losses and scores.

And what the sharding rules say: every family is covered, what they cannot split is an error.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from networks import NETWORKS

from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.core import losses
from sama_jax.devices import placement
from sama_jax.devices.mesh import make_mesh
from sama_jax.devices.placement import choose_placement
from sama_jax.devices.sharding import RULES, parameter_shardings
from sama_jax.devices.strategy import OnMesh, Replicated, local_layout
from sama_jax.engine import output_position
from sama_jax.errors import UsageError
from sama_jax.models import transformer
from sama_jax.programs import audit
from sama_jax.storage import replay
from sama_jax.texts.read import Text, Texts
from sama_jax.weights import loading, model_folder, tensor_map

LOSS_TOLERANCE = 1e-5
SETTINGS = AuditSettings(
    sama=SamaSettings(steps=2, subsets=16, subset_size=3), max_length=32, seed=5
)
MESHES = ["data=8", "data=4,model=2", "data=2,model=4", "model=8"]


@pytest.fixture(scope="module", params=[8, 2], ids=["8 kv heads", "2 kv heads"])
def models(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    wide = {
        "n_layers": 3,
        "d_model": 64,
        "n_heads": 8,
        "n_kv_heads": request.param,
        "mlp_hidden_size": 64,
        "vocab_size": 304,
        "embedding_size": 304,
    }
    return [tiny.folder(root / n, seed=s, **wide) for n, s in (("target", 1), ("reference", 2))]


@pytest.fixture(scope="module", autouse=True)
def _unchecked():
    """Without the look at what position a model reads, which compiles for every mesh: on one,
    test_multiprocess.py runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_position, "check", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def texts():
    found = tiny.texts(20, words=(3, 30))
    return [Text(f"t{i}", text, i % 2, f"memory:{i}") for i, text in enumerate(found)]


def run(folders, texts, out, **changes):
    """Plan, losses of target and reference, SAMA's scores, and the run's log."""
    job = audit.AuditJob(
        target=folders[0],
        reference=folders[1],
        texts=Texts(texts, 0, []),
        out=out,
        attacks=["sama"],
        settings=SETTINGS,
        save_plan=out.with_suffix(".plan.npz"),
        save_losses=out.with_suffix(".losses.npz"),
        quiet=True,
        **changes,
    )
    result = audit.run_audit(job)
    assert result is not None
    plan = replay.load_plan(job.save_plan, SETTINGS.max_length).plan
    with np.load(job.save_losses) as file:
        losses = {k: file[k] for k in ("target", "reference")}
    return plan, losses, np.array([row["scores"]["sama"] for row in result.rows])


@pytest.fixture(scope="module")
def expected(models, texts, tmp_path_factory):
    """On one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(placement.LOCAL, "pmap", one_device)
        return run(models, texts, tmp_path_factory.mktemp("one") / "run")


def one_device():
    return local_layout(jax.devices()[:1])


def near_ties(plan, losses) -> np.ndarray:
    """Share of a text's weighted votes whose sum the loss tolerance could turn, [texts]."""
    rows = np.arange(len(plan.subsets))[:, None, None, None]
    steps = np.arange(plan.subsets.shape[1])[None, :, None, None]
    used = plan.subsets >= 0
    at = np.maximum(plan.subsets, 0)
    target, reference = (np.where(used, x[rows, steps, at], 0) for x in losses.values())
    total = (reference - target).sum(-1)
    scale = (np.abs(reference) + np.abs(target)).sum(-1)
    close = np.abs(total) <= LOSS_TOLERANCE * scale
    weights = plan.weights / np.maximum(plan.weights.sum(-1, keepdims=True), 1e-9)
    return (close.mean(-1) * weights).sum(-1)


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_masks_losses_and_scores_do_not_depend_on_the_mesh(
    mesh, models, texts, expected, tmp_path, record_property
):
    assert jax.device_count() == 8
    how = {"parallel": "pmap"} if mesh is None else {"mesh": mesh}
    plan, losses, scores = run(models, texts, tmp_path / "run", **how)
    for a, b in zip(plan, expected[0]):
        np.testing.assert_array_equal(a, b)
    for role in ("target", "reference"):
        np.testing.assert_allclose(losses[role], expected[1][role], rtol=LOSS_TOLERANCE, atol=0)
    close = near_ties(*expected[:2])
    record_property("texts with a vote near zero", int((close > 0).sum()))
    record_property("scores that differ", int((scores != expected[2]).sum()))
    assert (close == 0).sum() >= len(texts) // 2
    np.testing.assert_allclose(scores[close == 0], expected[2][close == 0], atol=1e-6)
    assert (np.abs(scores - expected[2]) <= close + 1e-6).all()


@pytest.mark.parametrize(("mesh", "apart"), [("data=8", True), ("data=4,model=2", False)])
def test_heads_are_taken_apart_only_where_no_mesh_splits_them(
    mesh, apart, models, texts, tmp_path, monkeypatch
):
    """Taken apart on a mesh that splits them, every device would compute all heads."""
    loss_batch, seen = losses.loss_batch, []

    def watched(model, *args):
        seen.append(model.arch.heads_apart)
        return loss_batch(model, *args)

    monkeypatch.setattr(losses, "loss_batch", watched)
    run(models, texts, tmp_path / "run", mesh=mesh)
    assert seen
    assert set(seen) == {apart}


def test_models_in_turn_give_the_same_and_hold_one_at_a_time(
    models, texts, expected, tmp_path, monkeypatch
):
    held, load = [], loading.load_together

    def counted(folders, *args):
        before = sum(x.nbytes for x in jax.live_arrays() if x.nbytes > 4096)
        loaded = load(folders, *args)
        held.append((before, sum(x.nbytes for x in jax.live_arrays() if x.nbytes > 4096)))
        return loaded

    monkeypatch.setattr(loading, "load_together", counted)
    _, losses, _ = run(models, texts, tmp_path / "run", parallel="pmap", models="in-turn")
    for role in ("target", "reference"):
        np.testing.assert_allclose(losses[role], expected[1][role], rtol=LOSS_TOLERANCE, atol=0)
    (start, first), (between, second) = held
    assert first > start
    assert between == start, "the target was still held when the reference was loaded"
    assert second == first


def test_split_parameters_are_split(models):
    """Bytes a device, summed: a model axis of 8 holds about an eighth of everything."""
    folder = model_folder.open_folder(models[0])
    layout = OnMesh(make_mesh("model=8"))
    params = tensor_map.leaf_paths(loading.load(folder, layout.shardings))
    specs = {path: tuple(leaf.sharding.spec) for path, leaf in params.items()}
    assert specs["embed/embedding"] == ("model", None)
    assert specs["blocks/attn/q_proj/kernel"] == (None, None, "model")
    assert specs["last_block/attn/o_proj/kernel"] == ("model", None)
    assert specs["blocks/mlp/down_proj/kernel"] == (None, "model", None)
    whole = folder.model.arch.num_kv_heads == 2
    assert specs["blocks/attn/k_proj/kernel"] == (() if whole else (None, None, "model"))
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in params.values())
    total = sum(leaf.nbytes for leaf in params.values())
    assert local < total * (0.22 if whole else 0.14)


def test_fully_sharded_parameters_are_split_over_data_too(models, texts, expected, tmp_path):
    folder = model_folder.open_folder(models[0])
    layout = OnMesh(make_mesh("data=4,model=2"), fully_sharded=True)
    shardings = tensor_map.leaf_paths(layout.shardings(folder.abstract_params, folder.model.arch))
    assert shardings["blocks/attn/q_proj/kernel"].spec == PartitionSpec(None, "data", "model")
    assert shardings["final_norm/scale"].spec == PartitionSpec()
    how = {"mesh": "data=4,model=2", "fully_sharded": True}
    _, losses, _ = run(models, texts, tmp_path / "run", **how)
    for role in ("target", "reference"):
        np.testing.assert_allclose(losses[role], expected[1][role], rtol=LOSS_TOLERANCE, atol=0)


# --- rules ---------------------------------------------------------------------------------------


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_rules_cover_every_family(name):
    """No path without a rule; matrices of blocks and vocabulary are split, but for known ones."""
    model = NETWORKS[name]
    shapes = shapes_of(model)
    found = parameter_shardings(make_mesh("data=2,model=4"), shapes, model.arch)
    whole = {p for p, s in tensor_map.leaf_paths(found).items() if not any(s.spec)}
    matrices = {p.rpartition("blocks/")[2] for p in whole if p.endswith(("kernel", "embedding"))}
    allowed = r"(attn/[kv]_proj|\w*modulation|moe/router|time/dense_\d|head/dense)/kernel|"
    allowed += r"last_block/attn/[kv]_proj/kernel|last_block/(modulation|moe/router)/kernel|"
    allowed += r"first_blocks_0/attn/[kv]_proj/kernel|(positions|types)/embedding"
    assert all(re.fullmatch(allowed, m) for m in matrices), matrices
    grouped = model.arch.num_kv_heads == 2
    assert any("k_proj/kernel" in m for m in matrices) == grouped


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.pattern)
def test_every_rule_is_used(rule):
    paths = {p for m in NETWORKS.values() for p in tensor_map.leaf_paths(shapes_of(m))}
    paths |= {"blocks/attn/q_proj/lora_a"}
    first = {p: next(r for r in RULES if re.fullmatch(r.pattern, p)) for p in paths}
    assert rule in first.values()


def test_a_head_is_never_cut(models):
    folder = model_folder.open_folder(models[0])
    grid = make_mesh("model=8")
    model = NETWORKS["experts"]
    with pytest.raises(
        UsageError, match=r"blocks/attn/q_proj/kernel \(1, 32, 32\): num_heads 4 is"
    ):
        parameter_shardings(grid, shapes_of(model), model.arch)
    odd = dataclasses.replace(NETWORKS["llama, all biases"].arch, num_heads=8, mlp_width=60)
    model = transformer.TransformerModel(arch=odd, mask_id=1)
    with pytest.raises(UsageError, match=r"mlp/down_proj/kernel \(60, 32\): axis 0 is not div"):
        parameter_shardings(grid, shapes_of(model), odd)
    strange = {**folder.abstract_params, "strange": {"kernel": jax.ShapeDtypeStruct((8,), "f4")}}
    with pytest.raises(UsageError, match=r"strange/kernel \(8,\): no sharding rule"):
        parameter_shardings(grid, strange, folder.model.arch)


GIB = 2**30


def any_mesh(_):
    return None


@pytest.mark.parametrize(
    ("together", "one", "expected"),
    [
        (2, 1, (Replicated, 1, True)),
        (12, 6, (Replicated, 1, False)),
        (24, 12, (OnMesh, 4, True)),
        (128, 60, (OnMesh, 8, False)),
    ],
)
def test_auto_takes_the_simplest_placement_that_fits(together, one, expected):
    fit = choose_placement("auto", None, "auto", together * GIB, one * GIB, any_mesh, room=10 * GIB)
    assert (type(fit.layout), fit.layout.model_parts, fit.together) == expected


def test_nothing_fits_is_said_and_can_be_overruled():
    args = ("auto", 128 * GIB, 65 * GIB, any_mesh)
    with pytest.raises(UsageError, match=r"65\.0 GiB of parameters"):
        choose_placement("auto", None, *args, room=10 * GIB)
    fit = choose_placement("sharded", "model=8", *args, room=10 * GIB)
    assert fit.layout.mesh.shape == {"data": 1, "model": 8}
    with pytest.raises(UsageError, match="--mesh belongs to"):
        choose_placement("pmap", "model=8", *args)
