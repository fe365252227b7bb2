"""Audits of prompts and responses: prompts stay visible, answers are scored as PyTorch does."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from wrong_inputs import Box, as_flags, assert_one_line, run, scores

from sama_jax.cli import entry
from sama_jax.engine import loop
from sama_jax.engine.forward import LossScorer
from sama_jax.storage.loss_store import LossStore

TEXTS = tiny.texts(24, (3, 9))
PAIRS = [(prompt, answer.capitalize()) for prompt, answer in zip(TEXTS[:12], TEXTS[12:])]
FORMS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": lambda p, r: {
        "messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
    },
    "pairs": lambda p, r: {"prompt": p, "response": r},
    "alpaca": lambda p, r: {"instruction": p, "input": "", "output": r},
}
LENGTH = 32


def write(path: Path, made: Callable[[str, str], dict[str, Any]]) -> Path:
    rows = [{"id": f"t{i}", "label": (i + 1) % 2, **made(*pair)} for i, pair in enumerate(PAIRS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, oracle.Llada]]:
    place, found = tmp_path_factory.mktemp("responses"), {}
    for seed, name in enumerate(("target", "reference")):
        config = oracle.config(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, mlp_hidden_size=32)
        found[name] = oracle.random_folder(place / name, config, seed)
        tiny.tokenizer().save(str(place / name / "tokenizer.json"))
    for name, made in FORMS.items():
        write(place / f"{name}.jsonl", made)
    return place, found


@pytest.fixture(scope="module")
def box(models) -> Box:
    place = models[0]
    return Box(place, place / "target", place / "reference", place / "pairs.jsonl", place / "out")


FLAGS = {"template": "plain", "attacks": "sama,loss", "no_figures": True}


@pytest.fixture(scope="module")
def finished(box: Box) -> Path:
    saved = {"save_plan": box.path / "plan.npz", "save_losses": box.path / "losses.npz"}
    assert entry.main(box.command(**FLAGS, **saved)) == 0
    return box.out


def prompts(tokens: np.ndarray) -> np.ndarray:
    """Finds each text's prompt tokens by adding up bytes; a token of both sides is one of them."""
    made, found = tiny.tokenizer(), np.ones(tokens.shape, bool)
    for row, (prompt, response) in enumerate(PAIRS):
        own = tokens[row][tokens[row] >= 0].tolist()
        whole = made.encode(prompt + response).ids
        assert own == whole[len(whole) - len(own) :]
        starts = np.cumsum([0, *(len(made.id_to_token(i)) for i in whole)])[:-1]
        found[row, : len(own)] = (starts < len(prompt.encode()))[len(whole) - len(own) :]
    return found


def test_no_position_of_a_prompt_is_masked_in_the_plan_of_a_run(finished: Path, box: Box):
    plan = np.load(box.path / "plan.npz")
    hidden = prompts(plan["tokens"])
    assert plan["masks"].any(axis=(1, 2)).all()
    assert not (plan["masks"] & hidden[:, None]).any()
    assert not (plan["scored"] & hidden[:, None]).any()
    chosen = np.take_along_axis(
        hidden[:, None, None].repeat(plan["subsets"].shape[1], 1),
        np.maximum(plan["subsets"], 0).reshape(*plan["subsets"].shape[:2], 1, -1),
        axis=-1,
    )
    assert not (chosen & (plan["subsets"] >= 0).reshape(chosen.shape)).any()


def test_the_loss_of_a_response_is_that_of_pytorch(finished: Path, box: Box, models):
    plan, losses = np.load(box.path / "plan.npz"), np.load(box.path / "losses.npz")
    compared = 0
    for row, tokens in enumerate(plan["tokens"]):
        ids = torch.tensor(tokens[tokens >= 0].astype(np.int64))
        for step, mask in enumerate(plan["masks"][row][:, : len(ids)]):
            masked = torch.where(torch.tensor(mask), oracle.MASK_ID, ids)
            for name, module in models[1].items():
                logits, _ = module(masked[None])
                nll = torch.nn.functional.cross_entropy(logits[0], ids, reduction="none").numpy()
                ours = losses[name][row, step, : len(ids)]
                assert (np.isnan(ours) == ~mask).all()
                np.testing.assert_allclose(ours[mask], nll[mask], atol=1e-5, rtol=0)
                compared += int(mask.sum())
    assert compared > 100


@pytest.mark.parametrize("form", ["messages", "alpaca"])
def test_all_forms_of_the_same_pairs_have_the_same_scores(finished: Path, box: Box, form, tmp_path):
    command = box.command(**FLAGS, data=box.path / f"{form}.jsonl", out=tmp_path / "out")
    assert entry.main(command) == 0
    assert scores(tmp_path / "out") == scores(finished)


def test_passes_of_other_attacks_leave_prompts_visible(box: Box, tmp_path: Path, monkeypatch):
    seen: dict[str, int] = {}
    original = loop.calls_of

    def watched(jobs, readings, *more):
        for call in original(jobs, readings, *more):
            view, rows = call.job.task.view, call.job.batch.rows
            table = readings.tables[view]
            for place, row in enumerate(rows):
                if row < 0:
                    continue
                open_ = np.zeros(call.job.batch.length + LENGTH, bool)
                start = table.offsets[row]
                open_[start : start + len(table.maskable[row])] = table.maskable[row]
                if isinstance(call.function, LossScorer):
                    masks = np.asarray(call.args[0].masks)[:, place]
                else:
                    masks = np.asarray(call.args[-1])[place][None]
                assert masks.any()
                assert not (masks & ~open_[: masks.shape[1]]).any()
                if view == "text":
                    assert not open_[0]  # a prompt begins every text
                seen[view] = seen.get(view, 0) + 1
            yield call

    monkeypatch.setattr(loop, "calls_of", watched)
    flags = {**FLAGS, "attacks": "lowercase,infill,recall,recall:circulated", "out": tmp_path / "o"}
    more = ["--set", "prefix.shots=2", "--set", "prefix.tokens=8"]
    assert entry.main([*box.command(**flags), *more]) == 0
    assert {"text", "lowercase", "after-nonmembers-8"} <= set(seen)
    # The circulated form masks what stands before the scored text, so it has no score here.
    rows = scores(tmp_path / "o")
    assert {row["scores"]["recall:circulated"] for row in rows} == {None}
    assert sum(row["scores"]["infill"] is not None for row in rows) >= 6


CHANGES: dict[str, dict[str, Any]] = {
    "template": {"template": "chatml"},
    "loss on the text": {"loss_on": "text"},
    "end tokens": {"template": "chatml", "end_tokens": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_of_another_template_or_span_is_another_run(finished, box: Box, capsys, change: str):
    before = scores(finished)
    assert_one_line(
        run(capsys, box.command(**{**FLAGS, **CHANGES[change]})), 2, "belongs to another run"
    )
    assert scores(finished) == before


def test_a_store_keeps_answers_and_whole_texts_apart(finished: Path, box: Box, tmp_path: Path):
    """The same tokens under two spans share no record."""
    store = {"store": tmp_path / "store"}
    for on in ("response", "text", None):
        out = {"out": tmp_path / str(on), "store": store["store"] if on else None}
        assert entry.main(box.command(**FLAGS, loss_on=on, **out)) == 0
    assert scores(tmp_path / "response") == scores(tmp_path / "None") == scores(finished)
    assert scores(tmp_path / "text") != scores(finished)
    with contextlib.closing(LossStore(tmp_path / "store")) as records:
        names = {text for _, _, text in records.keys()}  # noqa: SIM118
    assert len(names) == 2 * len(PAIRS)


def test_a_plan_that_masks_a_prompt_is_refused(finished: Path, box: Box, tmp_path: Path, capsys):
    flat = tmp_path / "flat.npz"
    options = {**FLAGS, "attacks": "sama", "out": tmp_path / "flat"}
    assert entry.main(box.command(**options, loss_on="text", save_plan=flat)) == 0
    found = run(capsys, box.command(**options | {"out": tmp_path / "new"}, plan=flat))
    assert_one_line(found, 3, "masks the prompt of text 't0'")
    again = options | {"out": tmp_path / "again"}
    assert entry.main(box.command(**again, plan=box.path / "plan.npz")) == 0
    ours, theirs = (
        [r["scores"]["sama"] for r in scores(out)] for out in (tmp_path / "again", finished)
    )
    assert ours == theirs


def test_nll_of_a_response_reads_its_tokens_alone(box: Box, tmp_path: Path, capsys):
    flags = {
        "model": box.target,
        "data": box.data,
        "out": tmp_path / "nll",
        "template": "plain",
        "passes": 4,
        "max_length": LENGTH,
        "quiet": True,
    }
    assert entry.main(["nll", *as_flags(flags)]) == 0
    rows = list(map(json.loads, (tmp_path / "nll" / "nll.jsonl").read_text().splitlines()))
    plan = np.load(box.path / "plan.npz")
    assert [r["n_tokens"] for r in rows] == (~prompts(plan["tokens"])).sum(axis=1).tolist()
    wrong = flags | {"template": None, "loss_on": "text"}
    assert_one_line(run(capsys, ["nll", *as_flags(wrong)]), 2, "give their --template, too")
