"""report.html: what it says, what stays text, that it loads nothing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from score_rows import SECRET, make_rows

from sama_jax.core.spread import spread
from sama_jax.reporting import html, report, results
from sama_jax.storage.run_folder import DENSITIES
from sama_jax.validity.gate import gate

pytestmark = pytest.mark.usefixtures("figures")

EVIL = "<script>alert(1)</script>"
VOID = {"br", "hr", "img", "link", "meta"}


class Page(HTMLParser):
    """The elements and the text of a page; refuses tags that do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def written(rows, figures=(), gates=(), **manifest: Any) -> tuple[str, Page]:
    metrics = results.compute_metrics(rows, None, gates)
    text = html.html(rows, metrics, manifest, figures)
    return text, Page(text)


def a_spread():
    rng = np.random.default_rng(1)
    labels = np.array([0, 1] * 20)
    return spread(rng.normal(size=(40, 3)), np.array([0.05, 0.2, 0.5]), labels)


def test_the_verdict_comes_first_and_numbers_are_those_of_the_metrics():
    rows = make_rows()
    metrics = results.compute_metrics(rows)
    _, page = written(rows)
    kind, sentence = metrics["verdict"]["kind"], metrics["verdict"]["sentence"]
    assert kind == "found"
    assert page.text.index("Found") < page.text.index(sentence) < page.text.index("What was asked")
    low, high = metrics["attacks"]["sama"]["auc_ci"]
    assert f"{metrics['attacks']['sama']['auc']:.3f} ({low:.3f}–{high:.3f})" in page.text
    assert "120 (60 members, 60 non-members)" in page.text


def test_what_voids_a_result_stands_in_its_first_lines_with_a_way_out():
    bad = [gate(n, "void", f"The {n} is broken.", f"Mend {n}.") for n in ("first", "second")]
    _, page = written(make_rows(), gates=[*bad, gate("third", "warn", "Weak.", "Look.")])
    start = page.text.split("What was asked")[0]
    assert start.index("No conclusion") < start.index("void for 2 reasons")
    assert start.index("The first is broken. Mend first.") < start.index("Weak. Look.")
    assert "must not be read" in start
    assert "tells members from" not in page.text
    rows = page.text[page.text.index("Checks of texts") :]
    assert rows.index("second") < rows.index("third")


def test_nothing_is_loaded_and_only_our_script_may_run():
    rows = make_rows(attacks=("sama", "loss", "mink"))
    metrics = results.compute_metrics(rows)
    figures = html.shown_figures(rows, metrics, a_spread())
    text, page = written(rows, figures)
    policy = next(m["content"] for m in page.of("meta") if "http-equiv" in m)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script
    assert policy
    assert policy.startswith("default-src 'none'")
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(page.of("script")) == 1
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:,"))
    assert not re.findall(r"url\((?!#)", text)
    assert "@import" not in text


def test_figures_have_a_title_a_description_a_table_and_no_fixed_ink():
    rows = make_rows(attacks=("sama", "loss"))
    figures = html.shown_figures(rows, results.compute_metrics(rows), a_spread())
    names = [figure.name for figure in figures]
    wanted = ["roc-linear", "roc-logarithmic", "scores-sama", "scores-loss", "p-values"]
    assert names == [*wanted, "densities"]
    _, page = written(rows, figures)
    pictures = [a for a in page.of("div") if a.get("role") == "img"]
    assert len(pictures) == len(page.of("svg")) == len(figures)
    ids = {a["id"] for _, a in page.elements if "id" in a}
    for picture in pictures:
        assert {picture["aria-labelledby"], picture["aria-describedby"]} <= ids
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers)), "figures share an id"
    for figure in figures:
        assert figure.title in page.text
        for line in figure.rows:
            assert len(line) == len(figure.header)
        assert "#000000" not in figure.svg
        assert "<style" not in figure.svg
    assert "#ffffff" not in "".join(figure.svg for figure in figures)


def test_the_numbers_behind_figures_are_those_of_the_scores():
    rows = make_rows()
    metrics = results.compute_metrics(rows)
    figures = {f.name: f for f in html.shown_figures(rows, metrics, a_spread())}
    members = np.array([row["scores"]["sama"] for row in rows if row["label"] == 1])
    others = np.array([row["scores"]["sama"] for row in rows if row["label"] == 0])
    found = max(
        np.mean(members >= t) for t in [*others, *members] if np.mean(others >= t) <= 0.1 + 1e-9
    )
    assert figures["roc-linear"].rows[0][3] == f"{100 * found:.1f} %"
    p = [(1 + np.sum(others >= score)) / 61 for score in members]
    assert figures["p-values"].rows[0][2] == f"{100 * np.mean(np.array(p) <= 0.05):.1f} %"
    own = [np.sum(others >= score) / 60 for score in others]
    assert figures["p-values"].rows[1][3] == f"{100 * np.mean(np.array(own) <= 0.1):.1f} %"
    given = a_spread()
    assert given is not None
    line = given["classes"]["members"]["by_pass"][2]
    assert figures["densities"].rows[2] == ["members", "50.0 %", *(f"{x:+.3f}" for x in line)]


def test_foreign_words_stay_text():
    rows = make_rows(attacks=("sama", EVIL))
    evil = {
        "target": f"models/{EVIL}",
        "notes": [EVIL + "‮\x1b[31m"],
        "command": EVIL,
        "run": {EVIL: EVIL},
        "not_computed": {EVIL: EVIL},
        "cost": {"seconds": {}},
    }
    figures = html.shown_figures(rows, results.compute_metrics(rows), None)
    text, page = written(rows, figures, [gate("x", "warn", EVIL, EVIL)], **evil)
    assert len(page.of("script")) == 1
    assert text.count("alert(1)") > 8
    assert EVIL not in text
    assert "‮" not in text
    assert "\x1b" not in text


def test_no_text_and_no_id_is_in_it(tmp_path):
    for name, value in {"manifest.json": {"gates": []}, "densities.json": a_spread()}.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make_rows()))
    page = report.write_report(tmp_path, figures=False).read_text()
    assert SECRET not in page
    assert "secret-id" not in page


def test_unlabelled_runs_have_scores_and_no_verdict():
    rows = make_rows(labelled=False)
    figures = html.shown_figures(rows, results.compute_metrics(rows), None)
    assert [f.name for f in figures] == ["scores-sama", "scores-loss"]
    _, page = written(rows, figures)
    assert "No labels" in page.text
    assert "120 without a label" in page.text


def test_runs_without_scores_make_a_page():
    rows = [{"id": "a", "label": None, "status": "empty", "scores": {}}]
    _, page = written(rows, html.shown_figures(rows, results.compute_metrics(rows), None))
    assert "No attack has scores." in page.text


def test_the_same_run_gives_the_same_bytes():
    rows = make_rows()
    metrics = results.compute_metrics(rows)
    pages = [
        html.html(rows, metrics, {}, html.shown_figures(rows, metrics, a_spread()), "2026-01-02")
        for _ in range(2)
    ]
    assert pages[0] == pages[1]
    assert "Written on 2026-01-02" in pages[0]


def test_a_matplotlibrc_changes_nothing():
    rows = make_rows()
    metrics = results.compute_metrics(rows)
    first = html.shown_figures(rows, metrics, a_spread())
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert html.shown_figures(rows, metrics, a_spread()) == first


@pytest.mark.parametrize(
    "content", ["", "{}", '{"densities": [0.1], "classes": {"members": {"texts": 1}}}', "[1]"]
)
def test_a_damaged_file_of_densities_draws_none(tmp_path: Path, content: str):
    (tmp_path / DENSITIES).write_text(content)
    assert report.read_spread(tmp_path / DENSITIES) is None


def test_a_file_of_densities_is_read_as_it_was_written(tmp_path: Path):
    whole = a_spread()
    (tmp_path / DENSITIES).write_text(json.dumps(whole))
    assert report.read_spread(tmp_path / DENSITIES) == whole
    whole["classes"]["members"]["by_pass"].pop()
    (tmp_path / DENSITIES).write_text(json.dumps(whole))
    assert report.read_spread(tmp_path / DENSITIES) is None
