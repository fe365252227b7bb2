"""Comparisons and watches agree with audits made one by one; the reference is read once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from wrong_inputs import Box, assert_one_line, run, scores

from sama_jax.core import metrics as measure
from sama_jax.programs import compare
from sama_jax.reporting import comparison
from sama_jax.storage.loss_store import LossStore
from sama_jax.validity.gate import gate


@pytest.fixture(scope="module")
def watched(originals: Path, figures: None) -> Path:
    """Three checkpoints, and a watch of them, made in two goes."""
    checkpoints = originals / "checkpoints"
    for step, seed in ((5, 11), (100, 12)):
        tiny.folder(checkpoints / f"checkpoint-{step}", seed=seed)
    box = Box(originals, checkpoints, originals / "reference", originals / "texts.jsonl", originals)
    command = watch_command(box, originals / "watch")
    assert in_process(command) == 0
    tiny.folder(checkpoints / "checkpoint-20", seed=13)
    assert in_process(command) == 0
    return originals / "watch"


def watch_command(box: Box, out: Path) -> list[str]:
    command = box.command(out=out, target=None, attacks="sama,loss")
    return ["watch", str(box.target), *command[1:]]


def in_process(command: list[str]) -> int:
    from sama_jax.cli import entry

    return entry.main(command)


def test_checkpoints_are_compared_in_the_order_of_their_numbers(watched: Path):
    found = json.loads((watched / "comparison.json").read_text())
    names = [line["name"] for line in found["runs"]]
    assert names == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    page = (watched / "comparison.html").read_text()
    assert "<svg" in page
    assert "https://" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_watch_is_the_audits_one_by_one_and_reads_the_reference_once(
    watched: Path, originals: Path, box: Box, capsys
):
    target = originals / "checkpoints" / "checkpoint-20"
    assert run(capsys, box.command(target=target, attacks="sama,loss")).code == 0
    assert scores(box.out) == scores(watched / "checkpoint-20")
    manifest = json.loads((watched / "checkpoint-20" / "manifest.json").read_text())
    store = LossStore(watched / "losses", writes=False)
    assert len(store) == store.num_records  # nothing was computed twice
    kept, alone = store.keys(), LossStore(box.out / "losses", writes=False).keys()
    key = manifest["store_keys"]["reference"]
    assert sum(key in one for one in kept) == sum(key in one for one in alone) > 0
    protocol = json.loads((watched / "checkpoint-20" / "protocol.json").read_text())
    assert protocol["stored"] is False


def test_a_watch_saves_its_flags_and_reads_the_template_of_its_checkpoints(box: Box, capsys):
    folder = box.path / "checkpoints" / "step-1"
    shutil.copytree(box.target, folder)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    rows = [{"prompt": "karo mite", "response": text} for text in tiny.texts(12, (8, 12))]
    lines = [json.dumps({**row, "label": i % 2}) + "\n" for i, row in enumerate(rows)]
    (box.path / "pairs.jsonl").write_text("".join(lines))
    command = watch_command(box._replace(target=folder.parent), box.path / "watch")
    command[command.index("--data") + 1] = str(box.path / "pairs.jsonl")
    saved = box.path / "saved.yaml"
    said = run(capsys, [*command, "--template", "folder", "--dry-run", "--save-config", str(saved)])
    assert said.code == 0, said.err
    kept = yaml.safe_load(saved.read_text())
    assert kept["template"] == "folder"
    assert "target" not in kept


def test_each_difference_is_that_of_the_same_texts(watched: Path):
    lines = json.loads((watched / "comparison.json").read_text())["runs"]
    rows = [scores(watched / line["name"]) for line in lines]
    labels = np.array([row["label"] for row in rows[0]])
    for attack in ("sama", "loss"):
        columns = [np.array([row["scores"][attack] for row in own]) for own in rows]
        for line, column in zip(lines, columns):
            cell = line["attacks"][attack]
            assert cell["auc"] == measure.auc(column, labels)
            expected = measure.paired_difference(column, columns[0], labels)
            if line is lines[0]:
                assert cell["difference"] is None
            else:
                assert [cell["difference"], *cell["difference_ci"]] == pytest.approx(expected)


def test_other_texts_and_unfinished_runs_are_refused(watched: Path, box: Box, capsys):
    one, other = watched / "checkpoint-5", box.out
    tiny.write_texts(box.path / "others.jsonl", tiny.texts(20, (8, 28), seed=9))
    assert run(capsys, box.command(data=box.path / "others.jsonl")).code == 0
    assert_one_line(run(capsys, ["compare", str(one), str(other)]), 2, "not of the same texts")
    assert_one_line(run(capsys, ["compare", str(one)]), 2, "at least two runs")
    assert_one_line(run(capsys, ["compare", str(one), str(one)]), 2, "given twice")
    (other / "scores.jsonl").unlink()
    assert_one_line(run(capsys, ["compare", str(one), str(other)]), 2, "not a finished run")
    bad = watch_command(box, box.path / "watch")
    assert_one_line(run(capsys, [*bad, "--adapter", "a"]), 2, "--adapter is of one audit")
    empty = box.path / "empty"
    empty.mkdir()
    assert_one_line(run(capsys, [bad[0], str(empty), *bad[2:]]), 2, "holds no folder with")


def test_a_void_run_and_another_seed_are_said_first(watched: Path, box: Box, capsys):
    for name in ("checkpoint-5", "checkpoint-20"):
        shutil.copytree(watched / name, box.path / name)
    file = box.path / "checkpoint-20" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["run"]["seed"] = 7
    made = gate("made_up", "void", "This is made up.", "Nothing.")
    manifest["gates"] = [*manifest["gates"], made]
    file.write_text(json.dumps(manifest))
    out = box.path / "compared"
    given = ["compare", str(box.path / "checkpoint-5"), str(box.path / "checkpoint-20")]
    said = run(capsys, [*given, "--out", str(out)])
    assert said.code == 5
    first, second, *_ = said.out.splitlines()
    assert first.startswith("void: checkpoint-20")
    assert "in more than its target: seed" in second
    page = (out / "comparison.html").read_text()
    assert page.index("void: checkpoint-20") < page.index("<table>")
    (out / "comparison.json").write_text("{}")
    said = run(capsys, [*given, "--out", str(out)])
    assert said.code == 2
    assert "not written by this command" in said.err


def test_numbers_in_names_count_as_numbers(tmp_path: Path):
    for name in ("step-10", "step-9", "step-9b", "notes"):
        (tmp_path / name).mkdir()
        if name != "notes":
            (tmp_path / name / "adapter_config.json").write_text("{}")
    found = [path.name for path in compare.checkpoints_of(tmp_path)]
    assert found == ["step-9", "step-9b", "step-10"]


def test_a_watch_ends_with_what_is_void_and_passes_over_what_is_not_whole(box: Box, capsys):
    checkpoints = box.path / "checkpoints"
    shutil.copytree(box.reference, checkpoints / "step-0")
    for step in (1, 2):
        tiny.folder(checkpoints / f"step-{step}", seed=20 + step)
    command = [*watch_command(box._replace(target=checkpoints), box.out), "--quiet"]
    command[command.index("--attacks") + 1] = "loss"
    said = run(capsys, command)
    assert_one_line(said, 5, "1 checkpoint has no valid result; step-0:")
    found = json.loads((box.out / "comparison.json").read_text())
    assert [line["name"] for line in found["runs"]] == ["step-1", "step-2"]
    assert "same model" in found["without_result"]["step-0"]
    assert "no result: step-0" in (box.out / "comparison.html").read_text()
    shutil.rmtree(checkpoints / "step-0")
    (checkpoints / "step-1" / "model.safetensors").unlink()
    said = run(capsys, command)
    assert_one_line(said, 4, "1 checkpoint has no valid result; step-1:")
    assert (box.out / "step-2" / "scores.jsonl").is_file()
    (checkpoints / "step-2" / "adapter_config.json").write_text("{}")
    assert_one_line(run(capsys, command), 2, "is a whole model or an adapter")
    (checkpoints / "step-2").rename(checkpoints / "losses")
    (checkpoints / "losses" / "adapter_config.json").unlink()
    assert_one_line(run(capsys, command), 2, "give this one another name")


def test_another_mask_of_the_target_is_more_than_another_target():
    runs = [
        compare.Finished("a", [], {"run": {"target.weights": w, "target.attention_mask": m}}, {})
        for w, m in (("x", "full"), ("y", "clean:8"))
    ]
    assert comparison._differs(*runs) == ["target.attention_mask"]
