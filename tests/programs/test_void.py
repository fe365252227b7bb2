"""Ways to make an audit that means nothing: each is stopped, or void in the first line, by name."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import trained
from safetensors.numpy import load_file, save_file

from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.devices.processes import Peers
from sama_jax.engine import loop, other_readings
from sama_jax.errors import DataError, ModelError, SamaError, UsageError, ValidityError
from sama_jax.programs import second_seed
from sama_jax.programs.audit import AuditResult, run_audit
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.nll import run_nll
from sama_jax.programs.verify_run import verify_run
from sama_jax.texts.read import collect, read_texts
from sama_jax.training import few

EACH = 60
"""Texts of each class."""
CONTROL = 16
"""Texts of a positive control."""
SETTINGS = AuditSettings(max_length=trained.LENGTH, sama=SamaSettings(steps=4, subsets=16))
BLOCK = "model.transformer.blocks.0"


def classes(seed: int = 7) -> tuple[list[str], list[str]]:
    """Members and non-members of one source."""
    texts = [trained.words(ids) for ids in trained.tokens(2 * EACH, seed=seed)]
    return texts[:EACH], texts[EACH:]


def write(path: Path, members: Iterable[str], nonmembers: Iterable[str], label="label") -> Path:
    lines = [
        {"id": f"{label}{i}", "text": text, label: label_of}
        for label_of, texts in ((1, members), (0, nonmembers))
        for i, text in enumerate(texts, 1000 * label_of)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that have learnt the language, the target also the members, and the texts."""
    base = tmp_path_factory.mktemp("void")
    trained.audited(base, trained.tokens(2 * EACH, seed=7)[:EACH])
    write(base / "texts.jsonl", *classes())
    return base


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    """A copy of all inputs, to be spoilt."""
    return shutil.copytree(place, tmp_path / "own")


def audit(place: Path, out: Path, **changes: Any) -> AuditResult:
    given: dict[str, Any] = {
        "target": place / "target",
        "reference": place / "reference",
        "texts": read_texts(place / "texts.jsonl"),
        "out": out,
        "attacks": ["sama", "loss", "ratio"],
        "settings": SETTINGS,
        "quiet": True,
        "figures": False,
    }
    result = run_audit(AuditJob(**(given | changes)))
    assert result is not None
    return result


def test_a_sound_audit_is_void_by_nothing_and_weakened_by_nothing(place: Path, tmp_path: Path):
    found = audit(place, tmp_path / "run").metrics
    fired = [one for one in found["validity"] if one["status"] not in ("pass", "not run")]
    assert fired == []
    assert found["verdict"]["kind"] == "found"


@pytest.mark.parametrize("known", [True, False])
def test_a_positive_control_must_be_found(known: bool, place: Path, tmp_path: Path):
    learnt = trained.tokens(CONTROL, seed=21)
    trained.audited(tmp_path, learnt, steps=150)
    texts = learnt if known else trained.tokens(CONTROL, seed=22)
    file = write(tmp_path / "control.jsonl", map(trained.words, texts), ())
    given = collect([text._replace(id=f"c{text.id}") for text in read_texts(file).texts])
    of = read_texts(Path(shutil.copy(place / "texts.jsonl", tmp_path)))
    result = audit(tmp_path, tmp_path / "run", control=given)
    gates = {one["name"]: one for one in result.metrics["validity"]}
    found = gates["positive_control"]
    assert found["status"] == ("pass" if known else "warn"), found
    marked = [row["id"] for row in result.rows if row.get("control")]
    assert marked == [text.id for text in given.texts]
    assert result.metrics["attacks"]["sama"]["n_members"] == EACH
    with pytest.raises(DataError, match="stands among the texts of the audit"):
        audit(place, tmp_path / "other", texts=of, control=of._replace(texts=of.texts[:1]))
    wrong = collect([text._replace(label=0) for text in given.texts])
    with pytest.raises(DataError, match="a positive control is of known members"):
        audit(place, tmp_path / "other", texts=of, control=wrong)


def test_what_the_reference_was_made_to_learn_must_be_found(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(few, "STEPS", 500)  # p is .0001 after 400 already
    out = tmp_path / "run"
    asked = {"pipeline_control": True, "second_seed": True, "attacks": ["ratio"]}
    first = audit(place, out, **asked)
    gates = {one["name"]: one for one in first.metrics["validity"]}
    assert gates["pipeline_control"]["status"] == "pass", gates["pipeline_control"]
    assert "texts correlate by" in gates["mask_noise"]["sentence"]
    again = [row for row in first.rows if "again" in row]
    assert [sum(row.get("label") == label for row in again) for label in (0, 1)] == [50, 50]
    assert any(row.get("again") != (row.get("scores") or {})["ratio"] for row in again)
    with pytest.MonkeyPatch.context() as patch:  # nothing is computed again, asked for or not
        patch.setattr(few, "learn", None)
        patch.setattr(second_seed, "score_part", None)
        for more in (asked, {"attacks": ["ratio"]}):
            assert audit(place, out, **more).metrics == first.metrics
    assert verify_run(out).files > 10
    scores = out / "pipeline_control" / "scores.jsonl"
    scores.write_text(scores.read_text().replace('"label": 1', '"label": 0', 1))
    with pytest.raises(DataError, match=r"changed.*\n  pipeline_control/scores\.jsonl"):
        verify_run(out)


def test_a_pipeline_control_that_taught_nothing_is_not_passed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(few, "STEPS", few.EVERY)
    found = audit(place, tmp_path / "run", pipeline_control=True, attacks=["ratio"])
    gates = {one["name"]: one["status"] for one in found.metrics["validity"]}
    assert gates["pipeline_control"] == "warn"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"bytes": 10**9}, UsageError, r"trains the reference on one device.*--control FILE"),
        ({"limit": EACH + 12}, DataError, "needs 14 non-members of different documents.*found 12"),
        ({"peers": Peers(0, 2)}, UsageError, "needs a run of one process, this one has 2"),
    ],
)
def test_a_pipeline_control_that_cannot_be_made_is_refused_before_any_pass(
    change: dict[str, Any],
    kind: type[SamaError],
    said: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(few, "BYTES", change.pop("bytes", few.BYTES))
    with pytest.raises(kind, match=said):
        audit(place, tmp_path / "run", pipeline_control=True, **change)
    assert not (tmp_path / "run").exists()


# --- models --------------------------------------------------------------------------------------


def edit(folder: Path, name: str, change: Callable[[np.ndarray], Any]) -> None:
    tensors = {n: t.copy() for n, t in load_file(folder / "model.safetensors").items()}
    made = change(tensors[name])
    tensors[name] = tensors[name] if made is None else np.ascontiguousarray(made)
    save_file(tensors, folder / "model.safetensors")


def put(value: float) -> Callable[[np.ndarray], None]:
    return lambda tensor: tensor.__setitem__((-1,) * tensor.ndim, value)


def edit_configs(own: Path, *roles: str, **changes: Any) -> None:
    for role in roles:
        path = own / role / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_adapter(path: Path, b: float) -> Path:
    """An adapter on one query projection; all values of B are `b`."""
    path.mkdir()
    module, width = f"base_model.model.{BLOCK}.q_proj", trained.SHAPE["d_model"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    a = np.ones((2, width), np.float32)
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": a.T * np.float32(b)}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def with_adapter(b: float) -> Callable[[Path], dict[str, Any]]:
    return lambda own: {
        "target": own / "reference",
        "adapter": write_adapter(own / "adapter", b),
    }


def broken(role: str, name: str, value: float) -> Callable[[Path], dict[str, Any]]:
    return lambda own: edit(own / role, name, put(value)) or {}


def swap_halves(tensor: np.ndarray) -> np.ndarray:
    """Exchanges the halves of each head's rows, which rotary embeddings pair."""
    return tensor.reshape(2, 2, -1, tensor.shape[1])[:, ::-1].reshape(tensor.shape)


def swapped(*roles: str) -> Callable[[Path], dict[str, Any]]:
    def spoil(own: Path) -> dict[str, Any]:
        for role in roles:
            for side in ("q_proj", "k_proj"):
                edit(own / role, f"{BLOCK}.{side}.weight", swap_halves)
        return {}

    return spoil


def config_of(*roles: str, **changes: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda own: edit_configs(own, *roles, **changes) or {}


def other_tokenizer(own: Path) -> dict[str, Any]:
    for role in ("target", "reference"):
        trained.tokenizer(shift=7).save(str(own / role / "tokenizer.json"))
    return {}


def one_model_in_two_files(own: Path) -> dict[str, Any]:
    return {"target": tiny.same_weights(own / "reference", own / "same")}


def lost_head(own: Path) -> dict[str, Any]:
    edit(own / "target", "model.transformer.ff_out.weight", np.zeros_like)
    return {}


THETA, BOTH = trained.SHAPE["rope_theta"], ("target", "reference")
MODELS: dict[str, tuple[Callable[[Path], dict[str, Any]], type[SamaError], str]] = {
    "NaN in the target's embedding": (
        broken("target", "model.transformer.wte.weight", np.nan),
        ModelError,
        r"the target hold NaN or infinity, at embed.embedding\[299, 31\]",
    ),
    "infinity in the target's norm": (
        broken("target", "model.transformer.ln_f.weight", np.inf),
        ModelError,
        r"the target hold NaN or infinity, at final_norm.scale\[31\]",
    ),
    "NaN in a block of the reference": (
        broken("reference", f"{BLOCK}.v_proj.weight", np.nan),
        ModelError,
        r"the reference hold NaN or infinity, at last_block.attn.v_proj.kernel\[31, 31\]",
    ),
    "infinity in the reference's head": (
        broken("reference", "model.transformer.ff_out.weight", -np.inf),
        ModelError,
        "the reference hold NaN or infinity, at lm_head",
    ),
    "NaN in the adapter": (
        with_adapter(np.nan),
        ModelError,
        "its B or their scale is not finite",
    ),
    "an adapter of zeros": (with_adapter(0.0), ValidityError, "its adapter is zero"),
    "one folder twice": (
        lambda own: {"target": own / "reference"},
        ValidityError,
        "are the same model",
    ),
    "one model in two files": (one_model_in_two_files, ValidityError, "same_losses"),
    "halves of q and k swapped in the target": (
        swapped("target"),
        ModelError,
        "the target: read backwards",
    ),
    "halves of q and k swapped in both": (swapped(*BOTH), ModelError, "read backwards"),
    "rotary base 25 times too large": (
        config_of(*BOTH, rope_theta=THETA * 25),
        ModelError,
        "with a rotary base 0.1 times as large",
    ),
    "rotary base 25 times too small": (
        config_of("target", rope_theta=THETA / 25),
        ModelError,
        "the target: read with a rotary base 10 times as large",
    ),
    "attention stated to be causal": (
        config_of(*BOTH, attention_mask="causal"),
        ModelError,
        "with attention mask full it predicts.*--attention-mask full, or causal to keep",
    ),
    "attention stated to be in blocks": (
        config_of("target", attention_mask="block:4"),
        ModelError,
        "the target: read with attention mask full",
    ),
    "another mask token": (config_of(*BOTH, mask_token_id=50), (ModelError, ValidityError), "mask"),
    "another tokenizer of the same size": (other_tokenizer, ValidityError, "target_learnt"),
    "a head that was lost": (lost_head, ValidityError, "target_learnt"),
    "target and reference exchanged": (
        lambda own: {"target": own / "reference", "reference": own / "target"},
        ValidityError,
        "direction: sama ranks members below",
    ),
}  # pyright: ignore


# --- texts ---------------------------------------------------------------------------------------


def longer(own: Path) -> dict[str, Any]:
    members, nonmembers = classes()
    write(own / "texts.jsonl", [text.rsplit(" ", 8)[0] for text in members], nonmembers)
    return {}


def dated(own: Path) -> dict[str, Any]:
    years = [[f"{year} {t}" for t in texts] for year, texts in zip((2019, 2024), classes())]
    write(own / "texts.jsonl", *years)
    return {}


def of_another_topic(own: Path) -> dict[str, Any]:
    members, nonmembers = classes()
    others = [f"w{30 + i % 9} " * 8 + text for i, text in enumerate(nonmembers)]
    write(own / "texts.jsonl", members, others)
    return {}


def in_both_classes(own: Path) -> dict[str, Any]:
    members, nonmembers = classes()
    write(own / "texts.jsonl", members, [*nonmembers[10:], *members[:10]])
    return {}


def equal_once_cut(own: Path) -> dict[str, Any]:
    members, nonmembers = classes()
    write(own / "texts.jsonl", members, [*nonmembers[10:], *(f"{t} w9 w8" for t in members[:10])])
    return {}


def near_the_other_class(own: Path) -> dict[str, Any]:
    members, nonmembers = classes()
    near = [f"{text.rsplit(' ', 1)[0]} w40" for text in members[:10]]
    write(own / "texts.jsonl", members, [*nonmembers[10:], *near])
    return {}


def misnamed_labels(own: Path) -> dict[str, Any]:
    return {"texts": read_texts(write(own / "texts.jsonl", *classes(), label="Label"))}


TEXTS: dict[str, tuple[Callable[[Path], dict[str, Any]], type[SamaError], str]] = {
    "classes of other lengths": (longer, ValidityError, "void: blind"),
    "classes of other dates": (dated, ValidityError, "void: blind"),
    "classes of other topics": (of_another_topic, ValidityError, "void: blind"),
    "texts of both classes": (in_both_classes, ValidityError, "contradictions"),
    "texts that cutting makes equal": (equal_once_cut, ValidityError, "equal_after_cutting"),
    "texts near to one of the other class": (near_the_other_class, ValidityError, "near_dupl"),
    "labels under another name": (misnamed_labels, DataError, "'Label'"),
}


@pytest.mark.parametrize("way", [*MODELS, *TEXTS])
def test_what_means_nothing_is_stopped_or_void_by_name(way: str, own: Path, tmp_path: Path):
    spoil, kind, named = (MODELS | TEXTS)[way]
    out = tmp_path / "run"

    def run() -> None:
        changes = spoil(own)
        audit(own, out, **changes)

    with pytest.raises(kind, match=named):
        run()
    if (out / "report.md").is_file():
        assert (out / "report.md").read_text().splitlines()[2].startswith("No conclusion (")
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["verdict"]["kind"] == "no conclusion"


def test_a_run_of_enough_texts_judges_models_whose_losses_came_in_small_portions(
    own: Path, tmp_path: Path
):
    """The store is full when the last run begins, so no pass would load the models again."""
    config_of("target", rope_theta=THETA * 25)(own)
    config_of("reference", rope_theta=THETA * 25)(own)
    texts, store = read_texts(own / "texts.jsonl"), tmp_path / "store"
    few = other_readings.LEAST_TEXTS - 2
    portions = [
        collect(texts.texts[start : start + few]) for start in (0, few, len(texts.texts) - few)
    ]
    for number, portion in enumerate(portions):
        with contextlib.suppress(ValidityError):
            audit(own, tmp_path / f"part{number}", texts=portion, store=store)
    draw = np.random.default_rng(3)
    nonsense = [trained.words(ids) for ids in draw.integers(0, 90, (40, trained.LENGTH))]
    file = write(tmp_path / "nonsense.jsonl", nonsense[:20], nonsense[20:])
    with pytest.raises(ValidityError):  # these cannot tell either
        audit(own, tmp_path / "nonsense", texts=read_texts(file), store=store)
    whole = collect(texts.texts[: 2 * few] + texts.texts[-few:])
    with pytest.raises(ModelError, match=r"read with a rotary base 0\.1 times as large"):
        audit(own, tmp_path / "whole", texts=whole, store=store)


def test_models_that_were_judged_are_not_loaded_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    audit(place, tmp_path / "one", store=tmp_path / "store")
    monkeypatch.setattr(loop, "load", None)
    audit(place, tmp_path / "two", store=tmp_path / "store")


def test_a_mask_of_attention_that_is_asked_for_is_kept_and_stated_and_a_better_one_noted(
    place: Path, tmp_path: Path
):
    out, masks = tmp_path / "run", {"attention_mask": "causal", "reference_attention_mask": "full"}
    with pytest.raises(ValidityError, match="target_worse"):  # it was trained with full attention
        audit(place, out, **masks)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["attention_mask"] == "causal (target), full (reference)"
    assert manifest["run"]["target.attention_mask"] == "causal"
    report = (out / "report.md").read_text()
    assert "attention mask: `causal (target), full (reference)`" in report
    noted = [note for note in manifest["notes"] if "read with attention mask full" in note]
    assert len(noted) == 1
    assert noted[0].startswith("target: ")


def test_nll_looks_whether_another_reading_of_the_model_is_better(own: Path, tmp_path: Path):
    texts = read_texts(own / "texts.jsonl")
    settings = AuditSettings(max_length=trained.LENGTH, passes=2)
    run_nll(own / "target", texts, tmp_path / "sound", settings, quiet=True)
    config_of("target", rope_theta=THETA * 25)(own)
    with pytest.raises(ModelError, match=r"target: read with a rotary base 0\.1 times as large"):
        run_nll(own / "target", texts, tmp_path / "spoilt", settings, quiet=True)
