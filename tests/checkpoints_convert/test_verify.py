"""`checkpoints_convert verify`: side by side, as a file of losses, and a whole audit replayed."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_dit
import pytest
import tiny
import torch
import transformers
from both_sides import (
    GROUPED,
    LLADA,
    MASK_ID,
    Audit,
    add_tokenizer,
    change,
    load_oracle,
    make_folder,
    perturbed,
    run,
)
from safetensors.torch import load_file, save_file

from checkpoints_convert.verify import exchange, live, ours, plan
from sama_jax.arrays import ProbePlan
from sama_jax.engine import output_position
from sama_jax.errors import DataError, ModelError, SamaError, UsageError
from sama_jax.models.registry import build_model, read_config
from sama_jax.models.stages import stages
from sama_jax.models.transformer import Architecture, TransformerModel
from sama_jax.programs import bench
from sama_jax.programs.bench import torch_reference
from sama_jax.storage import replay
from sama_jax.weights import model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of plain LLaDA with a tokenizer."""
    path = tmp_path_factory.mktemp("llada")
    oracle.random_folder(path, LLADA, 0)
    return add_tokenizer(path)


# --- side by side ---------------------------------------------------------------------------------


def table(out: str) -> dict[str, list[float]]:
    """The printed numbers of each stage: both errors, ours in its noise, what is allowed."""
    rows = re.findall(r"^│ (\S+(?: \S+)?) +│((?: +\S+ +│){4})", out, re.M)
    return {stage: [float(v) for v in numbers.split("│")[:4]] for stage, numbers in rows}


@pytest.mark.parametrize("family", ["llada", "dream", "lladamoe", "bert", "roberta", "modernbert"])
def test_every_pytorch_side_agrees_block_by_block(tmp_path, capsys, monkeypatch, family):
    monkeypatch.setattr(output_position, "check", lambda *_: None)  # another program to compile
    assert run(make_folder(tmp_path / "model", family)) == 0
    out = capsys.readouterr().out
    found = table(out)
    norm = [] if "bert" in family and family != "modernbert" else ["final norm"]
    assert list(found) == ["embedding", "block 1", "block 2", "block 3", *norm, "logits", "losses"]
    assert all(theirs < 1e-5 and mine < 1e-5 for theirs, mine, *_ in found.values())
    assert any(theirs > 1e-8 for theirs, *_ in found.values()), "that was not float64"
    assert all(noises < 8 for *_, noises, _ in found.values())
    assert "no float64" not in out
    assert "verdict, float32: equal" in out
    assert "random" not in out, "the built-in text was not used"


def test_a_network_that_reads_the_text_without_masks_too_is_verified_in_blocks(tmp_path, capsys):
    folder = make_folder(tmp_path / "model", "dream")
    config = json.loads((folder / "config.json").read_text()) | {"attention_mask": "clean:8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "verdict, float32: equal" in out


def test_other_families_of_decoders_have_a_class_and_see_what_their_kind_sees():
    for name in set(torch_reference.SAME_MATHS.values()) - {"Bert", "Roberta", "ModernBert"}:
        assert hasattr(transformers, f"{name}ForCausalLM")
    lowest = torch.finfo(torch.float32).min
    for block, seen in (
        (None, np.ones((4, 4))),
        (1, np.tri(4)),
        (2, np.kron(np.tri(2), np.ones((2, 2)))),
    ):
        mask = torch_reference.seen_scores(4, block, torch.float32)
        np.testing.assert_array_equal(mask[0, 0].numpy(), np.where(seen, 0, lowest))


def test_first_block_that_differs_is_named(folder, tmp_path, capsys, monkeypatch):
    """PyTorch reads a copy with another third block: what comes before is equal."""
    other = perturbed(folder, tmp_path / "other", r"blocks\.2\.")
    real = torch_reference.open_reference

    def open_other(wanted, **flags):
        return real(wanted._replace(path=other), **flags)

    monkeypatch.setattr(torch_reference, "open_reference", open_other)
    assert run(folder) == ours.PARITY == 6
    out = capsys.readouterr().out
    assert "DIFFERENT; the first stage that differs is block 3 " in out
    assert out.count("DIFFERS") == 2  # block 3 and losses: what is between reads the same


def test_stored_bfloat16_is_compared_too(tmp_path, capsys):
    oracle.random_folder(tmp_path, LLADA, 1, dtype=torch.bfloat16)
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "verdict, float32: equal" in out
    assert "verdict, bfloat16: equal" in out
    assert "random token ids take the place of texts" in out
    single, half = (table(part) for part in out.split("verdict, float32"))
    # What bfloat16 rounds is thousands of times what float32 does, on both sides alike.
    for stage, side in itertools.product(("block 3", "logits"), (0, 1)):
        assert half[stage][side] > 1e3 * single[stage][side]
    assert all(noises < 32 for *_, noises, _ in half.values())
    assert half["losses"][3] == 2


def test_texts_of_ones_own_and_padding_are_read(folder, tmp_path):
    texts = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(5, words=(6, 30)))
    opened = model_folder.open_folder(folder, dtype="float32")
    inputs = live.make_inputs(opened, texts)
    lengths = inputs.valid.sum(axis=1)
    assert len(inputs.tokens) == 5
    assert lengths[4] == lengths[0] // 2
    assert len(set(lengths)) > 2
    assert inputs.masks.any(axis=1).all()
    assert not (inputs.masks & ~inputs.valid).any()


def test_family_without_a_pytorch_side_is_refused_by_name(tmp_path):
    oracle_dit.random_folder(tmp_path, oracle_dit.mdlm_config(), 0, shards=1)
    with pytest.raises(ModelError, match=r"family mdlm; .*--trust-remote-code.*--against"):
        run(tmp_path)


def test_quantised_weights_are_not_for_pytorch(tmp_path):
    wanted = torch_reference.Wanted(tmp_path, {"quantization_config": {"bits": 4}}, 1, None, "")
    with pytest.raises(ModelError, match=r"quantised.*; verify the folder that `to-hf`"):
        torch_reference.open_reference(wanted)


def test_parameters_that_orbax_keeps_are_not_for_pytorch(tmp_path):
    (tmp_path / "orbax").mkdir()
    wanted = torch_reference.Wanted(tmp_path, oracle.config(), 3, None, "float32")
    with pytest.raises(ModelError, match=r"kept by Orbax.*to-hf"):
        torch_reference.open_reference(wanted)


REMOTE = """
import pathlib, torch, transformers, oracle

class TinyConfig(transformers.PretrainedConfig):
    model_type = "llada"

class TinyModel(transformers.PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = oracle.Llada(RAW).model
        self.post_init()

    def forward(self, input_ids, **_):
        stand_in = oracle.Llada.__new__(oracle.Llada)
        torch.nn.Module.__init__(stand_in)
        stand_in.c, stand_in.model = RAW, self.model
        return transformers.modeling_outputs.MaskedLMOutput(logits=stand_in(input_ids)[0])

pathlib.Path(MARKER).write_text("ran")
"""


def test_folders_own_code_runs_only_if_told_so(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    path, marker = perturbed(folder, tmp_path / "remote", "wte", 0.0), tmp_path / "marker"
    config = json.loads((path / "config.json").read_text())
    names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    (path / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    code = REMOTE.replace("RAW", repr(LLADA)).replace("MARKER", repr(str(marker)))
    (path / "modeling_tiny.py").write_text(code)
    assert run(path) == 0
    assert not marker.exists()
    assert run(path, "--trust-remote-code") == 0
    assert marker.exists()
    out = capsys.readouterr().out
    assert "TinyModel, the folder's own" in out
    assert out.count("block 3") == 2
    (path / "modeling_tiny.py").write_text(code.replace("stand_in(input_ids)", "nothing"))
    with pytest.raises(ModelError, match=r"cannot run \(name 'nothing' is not defined\)"):
        run(path, "--trust-remote-code")


def write_adapter(path: Path, seed: int) -> Path:
    """Plain LoRA on the queries of all blocks."""
    tensors = {}
    for i in range(3):
        name = f"base_model.model.model.transformer.blocks.{i}.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 48, generator=torch.manual_seed(seed + i))
        tensors[f"{name}.lora_B.weight"] = torch.randn(48, 4, generator=torch.manual_seed(9 + i))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["q_proj"]}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_lora_adapters_are_on_both_sides(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(output_position, "check", lambda *_: None)
    first, second = (write_adapter(tmp_path / str(seed), seed) for seed in (0, 50))
    both = ("--adapter", first, "--adapter", second)
    assert run(folder, *both) == 0
    saved = tmp_path / "losses.npz"
    assert run(folder, *both, "--dump", saved) == 0
    assert run(folder, *both, "--against", saved) == 0
    for other in (), both[:2], both[2:]:  # the base's losses, and those of one adapter alone
        assert run(folder, *other, "--against", saved) == 6
    with pytest.raises(ModelError, match="has no adapter_config"):
        run(folder, "--adapter", first, "--adapter", folder)


def test_without_pytorch_one_line_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "sama_jax.programs.bench.torch_reference")
    monkeypatch.delattr(bench, "torch_reference")
    with pytest.raises(UsageError, match=r"pip install 'sama-jax\[verify\]'") as error:
        run(folder)
    assert "\n" not in str(error.value)
    assert run(folder, "--dump", tmp_path / "d.npz") == 0  # needs none
    assert run(folder, "--against", tmp_path / "d.npz") == 0


# --- stages ---------------------------------------------------------------------------------------


def other_families() -> dict[str, dict[str, Any]]:
    """Configs of networks that have no PyTorch side, or blocks of several kinds."""
    return {
        "mdlm": oracle_dit.mdlm_config(),
        "llada2": {
            "model_type": "llada2_moe",
            "architectures": ["LLaDA2MoeModelLM"],
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    }


def random_params(model: Any, seed: int, spread: float = 1.0) -> Any:
    """Matrices that keep an input's size, vectors around 1."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return spread * noise / leaf.shape[-2] ** 0.5 if leaf.ndim > 1 else 1 + 0.2 * noise

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize("family", ["mdlm", "llada2"])
def test_blocks_one_by_one_are_the_scanned_network(family):
    read = read_config(other_families()[family], family)
    model: Any = build_model(read, MASK_ID, jnp.float32)
    # As `verify` reads it: one copy of the text, not a clean one beside the masked one.
    model = dataclasses.replace(model, arch=dataclasses.replace(model.arch, clean_context=False))
    params = random_params(model, 0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 12)), jnp.int32)
    valid = jnp.arange(12)[None] < jnp.array([[12], [7]])
    found = dict(stages(model, params, tokens, valid))

    @jax.jit
    def both(params: Any, tokens: Any, valid: Any) -> Any:
        entered = model.trunk(params, tokens, valid)
        at = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
        return entered, model.last_hidden(params, entered, valid, at)

    assert list(found) == ["embedding", "block 1", "block 2", "block 3", "final norm"]
    entered, final = both(params, tokens, valid)
    stream = entered[0] if isinstance(entered, tuple) else entered
    np.testing.assert_allclose(found["block 2"], stream, rtol=0, atol=1e-6)
    assert np.abs(found["block 3"] - stream).max() > 1e-4
    np.testing.assert_allclose(found["final norm"], final, rtol=0, atol=1e-5)


# --- losses as a file -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dump(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "d.npz"
    assert run(folder, "--dump", path) == 0
    return path


def test_dump_holds_the_losses_that_pytorch_computes(dump, folder, capsys):
    found = np.load(dump, allow_pickle=False)
    module = oracle.random_module(LLADA, 0)
    read = np.where(found["mask"], MASK_ID, found["ids"])
    logits, _ = module(torch.from_numpy(read).long(), torch.from_numpy(found["key_valid"]))
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.from_numpy(found["ids"]).long(), reduction="none"
    )
    keep = found["key_valid"]
    assert not keep.all()
    np.testing.assert_allclose(found["nll"][keep], expected.numpy()[keep], rtol=0, atol=1e-5)
    assert run(folder, "--against", dump) == 0
    assert "largest difference 0 nats" in capsys.readouterr().out


def test_one_other_loss_is_found_and_named(dump, folder, tmp_path, capsys):
    found = np.load(dump, allow_pickle=False)
    row, place = np.argwhere(found["mask"])[5]
    nll = found["nll"].copy()
    nll[row, place] += 2e-4
    assert run(folder, "--against", change(dump, tmp_path / "x.npz", nll=nll)) == 6
    assert f"DIFFERENT; row {row}, position {place}, " in capsys.readouterr().out
    nll[row, place] -= 1.5e-4  # within the tolerance
    assert run(folder, "--against", change(dump, tmp_path / "x.npz", nll=nll)) == 0
    nll = np.where(found["mask"], found["nll"], np.nan)  # unmasked positions do not count
    assert run(folder, "--against", change(dump, tmp_path / "x.npz", nll=nll)) == 0


def test_in_bfloat16_losses_must_also_keep_their_order(dump, folder, tmp_path, monkeypatch):
    """Losses so close together that all of them are within the tolerance of one another."""
    found = np.load(dump, allow_pickle=False)
    rng = np.random.default_rng(0)
    here = (1 + 0.02 * rng.random(found["nll"].shape)).astype(np.float32)
    monkeypatch.setattr(exchange, "token_losses", lambda *_: here)
    near = here + np.float32(1e-4) * rng.standard_normal(here.shape).astype(np.float32)
    for nll, code in ((near, 0), (rng.permuted(here, axis=1), 6)):
        path = change(dump, tmp_path / "x.npz", nll=nll)
        assert run(folder, "--against", path, "--dtype", "bfloat16") == code


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no_nll": ({"nll": None}, "holds no nll"),
    "float_ids": ({"ids": np.zeros((5, 32))}, "ids holds float64"),
    "shape": ({"mask": np.ones((5, 3), bool)}, r"mask has shape \[5, 3\]"),
    "nothing_masked": ({"mask": np.zeros((5, 32), bool)}, "masks no valid position"),
    "nan": ({"nll": np.full((5, 32), np.nan, np.float32)}, "not finite"),
    "large_id": ({"ids": np.full((5, 32), 300, np.int32)}, "ids hold 300.* rows 0 to 299"),
    "pickle": ({"ids": np.array([{}], object)}, "ids holds object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unusable_files_are_one_line(dump, folder, tmp_path, case):
    arrays, message = BROKEN[case]
    assert np.load(dump)["ids"].shape == (5, 32)
    with pytest.raises(DataError, match=message) as error:
        run(folder, "--against", change(dump, tmp_path / "x.npz", **arrays))
    assert "\n" not in str(error.value)


def test_a_file_that_unpacks_to_gigabytes_and_a_pipe_are_one_line(dump, folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (30_000, 30_000)}
        np.lib.format.write_array_header_1_0(header, shape)
        for name in ("ids", "mask", "nll"):
            archive.writestr(f"{name}.npy", header.getvalue())
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("bomb.npz", "pipe.npz"):
        with pytest.raises(DataError, match="not a file of losses"):
            run(folder, "--against", tmp_path / name)


def test_losses_that_are_no_numbers_are_not_written(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "ln_f" in name)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="losses are not finite"):
        run(broken, "--dump", tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_truncated_and_missing_files_are_one_line(dump, folder, tmp_path):
    (tmp_path / "x.npz").write_bytes(dump.read_bytes()[:200])
    for path in (tmp_path / "x.npz", tmp_path / "none.npz"):
        with pytest.raises(DataError, match="not a file of losses"):
            run(folder, "--against", path)


@pytest.mark.parametrize(
    "flags",
    [
        ("--plan", "p.npz"),
        ("--plan", "p.npz", "--losses", "l.npz"),
        ("--losses", "l.npz"),
        ("--against", "a.npz", "--reference", "d"),
        ("--dump", "a.npz", "--trust-remote-code"),
    ],
)
def test_flags_that_do_not_go_together(flags):
    with pytest.raises(UsageError):
        run("nowhere", *flags)


# --- a whole audit --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return Audit(tmp_path_factory.mktemp("audit"), "llada", load_oracle)


def test_script_for_bert_gives_the_verdict_equal(tmp_path, capsys):
    """transformers' auto class loads it, and gives its hidden states."""
    made = Audit(tmp_path, "bert")
    assert np.load(made.losses)["target_states"].shape == (4, 4, 48)
    assert made.verify() == 0
    other = perturbed(made.reference, tmp_path / "other", r"layer\.0\.")
    assert made.verify(reference=other) == 6
    assert "reference: the first stage that differs is block 1 (" in capsys.readouterr().out


def test_plan_of_the_script_replays_with_equal_scores(audit, capsys):
    assert audit.verify() == 0
    out = capsys.readouterr().out
    assert "verdict: equal within 0.0001, every flip explained" in out
    assert float(re.findall(r"scores: largest difference (\S+)", out)[0]) < 1e-6
    probes = replay.load_plan(audit.plan, 64)  # what `audit --plan` reads
    masks = np.asarray(probes.plan.masks)
    assert (masks[:, :-1] <= masks[:, 1:]).all()
    counts = masks.sum(axis=-1)
    assert (counts[:, -1] == [max(1, round(0.5 * n)) for n in (probes.tokens >= 0).sum(1)]).all()
    for i, t in np.ndindex(counts.shape):
        drawn = np.asarray(probes.plan.subsets)[i, t]
        assert ((drawn >= 0).sum(axis=-1) == min(10, counts[i, t])).all()
        for subset in drawn:
            used = subset[subset >= 0]
            assert len(set(used)) == len(used)
            assert masks[i, t, used].all()


def test_another_block_is_named_from_the_scripts_file_alone(audit, tmp_path, capsys):
    """PyTorch does not run here: the saved states tell."""
    other = perturbed(audit.target, tmp_path / "other", r"blocks\.1\.")
    assert audit.verify(target=other) == 6
    out = capsys.readouterr().out
    assert "target: the first stage that differs is block 2 (" in out
    assert "reference: the" not in out
    assert "verdict: DIFFERENT" in out


def test_without_saved_states_the_message_says_how_to_find_the_block(audit, tmp_path, capsys):
    other = perturbed(audit.target, tmp_path / "other", r"blocks\.1\.")
    names = ("state_at", "target_states", "reference_states")
    bare = change(audit.losses, tmp_path / "bare.npz", **dict.fromkeys(names))
    assert audit.verify(losses=bare) == 0
    assert audit.verify(target=other, losses=bare) == 6
    assert f"or run `verify {other}`" in capsys.readouterr().out


def test_other_vocabulary_head_is_behind_the_blocks(audit, tmp_path, capsys):
    other = perturbed(audit.target, tmp_path / "other", r"transformer\.ff_out")
    assert audit.verify(target=other) == 6
    assert "target: all blocks agree, so the difference is behind them" in capsys.readouterr().out


def test_flips_are_explained_by_sums_near_zero_only():
    """Two tokens, three subsets: sums of 1e-5, 1 and -1 nats on our side."""
    subsets = np.array([[[[0, -1], [1, -1], [2, -1]]]])
    probes = replay.Replay(
        ["a"],
        np.zeros((1, 3), np.int32),
        ProbePlan(
            np.ones((1, 1, 3), bool),
            np.ones((1, 1, 3), bool),
            np.ones((1, 1), np.float32),
            subsets,
        ),
        "",
    )
    target = np.zeros((1, 1, 3), np.float32)

    def side(*sums: float) -> dict[str, np.ndarray]:
        return {"target": target, "reference": np.array([[sums]], np.float32)}

    here = side(1e-5, 1, -1)
    same = plan.count_flips(probes, here, side(2e-5, 1, -1), 1e-4)
    assert same[:3] == (0, 3, 0)
    near = plan.count_flips(probes, here, side(-1e-5, 1, -1), 1e-4)
    assert near[:3] == (1, 3, 0)
    assert near.largest == pytest.approx(1e-5)
    far = plan.count_flips(probes, here, side(-1e-5, -1, 1), 1e-4)
    assert far[:3] == (3, 3, 2)
    assert far.largest == 1


def test_losses_of_another_plan_are_refused(audit, tmp_path):
    found = np.load(audit.losses)
    cases = {
        "has no losses of text": {"ids": np.array(["x", "y", "z"])},
        "has shape": {"target": found["target"][:, :2]},
        "no finite loss": {"target": np.full_like(found["target"], np.nan)},
        "state_at must hold": {"state_at": found["state_at"] + 99},
        "not a losses file": {"reference": None},
    }
    for message, arrays in cases.items():
        with pytest.raises(DataError, match=message):
            audit.verify(losses=change(audit.losses, tmp_path / "x.npz", **arrays))
    masks = ~np.load(audit.plan)["masks"]
    with pytest.raises(DataError, match="masks reach beyond its tokens"):
        audit.verify(plan=change(audit.plan, tmp_path / "p.npz", masks=masks))


def test_texts_of_the_losses_may_stand_in_another_order(audit, tmp_path):
    found = dict(np.load(audit.losses))
    arrays = {n: found[n][::-1] for n in ("ids", "target", "reference")}
    at = found["state_at"].copy()
    at[:, 0] = 2 - at[:, 0]
    turned = change(audit.losses, tmp_path / "x.npz", **arrays, state_at=at)
    assert audit.verify(losses=turned) == 0
    other = perturbed(audit.target, tmp_path / "other", r"blocks\.1\.")
    probes = replay.load_plan(audit.plan)
    straight, back = (replay.load_losses(p, probes) for p in (audit.losses, turned))
    np.testing.assert_array_equal(straight.state_at, back.state_at)
    assert audit.verify(target=other, losses=turned) == 6


# --- the alignment of outputs ---------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(0, 60, 120).astype(np.int32)
ROWS = 64


def one_layer(shift: bool, kind: Any = "diffusion") -> TransformerModel:
    arch = Architecture(
        vocab_size=ROWS,
        width=ROWS,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_size=32,
        mlp_width=16,
        tied=False,
        norm_eps=1e-5,
        rope_theta=1e4,
    )
    return TransformerModel(arch=arch, mask_id=ROWS - 1, shift=shift, kind=kind)


def next_token_params(model: TransformerModel, strength: float) -> Any:
    """A network that says at each visible token which tokens follow it in `IDS`; nothing at a mask:
    one-hot embeddings, empty blocks, and the counts of pairs as its head."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    counts = np.zeros((ROWS, ROWS), np.float32)
    np.add.at(counts, (IDS[:-1], IDS[1:]), 1)
    head = strength * np.minimum(counts, 1) / math.sqrt(ROWS)
    return {
        **params,
        "embed": {"embedding": jnp.eye(ROWS)},
        "final_norm": {"scale": jnp.ones(ROWS)},
        "lm_head": {"kernel": jnp.asarray(head)},
    }


def unigram_params(model: TransformerModel) -> Any:
    """A network that says at a mask which tokens are in `IDS` at all, and nothing elsewhere."""
    params = next_token_params(model, 0.0)
    head = np.zeros((ROWS, ROWS), np.float32)
    head[ROWS - 1, np.unique(IDS[:40])] = 6 / math.sqrt(ROWS)
    return {**params, "lm_head": {"kernel": jnp.asarray(head)}}


def test_model_read_at_the_wrong_position_is_refused():
    right, wrong = one_layer(shift=True), one_layer(shift=False)
    params = next_token_params(right, 8.0)
    assert output_position.check(right, params, IDS) is None
    with pytest.raises(ModelError, match=r"read at position i for the token at i, .* i - 1 pred"):
        output_position.check(wrong, params, IDS)
    found = output_position.measure(wrong, params, IDS)
    assert found is not None
    assert found.own == pytest.approx(math.log(ROWS), abs=1e-5)  # says nothing at a mask
    # Logits of 8 at the tokens that follow, at most six of them, 0 elsewhere.
    assert found.other < 2


def test_and_so_is_a_shifted_reading_of_an_unshifted_model():
    ids = IDS[:40]
    params = unigram_params(one_layer(shift=False))
    assert output_position.check(one_layer(shift=False), params, ids) is None
    with pytest.raises(ModelError, match=r"at position i - 1 .* those at i predict"):
        output_position.check(one_layer(shift=True), params, ids)


def test_smaller_lead_is_a_warning():
    wrong = one_layer(shift=False)
    params = next_token_params(wrong, 0.4)
    found = output_position.measure(wrong, params, IDS)
    assert found is not None
    assert 0.2 < found.lead < output_position.REFUSE_NATS
    warning = output_position.check(wrong, params, IDS)
    assert warning is not None
    assert "predict a plain text better" in warning
    assert "\n" not in warning


def test_other_kinds_and_short_texts_are_not_judged():
    params = next_token_params(one_layer(shift=True), 8.0)
    for kind in ("masked", "autoregressive"):
        assert output_position.check(one_layer(shift=False, kind=kind), params, IDS) is None
    assert output_position.check(one_layer(shift=False), params, IDS[:12]) is None


@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_random_weights_pass_silently(spread):
    """A nat or more of noise in the logits, twenty models: a test at two standard errors alone
    would warn about one in forty of them, in either reading."""
    model = one_layer(shift=False)
    for seed in range(20):
        params = random_params(model, seed, spread)
        for shift in (False, True):
            assert output_position.check(replace(model, shift=shift), params, IDS) is None


def test_verify_refuses_wrong_alignment_but_not_against(folder, dump, monkeypatch):
    def refuse(*_):
        raise ModelError("wrong way round")

    monkeypatch.setattr(output_position, "check", refuse)
    assert run(folder, "--against", dump) == 0
    with pytest.raises(SamaError, match="wrong way round"):
        run(folder)
