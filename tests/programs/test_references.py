"""References of another kind: none, several, and one with a tokenizer of its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from jax import numpy as jnp
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sama_jax import attacks
from sama_jax.arrays import Piece, Rendered
from sama_jax.cli import entry
from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.devices.strategy import local_layout
from sama_jax.engine.evidence import Evidence
from sama_jax.engine.readings import Readings
from sama_jax.engine.tasks import tasks_of
from sama_jax.engine.text_table import table_from_description
from sama_jax.errors import ModelError, UsageError, ValidityError
from sama_jax.models.registry import build_model, read_config
from sama_jax.programs.audit import AuditResult, run_audit
from sama_jax.programs.audit_gates import each_learnt
from sama_jax.programs.jobs import AuditJob, _path
from sama_jax.programs.rescore import run_score
from sama_jax.storage.loss_store import LossStore
from sama_jax.storage.text_index import INDEX, read_index
from sama_jax.texts.read import read_texts
from sama_jax.texts.shared_spans import shared_spans
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import model_folder, saving
from sama_jax.weights.loading import load

SETTINGS = AuditSettings(max_length=32, passes=2, sama=SamaSettings(steps=2, subsets=8))


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, three references, and texts of ASCII and of characters of several bytes."""
    base = tmp_path_factory.mktemp("references")
    for seed, name in enumerate(("target", "a", "b", "c")):
        tiny.folder(base / name, seed=seed)
    tiny.folder(base / "other", seed=5, vocab_size=280, embedding_size=280, mask_token_id=279)
    tiny.tokenizer(274, seed=9).save(str(base / "other" / "tokenizer.json"))
    found = [
        f"{text} né 😀" if i % 4 == 0 else text for i, text in enumerate(tiny.texts(16, (6, 20)))
    ]
    tiny.write_texts(base / "texts.jsonl", found, labels=False)
    return base


def job(box: Path, out: Path, *references: str, **changes: Any) -> AuditJob:
    given: dict[str, Any] = {
        "target": box / "target",
        "reference": [box / name for name in references],
        "texts": read_texts(box / "texts.jsonl"),
        "out": out,
        "attacks": ["sama", "ratio"],
        "settings": SETTINGS,
        "quiet": True,
        "figures": False,
    }
    return AuditJob(**(given | changes))


def audit(box: Path, out: Path, *references: str, **changes: Any) -> AuditResult:
    result = run_audit(job(box, out, *references, **changes))
    assert result is not None
    return result


def scores(result: AuditResult, name: str) -> np.ndarray:
    return np.array([row["scores"][name] for row in result.rows], np.float64)


# --- none ----------------------------------------------------------------------------------------


def test_without_a_reference_attacks_on_the_target_alone_give_the_same_scores(box, tmp_path):
    names = ["loss", "zlib", "mink"]
    alone = audit(box, tmp_path / "alone", attacks=names)
    both = audit(box, tmp_path / "both", "a", attacks=names, store=tmp_path / "alone" / "losses")
    for name in names:
        np.testing.assert_array_equal(scores(alone, name), scores(both, name))
    assert both.cost["passes_run"] == 0
    again = run_score(tmp_path / "alone", ["loss:sum"], quiet=True)
    assert np.isfinite(scores(again, "loss:sum")).all()
    with pytest.raises(UsageError, match=r"'sama' cannot be scored.*there is none"):
        run_score(tmp_path / "alone", ["sama"], quiet=True)


def test_of_all_attacks_those_that_read_a_reference_are_left_out(box, tmp_path, capfd):
    run_audit(job(box, tmp_path / "run", attacks=["all"], dry_run=True, quiet=False))
    said = " ".join(capfd.readouterr().err.split())
    assert "no reference: only attacks that read the target alone" in said
    for name in ("sama", "ratio", "wbc", "complement", "its", "neighbor", "dfmia"):
        assert f"not computed: {name} (it reads a reference, and there is none)" in said
    for name in ("loss", "infill", "lowercase", "pia", "secmi", "mink++"):
        assert f"not computed: {name} (" not in said


def test_the_report_says_in_its_first_lines_that_there_is_no_reference(box, tmp_path):
    audit(box, tmp_path / "run", attacks=["loss"])
    first = (tmp_path / "run" / "report.md").read_text().splitlines()[:8]
    assert "- no reference: only attacks that read the target alone were computed" in first
    assert "no reference" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("given", [(), ("--reference", "none")])
def test_attacks_that_read_a_reference_are_refused_by_name(given, box, tmp_path, capsys):
    command = ["audit", "--target", str(box / "target"), *given, *tiny.SETTINGS, "--quiet"]
    command += ["--data", str(box / "texts.jsonl"), "--out", str(tmp_path / "run")]
    assert entry.main([*command, "--attacks", "sama,loss,ratio"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "attacks 'sama', 'ratio' cannot be computed here" in said
    able = said.strip().split("these can: ")[1].split(", ")
    assert {"loss", "zlib", "mink", "mink++"} <= set(able)
    assert not {"sama", "ratio", "neighbor"} & set(able)
    assert not (tmp_path / "run").exists()
    assert entry.main(command) == 0
    first = json.loads((tmp_path / "run" / "scores.jsonl").read_text().splitlines()[0])
    assert list(first["scores"]) == ["loss", "loss:sum", "zlib", "mink", "mink++"]


def test_none_beside_another_reference_is_refused(box, tmp_path, capsys):
    command = ["audit", "--target", str(box / "target"), "--data", str(box / "texts.jsonl")]
    command += ["--out", str(tmp_path / "run"), "--reference", "none", "--reference"]
    assert entry.main([*command, str(box / "a")]) == 2
    assert "leave the others out" in capsys.readouterr().err


# --- several -------------------------------------------------------------------------------------


def test_the_scores_of_several_references_are_those_of_their_mean_loss(box, tmp_path):
    """The ratio of one pass is a quotient of sums: its inverse is the mean of the inverses."""
    many = audit(box, tmp_path / "many", "a", "b", "c")
    apart = [audit(box, tmp_path / name, name, store=tmp_path / "many/losses") for name in "abc"]
    inverse = np.mean([1 / scores(one, "ratio") for one in apart], axis=0)
    np.testing.assert_allclose(1 / scores(many, "ratio"), inverse, rtol=1e-5)
    assert all(one.cost["passes_run"] == 0 for one in apart)


def test_the_order_of_references_changes_no_bit(box, tmp_path):
    first = audit(box, tmp_path / "one", "a", "b", "c")
    second = audit(box, tmp_path / "other", "c", "a", "b")
    for name in ("sama", "ratio"):
        np.testing.assert_array_equal(scores(first, name), scores(second, name))
    runs = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("one", "other")]
    assert runs[0]["run"] == runs[1]["run"]
    assert len(runs[0]["store_keys"]) == 4
    rescored = run_score(tmp_path / "one", ["ladder:signs"], quiet=True)
    assert np.isfinite(scores(rescored, "ladder:signs")).all()


def test_several_references_one_after_the_other_give_the_same_bits(box, tmp_path):
    together = audit(box, tmp_path / "one", "a", "b")
    in_turn = audit(box, tmp_path / "other", "a", "b", models="in-turn")
    np.testing.assert_array_equal(scores(together, "sama"), scores(in_turn, "sama"))


def test_several_references_are_refused_where_they_mean_nothing(box, tmp_path):
    with pytest.raises(
        UsageError, match=r"'neighbor' cannot be computed here.*more of a reference"
    ):
        audit(box, tmp_path / "run", "a", "b", attacks=["neighbor"])
    with pytest.raises(UsageError, match="the same reference is given twice"):
        audit(box, tmp_path / "run", "a", "a")
    with pytest.raises(UsageError, match="--save-losses writes the losses of one reference"):
        audit(box, tmp_path / "run", "a", "b", save_losses=tmp_path / "losses.npz")
    assert not (tmp_path / "run").exists()


# --- with a tokenizer of its own -----------------------------------------------------------------

OWN: dict[str, Any] = {"reference_tokenizer": "own"}


def test_identical_tokenizers_give_the_same_bits_by_both_ways(box, tmp_path):
    names = ["sama", "ratio", "loss"]
    usual = audit(box, tmp_path / "usual", "a", attacks=names)
    own = audit(box, tmp_path / "own", "a", attacks=names, **OWN)
    for name in names:
        np.testing.assert_array_equal(scores(usual, name), scores(own, name))
    assert own.cost["passes_run"] == usual.cost["passes_run"]
    # Even the records in the store are the same: the spans are the tokens.
    stored = audit(box, tmp_path / "again", "a", **OWN, store=tmp_path / "usual" / "losses")
    assert stored.cost["passes_run"] == 0


def whole_losses(folder: model_folder.ModelFolder) -> Callable[..., np.ndarray]:
    """Losses of every token of one text, some of them hidden, by the whole network."""
    params, model = load(folder, local_layout(jax.devices()[:1]).shardings), folder.model

    @jax.jit
    def whole(tokens: Any, valid: Any) -> Any:
        logits = model.logits(params, model.hidden(params, tokens, valid))[0]
        return -jax.nn.log_softmax(jnp.float32(logits))

    def losses(ids: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        tokens, size = np.zeros((1, SETTINGS.max_length), np.int32), len(ids)
        tokens[0, :size] = np.where(hidden, model.mask_id, ids)
        valid = np.arange(SETTINGS.max_length)[None] < size
        return np.asarray(whole(tokens, valid))[np.arange(size), ids]

    return losses


def test_losses_of_another_tokenizer_are_sums_over_masked_spans(box, tmp_path):
    """Against the whole network on texts that are masked here, span by span."""
    audit(box, tmp_path / "run", "other", attacks=["sama"], **OWN)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    folders = [model_folder.open_folder(box / name) for name in ("target", "other")]
    given = [TextTokenizer.from_folder(f.path, f.model.vocab_size) for f in folders]
    whole = [whole_losses(folder) for folder in folders]
    views = read_index(tmp_path / "run" / INDEX, manifest["run"])[1]
    table = table_from_description(views["spans"], "here")
    tasks = tasks_of(attacks.select(["sama"]), SETTINGS, manifest["store_keys"], own_tokenizer=True)
    store = LossStore(tmp_path / "run" / "losses", writes=False)
    tables = {"text": table, "spans": table}
    readings = Readings(tasks, SETTINGS, tables, manifest["store_keys"], store)
    (task,), chosen = tasks.all, [2, 4]
    plan = readings.plan(task, chosen)
    found = {role: readings.values(task, chosen, role) for role in ("target", "reference")}
    wide = 0
    for place, row in enumerate(chosen):
        text = read_texts(box / "texts.jsonl").texts[row].text
        shared = shared_spans(*(t.tokens(text) for t in given), SETTINGS.max_length)
        assert shared is not None
        sides = zip(whole, (shared.ids, shared.tokens.reference_ids), found.items())
        for losses, ids, (role, values) in sides:
            spans = shared.tokens.of(role)
            wide += len(spans) - len(shared.special)
            for step, mask in enumerate(plan.masks[place]):
                hidden = mask[spans]
                sums = np.bincount(spans[hidden], losses(ids, hidden)[hidden], len(shared.special))
                read = np.flatnonzero(mask)
                assert len(read) > 0
                np.testing.assert_allclose(values[place, step, read], sums[read], rtol=1e-4)
                assert np.isnan(np.delete(values[place, step], read)).all()
    assert wide > 10


def test_another_tokenizer_is_part_of_the_run_and_of_its_first_lines(box, tmp_path):
    found = audit(box, tmp_path / "run", "other", attacks=["sama", "ratio", "loss"], **OWN)
    plain = audit(box, tmp_path / "plain", "a", attacks=["loss"])
    # What reads the target alone reads its own tokens.
    np.testing.assert_array_equal(scores(found, "loss"), scores(plain, "loss"))
    report = (tmp_path / "run" / "report.md").read_text()
    told = "- tokenizer of the reference: its own, not the target's"
    assert any(line.startswith(told) for line in report.splitlines()[:10])
    assert told in report.split("## Settings")[1]
    rescored = run_score(tmp_path / "run", ["ladder:calibrated"], quiet=True)
    assert np.isfinite(scores(rescored, "ladder:calibrated")).all()
    with pytest.raises(UsageError, match=r"'neighbor' cannot.* reads more of a reference"):
        run_score(tmp_path / "run", ["neighbor"], quiet=True)
    with pytest.raises(UsageError, match="another run"):
        audit(box, tmp_path / "plain", "a", **OWN)


def test_another_tokenizer_is_refused_unless_it_is_asked_for(box, tmp_path):
    with pytest.raises(ModelError, match=r"must tokenise alike.*--reference-tokenizer own"):
        audit(box, tmp_path / "run", "other")
    for name in ("its", "neighbor", "ratio:circulated", "dfmia"):
        with pytest.raises(UsageError, match=rf"'{name}' cannot be .* different tokenizers have"):
            audit(box, tmp_path / "run", "other", attacks=["sama", name], **OWN)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("needs --padding hidden", {"settings": replace(SETTINGS, padding="visible")}),
        ("--save-plan", {"save_plan": tmp_path / "plan.npz"}),
        ("--save-losses", {"save_losses": tmp_path / "losses.npz"}),
        ("needs one --reference, found 2", {"reference": [box / "other", box / "a"]}),
        ("needs exactly one, with the target's tokenizer", {"pipeline_control": True}),
    ]
    for message, changes in refused:
        with pytest.raises(UsageError, match=message):
            audit(box, tmp_path / "run", "other", **OWN, **changes)
    turns = read_texts(tiny.write_texts(tmp_path / "t.jsonl", ["karo"], labels=False), form=None)
    turn = Rendered((Piece("karo", True, True),), True)
    turns = turns._replace(texts=[turns.texts[0]._replace(rendered=turn)])
    with pytest.raises(UsageError, match="leave --template out"):
        audit(box, tmp_path / "run", "other", **OWN, texts=turns)
    assert not (tmp_path / "run").exists()


# --- of another family ---------------------------------------------------------------------------

A2D = {
    "model_type": "a2d-qwen3",
    "architectures": ["A2DQwen3LMHeadModel"],
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def of_family(path: Path, config: dict[str, Any], words: Tokenizer, mask: int) -> Path:
    """A folder with random weights of another network."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    full = {**config, **sizes, "vocab_size": tiny.VOCAB, "mask_token_id": mask}
    family = read_config(full, str(path))
    model = build_model(family, mask, np.dtype(np.float32))
    path.mkdir()
    params = jax.jit(model.init)(jax.random.key(7))
    saving.save_folder(path, params, model, full, path, family.weights)
    words.save(str(path / "tokenizer.json"))
    return path


def test_a_reference_of_another_family_with_the_same_tokens_is_read(box, tmp_path):
    of_family(box / "a2d", A2D, tiny.tokenizer(), tiny.MASK_ID)
    found = audit(box, tmp_path / "run", "a2d", attacks=["sama"])
    assert np.isfinite(scores(found, "sama")).all()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"] == []
    both = audit(box, tmp_path / "both", "a2d", "a", attacks=["sama"])
    assert np.isfinite(scores(both, "sama")).all()


def test_a_masked_model_as_a_reference_is_read_with_a_note(box, tmp_path):
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore
    words.normalizer = normalizers.BertNormalizer()  # pyright: ignore
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    words.train_from_iterator(tiny.texts(50), trainer)
    words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))  # pyright: ignore
    of_family(box / "bert", BERT, words, 3)
    found = audit(box, tmp_path / "run", "bert", attacks=["sama", "ratio"], **OWN)
    assert np.isfinite(scores(found, "sama")).all()
    (note,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert note.startswith("reference: it is a masked model, the target a diffusion one")


# --- each of several is judged -------------------------------------------------------------------


@pytest.mark.parametrize("of", ["target", "a"])
def test_a_reference_that_is_another_model_of_the_run_is_void_by_name(box, tmp_path, of: str):
    copy = tiny.same_weights(box / of, tmp_path / "copy")
    with pytest.raises(ValidityError, match=r"same_losses: .*copy.* give the same loss at 100"):
        run_audit(job(box, tmp_path / "run", reference=[box / "a", copy], attacks=["ratio"]))


def test_a_reference_that_learnt_nothing_is_void_beside_one_that_did():
    n = 40
    nothing = np.full(n, 6.0)
    found = Evidence(
        *(np.full(n, x) for x in (2.0, 4.0, 0.0)),
        np.zeros((n, 1)),
        np.zeros(1),
        {"reference": np.full(n, 2.0), "reference2": nothing},
    )
    assert found.of([1, 2]).references["reference2"].tolist() == [6.0, 6.0]
    gates = each_learnt(found, np.full(n, 5.0), "token", {"reference2": "reference2 b"})
    assert [(g["name"], g["status"]) for g in gates] == [("reference_learnt", "void")]
    assert "The reference2 b predicts" in gates[0]["sentence"]


def test_paths_may_be_words_and_nothing_else():
    assert _path("a/b") == Path("a/b")
    assert _path(["a", Path("b")]) == [Path("a"), Path("b")]
    assert _path(None) is None
    with pytest.raises(UsageError, match="expected a path"):
        _path(3)


def test_a_mask_of_no_reference_is_refused(box, tmp_path):
    with pytest.raises(UsageError, match="of a reference, and there is none"):
        audit(box, tmp_path / "run", attacks=["loss"], reference_attention_mask="clean:8")
