"""Whatever changes a number changes the identity: no stale or mixed score in any folder or store.

Each change is made alone, behind a finished run. The same command on the same `--out` then either
refuses or gives the numbers of a new folder; with a store that all changes share it gives them too.
"""

import copy
import dataclasses
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import yaml
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, normalizers
from wrong_inputs import Box, as_flags, assert_one_line, contents, run, scores

from sama_jax import rng
from sama_jax.attacks import registry
from sama_jax.cli import entry
from sama_jax.config import AuditSettings
from sama_jax.engine import output_position, roles
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.registry import build_model, read_config
from sama_jax.programs import run_identity, stored
from sama_jax.programs.audit_models import require_one_kind
from sama_jax.programs.jobs import AuditJob
from sama_jax.weights import identity, model_folder, saving

FLAGS = {
    "attacks": "sama,ratio,zlib",
    "max_length": 32,
    "padding": "visible",
    "no_figures": True,
    "set": "sama.subset_size=3",
}
Change = Callable[[Box], dict[str, Any]]
"""Changes the files of a box, or returns changed flags."""


# --- inputs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its inputs, and a store that all changed runs share."""
    base = tmp_path_factory.mktemp("identity")
    for seed, name in enumerate(("target", "reference", "other")):
        tiny.folder(base / name, seed=seed, weight_tying=False)
    tiny.write_texts(base / "texts.jsonl", tiny.texts(6, (8, 28)))
    write_adapter(base / "adapter")
    box = box_of(base)
    assert entry.main(box.command(**FLAGS, include_votes=True)) == 0
    save = {"save_plan": base / "plan.npz", "save_losses": base / "losses.npz"}
    assert entry.main(box.command(**FLAGS, **save)) == 0
    shutil.copytree(base / "out" / "losses", base / "store")
    return base


@pytest.fixture
def box(originals: Path, tmp_path: Path) -> Box:
    for name in ("target", "reference", "other", "adapter", "texts.jsonl", "plan.npz"):
        duplicate = shutil.copytree if (originals / name).is_dir() else shutil.copy
        duplicate(originals / name, tmp_path / name)
    return box_of(tmp_path)


def box_of(path: Path) -> Box:
    return Box(path, path / "target", path / "reference", path / "texts.jsonl", path / "out")


def write_adapter(path: Path) -> None:
    path.mkdir()
    draw = np.random.default_rng(0)
    prefix = "base_model.model.model.transformer.blocks.0.q_proj"
    shapes = {f"{prefix}.lora_A.weight": (2, 16), f"{prefix}.lora_B.weight": (16, 2)}
    save_file(
        {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
        path / "adapter_model.safetensors",
    )
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(given))


# --- changes -------------------------------------------------------------------------------------


def flags(**changes: Any) -> Change:
    return lambda box: changes


def setting(value: str) -> Change:
    return lambda box: {"set": value}


def edit_json(path: str, **changes: Any) -> Change:
    """Changes fields of a JSON file, in the reference's folder as well if it is the target's."""

    def change(box: Box) -> dict[str, Any]:
        for name in {path, path.replace("target/", "reference/")}:
            file = box.path / name
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return {}

    return change


def edit_lines(edit: Callable[[list[dict[str, Any]]], Any]) -> Change:
    def change(box: Box) -> dict[str, Any]:
        lines = [json.loads(line) for line in box.data.read_text().splitlines()]
        edit(lines)
        box.data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {}

    return change


def edit_weights(path: str, edit: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def change(box: Box) -> dict[str, Any]:
        tensors = {name: np.array(x) for name, x in load_file(box.path / path).items()}
        edit(tensors)
        save_file(tensors, box.path / path)
        return {}

    return change


def edit_tokenizer(edit: Callable[[Tokenizer], Any]) -> Change:
    def change(box: Box) -> dict[str, Any]:
        for folder in (box.target, box.reference):
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            edit(tokenizer)
            tokenizer.save(str(folder / "tokenizer.json"))
        return {}

    return change


def exchange_two_tokens(box: Box) -> dict[str, Any]:
    for folder in (box.target, box.reference):
        file = folder / "tokenizer.json"
        found = json.loads(file.read_text())
        words = found["model"]["vocab"]
        words["a"], words["k"] = words["k"], words["a"]
        file.write_text(json.dumps(found))
    return {}


def other_plan(box: Box) -> dict[str, Any]:
    """Replays the plan, its subsets exchanged between two steps of equal masks' size."""
    found = dict(np.load(box.path / "plan.npz"))
    found["weights"] = found["weights"][:, ::-1].copy()
    np.savez(box.path / "plan.npz", **found)
    return {"plan": box.path / "plan.npz"}


def half(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        key = next(k for k in tensors if name in k)
        tensors[key] = tensors[key] / 2

    return edit


def one_number(tensors: dict[str, np.ndarray]) -> None:
    """Changes one number of the embedding: an embedding row that the texts use."""
    key = next(k for k in tensors if "wte" in k)
    tensors[key][: tiny.VOCAB - 2, 7] += 0.5


CHANGES: dict[str, Change] = {
    "a text": edit_lines(lambda lines: lines[2].update(text=lines[2]["text"] + " karo")),
    "a text's case": edit_lines(lambda lines: lines[1].update(text=lines[1]["text"].upper())),
    "texts exchanged": edit_lines(
        lambda lines: (
            t := lines[0]["text"],
            lines[0].update(text=lines[3]["text"]),
            lines[3].update(text=t),
        )
    ),
    "an id": edit_lines(lambda lines: lines[0].update(id="other")),
    "a label": edit_lines(lambda lines: lines[0].update(label=1 - lines[0]["label"])),
    "a group": edit_lines(lambda lines: lines[0].update(group="one")),
    "one text fewer": flags(limit=5),
    "another target": lambda box: {"target": box.path / "other"},
    "another reference": lambda box: {"reference": box.path / "other"},
    "target: a norm": edit_weights("target/model.safetensors", half("norm")),
    "target: a column of the embedding": edit_weights("target/model.safetensors", one_number),
    "target: an MLP": edit_weights("target/model.safetensors", half("up_proj")),
    "reference: the head": edit_weights("reference/model.safetensors", half("ff_out")),
    "rms_norm_eps": edit_json("target/config.json", rms_norm_eps=0.5),
    "rope_theta": edit_json("target/config.json", rope_theta=3.0),
    "n_heads": edit_json("target/config.json", n_heads=4, n_kv_heads=4),
    "pad_token_id": edit_json("target/config.json", pad_token_id=7),
    "eos_token_id as padding": edit_json("target/config.json", pad_token_id=None, eos_token_id=9),
    "mask_token_id": edit_json("target/config.json", mask_token_id=298),
    "mask_id by flag": flags(mask_id=297),
    "tokenizer: two tokens": exchange_two_tokens,
    "tokenizer: a normaliser": edit_tokenizer(
        lambda t: setattr(t, "normalizer", normalizers.Replace("r", "l"))
    ),
    "tokenizer: an added token": edit_tokenizer(
        lambda t: t.add_tokens([AddedToken("karo", normalized=False)])
    ),
    "max_length": flags(max_length=16),
    "pad_to": flags(pad_to=48),
    "hidden padding": flags(padding="hidden"),
    "bfloat16": flags(dtype="bfloat16"),
    "seed": flags(seed=7),
    "preset": flags(preset="official"),
    "passes": flags(passes=3),
    "sama.steps": setting("sama.steps=3"),
    "sama.subsets": setting("sama.subsets=9"),
    "sama.subset_size": setting("sama.subset_size=2"),
    "sama.min_density": setting("sama.min_density=0.2"),
    "sama.max_density": setting("sama.max_density=0.9"),
    "sama.schedule": setting("sama.schedule=geometric"),
    "sama.nesting": setting("sama.nesting=fresh"),
    "sama.loss_source": setting("sama.loss_source=stored_first"),
    "sama.repeats": setting("sama.repeats=2"),
    "a replayed plan": other_plan,
    "an adapter": lambda box: {"adapter": box.path / "adapter"},
}
"""More than the thirty that are asked for: each changes a score of at least one text."""


def audited(capsys: Any, box: Box, out: Path, change: dict[str, Any]) -> list[dict[str, Any]]:
    said = run(capsys, box.command(**FLAGS | {"out": out} | change))
    assert said.code == 0, said.err
    return scores(out)


# --- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_audit(name: str, originals: Path, box: Box, capsys):
    before = scores(originals / "out")
    change = CHANGES[name](box)
    fresh = audited(capsys, box, box.path / "fresh", change)
    assert fresh != before, "this changes no number"
    shared = audited(capsys, box, box.path / "shared", change | {"store": originals / "store"})
    assert shared == fresh
    shutil.copytree(originals / "out", box.out)
    kept = contents(box.out)
    said = run(capsys, box.command(**FLAGS | change))
    if said.code == 0:
        assert scores(box.out) == fresh
    else:
        assert_one_line(said, 2, "belongs to another run")
        assert contents(box.out) == kept


def test_what_was_not_changed_is_continued(originals: Path, box: Box, capsys):
    shutil.copytree(originals / "out", box.out)
    assert audited(capsys, box, box.out, {}) == scores(originals / "out")


def test_score_and_merge_read_their_own_losses_from_a_shared_store(
    originals: Path, tmp_path: Path, capsys
):
    """Behind all other runs of this file, whose losses stand in the same store."""
    before = scores(originals / "out")
    for command in ("score", "merge"):
        out = tmp_path / command
        shutil.copytree(originals / "out", out, ignore=shutil.ignore_patterns("losses", "parts"))
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["store"] = str(originals / "store")
        (out / "manifest.json").write_text(json.dumps(manifest))
        merged = tmp_path / "merged"
        given = {
            "score": ["score", "--store", str(out), "--attacks", "sama,ratio,zlib", "--quiet"],
            "merge": ["merge", str(merged), str(out), "--quiet"],
        }[command]
        said = run(capsys, given)
        assert said.code == 0, said.err
        made = scores(merged if command == "merge" else out)
        assert [row["scores"] for row in made] == [row["scores"] for row in before]


def test_parts_of_different_runs_are_not_merged(originals: Path, box: Box, capsys):
    audited(capsys, box, box.path / "other-run", {"seed": 7})
    command = ["merge", str(box.path / "merged"), str(originals / "out")]
    said = run(capsys, [*command, str(box.path / "other-run"), "--quiet"])
    assert_one_line(said, 2, "belongs to another run", "seed")


NLL = ["a text", "an id", "target: a norm", "rms_norm_eps", "mask_id by flag", "bfloat16", "seed"]
NLL += ["tokenizer: a normaliser", "max_length", "pad_token_id", "one text fewer"]


@pytest.fixture(scope="module")
def finished_nll(originals: Path) -> Path:
    out = originals / "nll"
    assert entry.main(nll_command(box_of(originals), out, {})) == 0
    return out


def nll_command(box: Box, out: Path, change: dict[str, Any]) -> list[str]:
    given = {"set": "padding=visible", "max_length": 32, "passes": 2} | change
    limit = given.pop("limit", None)
    if limit is not None:
        lines = box.data.read_text().splitlines(keepends=True)
        box.data.write_text("".join(lines[:limit]))
    files = {"model": box.target, "data": box.data, "out": out}
    return ["nll", *as_flags(files | given), "--quiet"]


@pytest.mark.parametrize("name", NLL)
def test_nll(name: str, finished_nll: Path, box: Box, capsys):
    change = CHANGES[name](box)
    assert run(capsys, nll_command(box, box.path / "fresh", change)).code == 0
    fresh = (box.path / "fresh" / "nll.jsonl").read_bytes()
    assert fresh != (finished_nll / "nll.jsonl").read_bytes()
    shutil.copytree(finished_nll, box.out)
    kept = contents(box.out)
    assert_one_line(run(capsys, nll_command(box, box.out, change)), 2, "belongs to another run")
    assert contents(box.out) == kept


FINETUNE = ["a text", "target: a norm", "rms_norm_eps", "mask_token_id", "seed"]
FINETUNE += ["tokenizer: a normaliser", "max_length"]


@pytest.fixture(scope="module")
def finished_training(originals: Path) -> Path:
    out = originals / "trained"
    assert entry.main(finetune_command(box_of(originals), out, {})) == 0
    return out


def finetune_command(box: Box, out: Path, change: dict[str, Any]) -> list[str]:
    given = {"max_length": 32, "epochs": 1, "batch_size": 3} | change
    files = {"base": box.target, "data": box.data, "out": out}
    return ["finetune", *as_flags(files | given), "--quiet"]


@pytest.mark.parametrize("name", FINETUNE)
def test_finetune(name: str, finished_training: Path, box: Box, capsys):
    change = CHANGES[name](box)
    assert run(capsys, finetune_command(box, box.path / "fresh", change)).code == 0
    weights = "model.safetensors"
    fresh = (box.path / "fresh" / weights).read_bytes()
    assert fresh != (finished_training / weights).read_bytes()
    shutil.copytree(finished_training, box.out)
    kept = contents(box.out)
    assert_one_line(
        run(capsys, finetune_command(box, box.out, change)), 2, "belongs to another training run"
    )
    assert contents(box.out) == kept


EXPERIMENT = ["a text", "another target", "target: a norm", "tokenizer: a normaliser", "seed"]
EXPERIMENT += ["max_length", "sama.subsets"]


def experiment_command(box: Box, change: dict[str, Any]) -> list[str]:
    models = {"target": str(change.get("target", box.target)), "reference": str(box.reference)}
    given = {k: v for k, v in {"max_length": 32, **change}.items() if k not in ("target", "set")}
    one = {"name": "one", "attacks": ["sama", "ratio"], "set": ["sama.subset_size=3"], **given}
    one["set"] += [change["set"]] if "set" in change else []
    plan = {"models": models, "data": {"data": str(box.data)}, "runs": [one]}
    (box.path / "mine.yaml").write_text(yaml.safe_dump(plan))
    return ["experiment", str(box.path / "mine.yaml"), "--out", str(box.path / "runs"), "--quiet"]


@pytest.mark.parametrize("name", EXPERIMENT)
def test_experiment(name: str, box: Box, capsys):
    out = box.path / "runs" / "mine"
    said = run(capsys, experiment_command(box, {}))
    assert said.code == 0, said.err
    before = scores(out / "one")
    command = experiment_command(box, CHANGES[name](box))
    assert_one_line(run(capsys, command), 2, "belongs to another run")
    assert scores(out / "one") == before
    shutil.rmtree(out / "one")  # the losses that all runs of the experiment share stay
    assert run(capsys, command).code == 0
    mixed = scores(out / "one")
    shutil.rmtree(out)
    assert run(capsys, command).code == 0
    assert mixed == scores(out / "one") != before


# --- nothing is left out -------------------------------------------------------------------------

COVERED = {"target", "reference", "texts", "settings", "adapter", "mask_id", "prefixes", "limit"}
COVERED |= {"plan", "control", "windows", "stride", "top_windows"}
COVERED |= {"attention_mask", "reference_attention_mask", "reference_tokenizer"}
"""Fields of a job that change numbers: they are in the identity by what they hold."""
NEUTRAL = {"out", "attacks", "store", "include_text", "include_votes", "figures", "strict"}
NEUTRAL |= {"split", "dry_run", "quiet", "command", "flags", "save_plan", "save_losses"}
NEUTRAL |= {"pipeline_control", "second_seed"}
"""They add scores of their own beside those of the run."""
PROTOCOL = {"primary", "family", "margin"}
"""Fields that change no score, but what is said of them: protocol.json refuses another one."""
NEUTRAL |= {"batch_size", "parallel", "mesh", "fully_sharded", "models", "peers"}
"""Fields that change no number but for rounding (tests/engine/test_invariance.py)."""


def test_a_new_field_of_a_job_is_put_into_one_of_the_lists():
    assert {field.name for field in dataclasses.fields(AuditJob)} == COVERED | NEUTRAL | PROTOCOL


def with_field(of: Any, name: str, value: Any = "another") -> Any:
    """Copies a frozen dataclass with another value of a field, of whatever type it should be."""
    other = copy.copy(of)
    object.__setattr__(other, name, value)
    return other


def test_every_field_of_a_model_is_part_of_its_identity(originals: Path):
    folder = model_folder.open_folder(originals / "target")
    before = identity.model_identity(folder)
    for field in dataclasses.fields(folder.model):  # pyright: ignore  a protocol
        if field.name in identity.NEUTRAL or field.name == "arch":
            continue
        other = with_field(folder, "model", with_field(folder.model, field.name))
        assert identity.model_identity(other) != before, field.name


def test_every_field_of_an_architecture_is_part_of_the_identity(originals: Path):
    folder = model_folder.open_folder(originals / "target")
    before = identity.model_identity(folder)
    for field in dataclasses.fields(folder.model.arch):  # pyright: ignore  a protocol
        # What derives from a field has a type of its own: numbers stay numbers.
        number = field.name == "block_length" or type(getattr(folder.model.arch, field.name)) is int
        value = 77 if number else True if field.name == "clean_context" else "another"
        if field.name == "experts":
            value = SimpleNamespace(shared_width=8)
        arch = with_field(folder.model.arch, field.name, value)
        other = with_field(folder, "model", with_field(folder.model, "arch", arch))
        assert identity.model_identity(other) != before, field.name


@pytest.mark.parametrize(
    "flag",
    [
        "--xla_cpu_enable_fast_math=true",
        "--xla_allow_excess_precision",
        "--xla_gpu_enable_bf16_6way_gemm",
        "--xla_of_a_later_version=1",
    ],
)
def test_flags_of_xla_that_change_numbers_are_part_of_the_identity(flag: str, monkeypatch):
    before = identity.arithmetic()
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {flag}")
    assert identity.arithmetic() != before
    flags = before["xla_flags"]
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_force_host_platform_device_count=3")
    assert identity.arithmetic() == before
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert identity.arithmetic() != before


def test_a_file_of_flags_is_refused(box: Box, capsys, monkeypatch):
    """XLA reads it, and no identity would know what is in it."""
    file = box.path / "flags.txt"
    file.write_text("--xla_allow_excess_precision=false")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    assert_one_line(run(capsys, box.command(**FLAGS)), 2, "XLA_FLAGS is", "the name of a file")
    assert not box.out.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_disable_jit", True),
        ("jax_debug_nans", True),
        ("jax_no_tracing", True),
        ("jax_error_checking_behavior_nan", "raise"),
        ("jax_transfer_guard_host_to_device", "disallow"),
        ("jax_numpy_dtype_promotion", "strict"),
    ],
)
def test_settings_for_finding_faults_are_refused_by_name(name: str, value: Any, box: Box, capsys):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        said = run(capsys, box.command(**FLAGS))
    finally:
        jax.config.update(name, before)
    assert_one_line(said, 2, f"found {name.upper()}={value}")
    assert not box.out.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 1),
        ("jax_enable_x64", True),
    ],
)
def test_other_random_bits_are_refused(name: str, value: Any, box: Box, capsys):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        with pytest.raises(UsageError, match=name.upper()):
            rng.checked_bits()
        said = run(capsys, box.command(**FLAGS))
    finally:
        jax.config.update(name, before)
    assert_one_line(said, 2, name.upper())
    assert not box.out.exists()
    assert rng.checked_bits() == rng.BITS


def test_keys_are_of_one_kind_whatever_jax_is_set_to():
    data = rng.text_key_data(np.arange(5))
    before = (
        jax.random.key_data(rng.text_key(3, data)),
        jax.random.key_data(rng.run_key(3, rng.Purpose.INITIAL_WEIGHTS)),
    )
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        after = (
            jax.random.key_data(rng.text_key(3, data)),
            jax.random.key_data(rng.run_key(3, rng.Purpose.INITIAL_WEIGHTS)),
        )
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")
    for a, b in zip(before, after):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("command", ["audit", "score"])
def test_another_version_continues_nothing(
    command: str, originals: Path, box: Box, capsys, monkeypatch
):
    shutil.copytree(originals / "out", box.out)
    for module in (run_identity, stored):
        monkeypatch.setattr(module, "__version__", "99.0")
    given = {
        "audit": box.command(**FLAGS),
        "score": ["score", "--store", str(box.out), "--attacks", "sama", "--quiet"],
    }
    kept = contents(box.out)
    assert_one_line(run(capsys, given[command]), 2, "99.0")
    assert contents(box.out) == kept


def test_losses_of_another_number_are_not_read(originals: Path, monkeypatch):
    folder = model_folder.open_folder(originals / "target")
    before = roles.model_key(folder, AuditSettings())
    monkeypatch.setattr(identity, "LOSSES", identity.LOSSES + 1)
    assert roles.model_key(folder, AuditSettings()) != before


def test_a_note_about_a_model_stays_when_the_run_is_continued(box: Box, capsys, monkeypatch):
    said = "predicts better elsewhere"
    with monkeypatch.context() as patch:
        patch.setattr(output_position, "check", lambda *_: said)
        assert_one_line(run(capsys, box.command(**FLAGS, strict=True)), 5, said)
    assert_one_line(run(capsys, box.command(**FLAGS, strict=True)), 5, said)
    notes = json.loads((box.out / "manifest.json").read_text())["notes"]
    assert [note.split(": ")[0] for note in notes] == ["target", "reference"]
    merged = box.path / "merged"
    assert run(capsys, ["merge", str(merged), str(box.out), "--quiet"]).code == 0
    assert json.loads((merged / "manifest.json").read_text())["notes"] == notes


def test_nll_says_what_was_noticed_about_its_model_every_time(box: Box, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(output_position, "check", lambda *_: "predicts better elsewhere")
        said = run(capsys, nll_command(box, box.out, {}))
    assert "predicts better elsewhere" in said.err
    assert "predicts better elsewhere" in run(capsys, nll_command(box, box.out, {})).err


def test_models_of_two_kinds_are_not_compared(originals: Path):
    target, reference = (model_folder.open_folder(originals / n) for n in ("target", "reference"))
    require_one_kind(target, reference)
    other = model_folder.with_options(reference, kind="autoregressive")
    for pair in ((target, other), (other, target)):
        with pytest.raises(
            ModelError, match=r"diffusion.*autoregressive|autoregressive.*diffusion"
        ):
            require_one_kind(*pair)


def test_mask_tokens_inside_texts_are_noted(box: Box, capsys):
    mask = f"<{tiny.MASK_ID}>"
    for folder in (box.target, box.reference):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fill = [AddedToken(f"<{i}>") for i in range(tokenizer.get_vocab_size(), tiny.VOCAB)]
        tokenizer.add_special_tokens(fill)
        tokenizer.save(str(folder / "tokenizer.json"))
        assert tokenizer.token_to_id(mask) == tiny.MASK_ID
    text = json.dumps({"text": f"karo {mask} mite", "label": 1})
    box.data.write_text(box.data.read_text() + text + "\n")
    said = run(capsys, box.command(**FLAGS, strict=True))
    assert_one_line(said, 5, "texts that spell the mask token: 1")


def test_another_precision_of_products_is_another_run(originals: Path, box: Box, capsys):
    shutil.copytree(originals / "out", box.out)
    with jax.default_matmul_precision("bfloat16"):
        said = run(capsys, box.command(**FLAGS))
    assert_one_line(said, 2, "matmul_precision was 'highest', is 'bfloat16'")


def test_two_kinds_of_attention_have_two_identities():
    family = read_config(tiny.config(), "config.json")
    model = build_model(family, 1, jax.numpy.dtype("bfloat16"))
    fused = model.with_cudnn()
    assert fused is not None
    assert repr(fused.arch) != repr(model.arch)


# --- what else a score depends on -----------------------------------------------------------------


def test_visible_padding_behind_a_prefix_does_not_depend_on_the_other_texts(box: Box, capsys):
    short, long = tiny.texts(8, (3, 8)), tiny.texts(4, (40, 48), seed=5)
    prefixes = tiny.write_texts(box.path / "prefixes.jsonl", tiny.texts(16, (8, 9), seed=9))
    given = {"attacks": "recall,loss", "padding": "visible", "max_length": 32, "passes": 2}
    given |= {"no_figures": True, "prefixes": prefixes, "set": "prefix.tokens=20"}
    found = {}
    for name, texts in (("short", short), ("all", short + long)):
        data = tiny.write_texts(box.path / f"{name}.jsonl", texts)
        for store in (None, box.path / "shared"):
            out = box.path / f"{name}-{store is None}"
            said = run(capsys, box.command(**given, data=data, out=out, store=store))
            assert said.code == 0, said.err
            rows = [row["scores"] for row in scores(out)[: len(short)]]
            assert found.setdefault("rows", rows) == rows, name


def test_nll_has_no_meaning_for_a_model_without_a_mask_token(originals: Path, box: Box, capsys):
    causal = box.path / "causal"
    tiny.folder(causal)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tiny.VOCAB,
    }
    config |= {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    save_random_llama(causal, config)
    command = ["nll", *as_flags({"model": causal, "data": box.data, "out": box.out}), "--quiet"]
    assert_one_line(run(capsys, command), 2, "nll is defined for diffusion", "autoregressive")
    assert not box.out.exists()


def save_random_llama(path: Path, config: dict[str, Any]) -> None:
    family = read_config(config, "config.json")
    model = build_model(family, 0, np.dtype(np.float32))
    saving.save_folder(path, model.init(jax.random.key(0)), model, config, path, family.weights)


OWN_ATTACK = """
import jax.numpy as jnp
from sama_jax.attacks import register
from sama_jax.attacks.sama import progressive_probes
import own_helper

@register("own", probes=progressive_probes, access="x", source="an example")
def own(reading):
    '''Mean gain.'''
    scored = reading.plan.scored
    gain = jnp.where(scored, reading.reference - reading.target, 0.0)
    return own_helper.SIGN * gain.sum() / jnp.maximum(scored.sum(), 1)
"""


def test_a_score_of_other_code_is_made_anew(box: Box, capsys, monkeypatch):
    """From the stored losses: an edited attack, or an edited file that it imports."""
    monkeypatch.syspath_prepend(box.path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    given, found = {"attacks": "own,loss", "no_figures": True, "max_length": 32}, []
    cases = [("1.0", ""), ("-1.0", ""), ("-1.0", "2 *"), ("-1.0", "2 *")]
    for sign, factor in cases:
        (box.path / "own_helper.py").write_text(f"SIGN = {sign}\n")
        code = OWN_ATTACK.replace("return own", f"return {factor} own")
        (box.path / "own_attack.py").write_text(code)
        registry._ATTACKS.pop("own", None)
        for name in ("own_helper", "own_attack"):
            sys.modules.pop(name, None)
        importlib.import_module("own_attack")
        said = run(capsys, box.command(**given))
        assert said.code == 0, said.err
        found.append([row["scores"] for row in scores(box.out)])
    own = np.array([[row["own"] for row in rows] for rows in found])
    np.testing.assert_allclose(own / own[0], [[1.0] * 6, [-1.0] * 6, [-2.0] * 6, [-2.0] * 6])
    loss = [[row["loss"] for row in rows] for rows in found]
    assert loss == [loss[0]] * 4
    lines = (box.out / "parts" / "scores-00000.jsonl").read_text().splitlines()
    names = [list(json.loads(line)["scores"]) for line in lines]
    assert sum("loss" in n for n in names) == 6  # its code is the same
    assert sum("own" in n for n in names) == 18
