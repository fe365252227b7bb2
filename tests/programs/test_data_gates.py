"""The gates about the texts of an audit, asked of its inputs as a run reads them."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from fuzz import seeds

from sama_jax.config import AuditSettings
from sama_jax.programs.audit_inputs import Inputs, Prefixes, Tokenised, read_inputs, tokenise
from sama_jax.programs.data_gates import data_gates
from sama_jax.programs.jobs import AuditJob
from sama_jax.texts.read import read_texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("gates")
    for seed, name in enumerate(("target", "reference")):
        tiny.folder(base / name, seed=seed, weight_tying=False)
    return base


def read(
    folders: Path, path: Path, taken: set[str], **prefixes
) -> tuple[AuditJob, Inputs, Tokenised]:
    models = {"target": folders / "target", "reference": folders / "reference"}
    settings = AuditSettings(max_length=32)
    job = AuditJob(
        **models,
        texts=read_texts(path),
        out=path / "out",
        settings=settings,
        quiet=True,
        **prefixes,
    )
    inputs = read_inputs(job)
    return job, inputs, tokenise(job, inputs, Prefixes({}, taken), quiet=True)


def statuses(given: tuple[AuditJob, Inputs, Tokenised]) -> dict[str, str]:
    return {one["name"]: one["status"] for one in data_gates(*given).gates}


def test_fair_texts_raise_no_gate_and_scores_stand_beside_their_texts(
    folders: Path, tmp_path: Path
):
    path = tiny.write_texts(tmp_path / "t.jsonl", tiny.texts(41, (20, 40), seed=3))
    given = read(folders, path, {"t0"})
    found = statuses(given)
    assert set(found.values()) == {"pass", "not run"}
    assert [name for name, status in found.items() if status == "not run"] == [
        "too_few",
        "random_split",
    ]
    best = data_gates(*given).blind
    assert best is not None
    assert np.isnan(best.scores).tolist() == [True] + [False] * 40


def test_what_is_wrong_with_texts_is_found_by_name(folders: Path, tmp_path: Path):
    texts = tiny.texts(40, (28, 30), seed=4)
    rows = [{"text": f"{text} ka{i}", "label": i % 2} for i, text in enumerate(texts)]
    rows += [{"text": rows[i]["text"], "label": 1 - i % 2} for i in range(4)]
    rows += [{"text": rows[5]["text"], "label": 1}]
    rows += [{"text": f"{rows[i]['text']} mi", "label": 1 - i % 2} for i in range(8, 14)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prefixes = tmp_path / "p.jsonl"
    prefixes.write_text(json.dumps({"text": f"{rows[20]['text']} te", "label": 0}) + "\n")
    found = statuses(read(folders, path, set(), prefixes=read_texts(prefixes)))
    assert found["contradictions"] == found["near_duplicates"] == found["overlap"] == "void"
    assert found["duplicates"] == found["prefixes"] == "warn"


def test_texts_without_labels_are_asked_what_needs_none(folders: Path, tmp_path: Path):
    path = tiny.write_texts(tmp_path / "t.jsonl", [*tiny.texts(4), ""], labels=False)
    given = read(folders, path, set())
    found = statuses(given)
    assert found == {"mask_tokens": "pass", "empty_texts": "warn", "duplicates": "pass"}
    assert data_gates(*given).blind is None


def test_a_next_token_model_has_no_mask_token_that_a_text_could_spell(tmp_path: Path):
    for name, theta in (("target", 1e4), ("reference", 1e5)):
        config = {**seeds.DECODER, "model_type": "llama", "rope_theta": theta}
        del config["mask_token_id"]
        seeds.model(tmp_path / name, config)
    # The first id of this tokenizer, which is what a model without a mask token says it is.
    texts = [f"<|endoftext|>{text}" for text in tiny.texts(4)]
    path = tiny.write_texts(tmp_path / "t.jsonl", texts, labels=False)
    given = read(tmp_path, path, set())
    assert 0 in given[2].encoded[0].ids
    assert "mask_tokens" not in statuses(given)
