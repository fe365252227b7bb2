"""The report of a run folder: what it says, what it must not say, what it survives."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sama_jax.core import metrics
from sama_jax.errors import OutputError, UsageError
from sama_jax.reporting import report

pytestmark = pytest.mark.usefixtures("figures")
SECRET = "the quick brown fox must never be quoted"


def make_rows(n=60, attacks=("sama", "loss"), labelled=True, shift=1.0, seed=0):
    """`n` members, then `n` non-members; the first attack is shifted, the others are noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(2 * n):
        member = int(i < n)
        scores = {a: float(rng.normal(shift * member * (a == attacks[0]))) for a in attacks}
        rows.append(
            {
                "id": f"secret-id-{i}",
                "label": member if labelled else None,
                "n_tokens": 40,
                "truncated": i % 10 == 0,
                "status": "ok",
                "scores": scores,
                "passes": dict.fromkeys(attacks, 16),
                "text": SECRET,
            }
        )
    return rows


def make_folder(folder, rows, with_metrics=True, **manifest):
    content = {"seed": 42, "preset": "default", "target": "models/tiny"} | manifest
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if with_metrics:
        (folder / "metrics.json").write_text(json.dumps(report.compute_metrics(rows, 42)))
    return folder


def test_a_report_without_figures_links_none(tmp_path):
    folder = make_folder(tmp_path, make_rows())
    text = report.write_report(folder, figures=False).read_text()
    assert not (folder / "figures").exists()
    assert "figures/" not in text
    assert "figures/roc.png" in report.write_report(folder).read_text()
    assert (folder / "figures" / "roc.png").is_file()


def test_metrics_are_those_of_each_attack_in_order():
    rows = make_rows(attacks=("zlib", "sama", "loss"))
    content = report.compute_metrics(rows, seed=3)
    assert list(content["attacks"]) == ["zlib", "sama", "loss"]
    labels = [row["label"] for row in rows]
    for name, summary in content["attacks"].items():
        scores = [row["scores"][name] for row in rows]
        assert summary == metrics.summarize(scores, labels, seed=3)


def test_metrics_are_empty_without_labels():
    assert report.compute_metrics(make_rows(labelled=False), 0) == {"attacks": {}}
    assert report.compute_metrics([], 0) == {"attacks": {}}


def test_unlabelled_and_unscored_texts_do_not_count():
    rows = make_rows()
    expected = report.compute_metrics(rows, 0)["attacks"]["loss"]
    extra = [
        {"id": "a", "scores": {"sama": 9.0, "loss": 9.0}},
        {"id": "b", "label": 1, "status": "empty", "scores": {"sama": 1.0, "loss": None}},
        {"id": "c", "label": 0, "status": "empty", "scores": {"sama": 1.0}},
    ]
    actual = report.compute_metrics(rows + extra, 0)["attacks"]["loss"]
    assert actual["notes"][-1] == "2 texts with a label but no score left out."
    actual["notes"].pop()
    assert actual == expected


def test_paired_differences_compare_sama_with_each_other_attack_on_common_texts():
    rows = make_rows(attacks=("sama", "loss", "zlib"))
    rows[0]["scores"]["loss"] = None
    paired = report.compute_metrics(rows, 7)["paired"]
    assert list(paired) == ["sama - loss", "sama - zlib"]
    common = rows[1:]
    difference, low, high = metrics.paired_difference(
        [row["scores"]["sama"] for row in common],
        [row["scores"]["loss"] for row in common],
        [row["label"] for row in common],
        seed=7,
    )
    assert paired["sama - loss"] == {
        "difference": difference,
        "ci": [low, high],
        "n_members": 59,
        "n_nonmembers": 60,
    }
    assert "paired" not in report.compute_metrics(make_rows(attacks=("loss", "zlib")), 7)


def test_table_shows_the_numbers_and_a_dash_where_there_is_none():
    rows = make_rows()
    rows[3]["passes"]["loss"] = 4
    rows[4]["scores"]["loss"], rows[4]["passes"]["loss"] = None, 0  # not scored: does not count
    content = report.compute_metrics(rows, 0)
    sama, loss = report.table_rows(content, rows, {"seconds": {"sama": 12.34}})
    summary = content["attacks"]["sama"]
    low, high = summary["auc_ci"]
    assert sama[0] == "sama"
    assert sama[1] == f"{summary['auc']:.3f} ({low:.3f}–{high:.3f})"
    assert sama[2].startswith(f"{100 * summary['tpr_at_fpr']['0.1']['tpr']:.1f} %")
    assert sama[3:] == [report.MISSING, "16", "12.3"]  # 60 non-members: no TPR at 1 %
    assert loss[4:] == ["4–16", report.MISSING]


def test_table_without_labels_lists_the_attacks():
    rows = make_rows(labelled=False)
    cells = report.table_rows({"attacks": {}}, rows)
    assert [row[0] for row in cells] == ["sama", "loss"]
    assert {cell for row in cells for cell in row[1:4]} == {report.MISSING}


def test_terminal_table_keeps_every_cell_whole_in_80_columns():
    rows = make_rows(n=120)
    content = report.compute_metrics(rows, 0)
    cost = {"seconds": {"sama": 1234.5, "loss": 99.9}}
    console = Console(width=80, file=io.StringIO())
    console.print(report.metrics_table(content, rows, cost))
    printed = console.file.getvalue()
    for cells in report.table_rows(content, rows, cost):
        pattern = r"\s+".join(re.escape(cell) for cell in cells)
        assert re.search(pattern, printed), printed


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (2.0, "tells members from non-members better than guessing"),
        (0.0, "cannot be told from guessing"),
        (-2.0, "ranks members below non-members"),
    ],
)
def test_headline_follows_the_interval_of_the_auc(shift, words):
    text = report.headline(report.compute_metrics(make_rows(attacks=("sama",), shift=shift), 0))
    assert words in text
    assert "not proof of safety" in text
    assert "not calibrated" in text


def test_headline_names_the_strongest_attack_and_its_share_of_members():
    content = report.compute_metrics(make_rows(attacks=("zlib", "sama"), shift=2.0), 0)
    text = report.headline(content)
    share = content["attacks"]["zlib"]["tpr_at_fpr"]["0.1"]["tpr"]
    assert text.startswith("The strongest attack, zlib,")
    assert f"finds {100 * share:.0f} % of the members" in text


def test_headline_is_silent_about_a_tpr_that_does_not_exist():
    content = report.compute_metrics(make_rows(n=8, attacks=("sama",), shift=6.0), 0)
    assert "better than guessing" in report.headline(content)
    assert "of the members while" not in report.headline(content)


def test_report_holds_numbers_and_figures_but_no_text_and_no_id(tmp_path):
    rows = make_rows()
    path = report.write_report(make_folder(tmp_path, rows, notes=["a_b *c* <script>"]))
    text = path.read_text()
    assert path == tmp_path / "report.md"
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


def test_report_without_labels_has_scores_but_no_roc(tmp_path):
    path = report.write_report(make_folder(tmp_path, make_rows(labelled=False)))
    text = path.read_text()
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


def test_report_prefers_the_metrics_of_the_run(tmp_path):
    folder = make_folder(tmp_path, make_rows())
    content = json.loads((folder / "metrics.json").read_text())
    content["attacks"]["sama"]["auc"] = 0.123456
    (folder / "metrics.json").write_text(json.dumps(content))
    assert "0.123" in report.write_report(folder).read_text()


def test_figures_are_the_same_bytes_for_the_same_scores(tmp_path):
    rows = make_rows()
    first = [p.read_bytes() for p in report.write_figures(tmp_path / "a", rows)]
    second = [p.read_bytes() for p in report.write_figures(tmp_path / "b", rows)]
    other = [p.read_bytes() for p in report.write_figures(tmp_path / "c", make_rows(seed=1))]
    assert len(first) == 2
    assert first == second
    assert all(a != b for a, b in zip(first, other))


@pytest.mark.parametrize(
    "values",
    [[1.0] * 20, [0.0] * 19 + [1e9], [3e-12] * 10 + [0.0] * 10, [None] * 20],
    ids=["constant", "one outlier", "tiny", "none"],
)
def test_odd_scores_still_make_a_report(tmp_path, values):
    rows = make_rows(n=10, attacks=("sama",))
    for row, value in zip(rows, values):
        row["scores"]["sama"] = value
    text = report.write_report(make_folder(tmp_path, rows)).read_text()
    assert ("figures/scores.png" in text) == (values[0] is not None)


def test_histogram_range_keeps_a_few_outliers_from_squeezing_the_rest():
    scores = np.r_[np.linspace(-1, 1, 99), 1e6]
    low, high, clipped = report._score_range(scores)
    assert clipped
    assert (low, high) == (-1, pytest.approx(3.5, abs=0.1))  # 0.5 + 3 quartile ranges of 1
    assert report._score_range(scores[:-1]) == (-1, 1, False)


def test_many_attacks_fit_in_the_figures(tmp_path):
    attacks = tuple(f"attack{i}" for i in range(17))
    paths = report.write_figures(tmp_path, make_rows(n=12, attacks=attacks))
    assert [p.name for p in paths] == ["roc.png", "scores.png"]


def test_each_note_is_printed_once_with_its_attacks():
    rows = make_rows()
    rows[0]["scores"]["loss"] = None
    text = report.markdown(rows, report.compute_metrics(rows, 0), {})
    assert text.count("needs at least 100 non-members, there are 60.") == 1
    assert "All attacks: TPR at 1 % FPR needs" in text
    assert "`loss`: 1 text with a label but no score left out." in text


@pytest.mark.parametrize("command", [["sama-jax", "audit", "--out", "a `b`|c"], "plain words"])
def test_manifest_values_cannot_break_the_markdown(command):
    rows = make_rows(n=2)
    manifest = {"target": "x\n# heading", "versions": {"jax": "0.10"}, "command": command}
    text = report.markdown(rows, report.compute_metrics(rows, 0), manifest)
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
    with pytest.raises(UsageError, match=r"scores\.jsonl line 5 is not a JSON object"):
        report.write_report(tmp_path)


def test_line_separators_inside_an_id_do_not_split_a_line(tmp_path):
    rows = make_rows(n=2)
    make_folder(tmp_path, rows)
    rows[0]["id"] = "a\u2028b"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "scores.jsonl").write_text("".join(lines), encoding="utf-8")
    assert "texts: 4 " in report.write_report(tmp_path).read_text()


def test_a_report_that_cannot_be_written_is_an_output_error(tmp_path):
    folder = make_folder(tmp_path, make_rows(n=2))
    (folder / "figures").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot write"):
        report.write_report(folder)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, make_rows(n=2))
    old = report.write_report(folder).read_text()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        report.write_report(folder)
    assert (folder / "report.md").read_text() == old
    assert not list(folder.rglob("*.part"))
