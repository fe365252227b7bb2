"""The report of a run folder: what it says, what it must not say, what it survives."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from score_rows import SECRET, make_rows

from sama_jax.errors import OutputError, UsageError
from sama_jax.reporting import report, results
from sama_jax.reporting.markdown import markdown

pytestmark = pytest.mark.usefixtures("figures")


def make_folder(folder, rows, with_metrics=True, **manifest):
    content = {"seed": 42, "preset": "default", "target": "models/tiny", "gates": []} | manifest
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if with_metrics:
        (folder / "metrics.json").write_text(json.dumps(results.compute_metrics(rows)))
    return folder


def text_of(folder, **flags):
    """Writes the report and returns report.md; report.html has a test file of its own."""
    assert report.write_report(folder, **flags) == folder / "report.html"
    return (folder / "report.md").read_text()


def test_a_report_without_figures_links_none(tmp_path):
    folder = make_folder(tmp_path, make_rows())
    text = text_of(folder, figures=False)
    assert not (folder / "figures").exists()
    assert "figures/" not in text
    assert "figures/roc.png" in text_of(folder)
    assert (folder / "figures" / "roc.png").is_file()


def test_report_holds_numbers_and_figures_but_no_text_and_no_id(tmp_path):
    rows = make_rows()
    text = text_of(make_folder(tmp_path, rows, notes=["a_b *c* <script>"]))
    assert SECRET not in text
    assert "secret-id" not in text
    assert "120 (60 members, 60 non-members)" in text
    assert "12 texts cut at the maximum length" in text
    assert "arXiv 2601.20125 (ICLR 2026)" in text
    assert "independent implementation" in text
    assert "- a\\_b \\*c\\* \\<script\\>" in text
    for link in re.findall(r"\]\((.*?)\)", text):
        with Image.open(tmp_path / link) as image:
            image.verify()
            assert image.width > 400
    assert len(re.findall(r"!\[", text)) == 2
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("adapter", ["adapters/one", ["adapters/one", "adapters/two"]])
def test_a_report_names_the_adapters_of_the_target(tmp_path, adapter):
    folder = make_folder(tmp_path, make_rows(), adapter=adapter, reference="models/tiny")
    shown = adapter if isinstance(adapter, str) else ", ".join(adapter)
    assert f"adapter: `{shown}`" in text_of(folder, figures=False)
    assert shown in (folder / "report.html").read_text()


def test_report_without_labels_has_scores_but_no_roc(tmp_path):
    text = text_of(make_folder(tmp_path, make_rows(labelled=False)))
    assert "roc.png" not in text
    assert not (tmp_path / "figures/roc.png").exists()
    assert (tmp_path / "figures/scores.png").exists()
    assert "120 without a label" in text
    assert "nothing can be said" in text


def test_report_computes_metrics_that_the_run_did_not_write(tmp_path):
    rows = make_rows()
    with_file, without = tmp_path / "a", tmp_path / "b"
    for folder, present in ((with_file, True), (without, False)):
        folder.mkdir()
        report.write_report(make_folder(folder, rows, with_metrics=present))
    assert (with_file / "report.md").read_text() == (without / "report.md").read_text()


def test_report_computes_its_numbers_from_the_scores(tmp_path):
    folder = make_folder(tmp_path, make_rows())
    before = text_of(folder)
    content = json.loads((folder / "metrics.json").read_text())
    content["attacks"]["sama"]["auc"] = 0.123456
    (folder / "metrics.json").write_text(json.dumps(content))
    assert text_of(folder) == before


@pytest.mark.parametrize(
    "values",
    [[1.0] * 20, [0.0] * 19 + [1e9], [3e-12] * 10 + [0.0] * 10, [None] * 20],
    ids=["constant", "one outlier", "tiny", "none"],
)
def test_odd_scores_still_make_a_report(tmp_path, values):
    rows = make_rows(n=10, attacks=("sama",))
    for row, value in zip(rows, values):
        row["scores"]["sama"] = value
    text = text_of(make_folder(tmp_path, rows))
    assert ("figures/scores.png" in text) == (values[0] is not None)


def test_each_note_is_printed_once_with_its_attacks():
    rows = make_rows()
    rows[0]["scores"]["loss"] = None
    text = markdown(rows, results.compute_metrics(rows), {})
    assert text.count("needs at least 99 non-members, there are 60.") == 1
    assert "All attacks: TPR at 1 % FPR needs" in text
    assert "`loss`: 1 text with a label but no score left out." in text


@pytest.mark.parametrize("command", [["sama-jax", "audit", "--out", "a `b`|c"], "plain words"])
def test_manifest_values_cannot_break_the_markdown(command):
    rows = make_rows(n=2)
    manifest = {"target": "x\n# heading", "versions": {"jax": "0.10"}, "command": command}
    text = markdown(rows, results.compute_metrics(rows), manifest)
    assert "\n# heading" not in text
    assert "versions: `jax 0.10`" in text
    expected = (
        "``sama-jax audit --out 'a `b`|c'``" if isinstance(command, list) else "`plain words`"
    )
    assert f"command: {expected}\n" in text


@pytest.mark.parametrize("missing", ["manifest.json", "scores.jsonl"])
def test_a_folder_that_is_not_a_run_is_a_usage_error_that_says_what_to_run(tmp_path, missing):
    make_folder(tmp_path, make_rows(n=2))
    (tmp_path / missing).unlink()
    with pytest.raises(UsageError, match=f"has no {missing}; run `sama-jax audit") as error:
        report.write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.md").exists()


def test_a_folder_that_does_not_exist_is_a_usage_error():
    with pytest.raises(UsageError, match="not a finished run"):
        report.write_report(Path("/nowhere/at/all"))


def test_a_broken_line_is_named(tmp_path):
    make_folder(tmp_path, make_rows(n=2))
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"id": "cut of')
    with pytest.raises(UsageError, match=r"scores\.jsonl: line 5 is not whole"):
        report.write_report(tmp_path)


def test_line_separators_inside_an_id_do_not_split_a_line(tmp_path):
    rows = make_rows(n=2)
    make_folder(tmp_path, rows)
    rows[0]["id"] = "a\u2028b"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "scores.jsonl").write_text("".join(lines), encoding="utf-8")
    assert "texts: 4 " in text_of(tmp_path)


def test_a_report_that_cannot_be_written_is_an_output_error(tmp_path):
    folder = make_folder(tmp_path, make_rows(n=2))
    (folder / "figures").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot write"):
        report.write_report(folder)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, make_rows(n=2))
    old = text_of(folder)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        report.write_report(folder)
    assert (folder / "report.md").read_text() == old
    assert not list(folder.rglob("*.part"))


def test_lines_that_lack_or_stand_twice_are_no_report(tmp_path):
    make_folder(tmp_path, make_rows(n=3))
    scores, manifest = tmp_path / "scores.jsonl", tmp_path / "manifest.json"
    lines = scores.read_text().splitlines(keepends=True)
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(found | {"run": {"texts": len(lines)}}))
    report.write_report(tmp_path)
    for damaged in (lines[:-1], [*lines, lines[0]], [*lines[:-1], lines[0]], []):
        scores.write_text("".join(damaged))
        with pytest.raises(UsageError, match="not one for each of 6 texts"):
            report.write_report(tmp_path)


def test_a_run_that_was_interrupted_is_no_finished_run(tmp_path):
    make_folder(tmp_path, make_rows(n=2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    with pytest.raises(UsageError, match="not a finished run: it was interrupted"):
        report.write_report(tmp_path)


def test_control_characters_in_a_manifest_reach_no_terminal(tmp_path):
    make_folder(tmp_path, make_rows(n=2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    changes = {"notes": ["\x1b[31mred \x07"], "command": "sama-jax \x1b]0;title\x07", "seed": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | changes))
    text = text_of(tmp_path)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b" in text
