"""Metrics of a run, the paired comparison and the headline."""

import subprocess
import sys

import numpy as np
import pytest
from score_rows import make_rows

from sama_jax.core import metrics
from sama_jax.errors import DataError
from sama_jax.reporting import results


def test_metrics_are_those_of_each_attack_in_order():
    rows = make_rows(attacks=("zlib", "sama", "loss"))
    content = results.compute_metrics(rows)
    assert list(content["attacks"]) == ["zlib", "sama", "loss"]
    labels = [row["label"] for row in rows]
    for name, summary in content["attacks"].items():
        scores = [row["scores"][name] for row in rows]
        assert summary == metrics.summarize(scores, labels)


def test_metrics_are_empty_without_labels():
    for rows in (make_rows(labelled=False), []):
        found = results.compute_metrics(rows)
        assert found["attacks"] == {}
        assert found["verdict"]["kind"] == "unlabelled"


def test_unlabelled_and_unscored_texts_do_not_count():
    rows = make_rows()
    expected = results.compute_metrics(rows)["attacks"]["loss"]
    extra = [
        {"id": "a", "scores": {"sama": 9.0, "loss": 9.0}},
        {"id": "b", "label": 1, "status": "empty", "scores": {"sama": 1.0, "loss": None}},
        {"id": "c", "label": 0, "status": "empty", "scores": {"sama": 1.0}},
    ]
    actual = results.compute_metrics(rows + extra)["attacks"]["loss"]
    assert actual["notes"][-1] == "2 texts with a label but no score left out."
    actual["notes"].pop()
    assert actual == expected


def test_paired_differences_compare_sama_with_each_other_attack_on_common_texts():
    rows = make_rows(attacks=("sama", "loss", "zlib"))
    rows[0]["scores"]["loss"] = None
    paired = results.compute_metrics(rows)["paired"]
    assert list(paired) == ["sama - loss", "sama - zlib"]
    common = rows[1:]
    difference, low, high = metrics.paired_difference(
        [row["scores"]["sama"] for row in common],
        [row["scores"]["loss"] for row in common],
        [row["label"] for row in common],
    )
    assert paired["sama - loss"] == {
        "difference": difference,
        "ci": [low, high],
        "n_members": 59,
        "n_nonmembers": 60,
    }
    assert "paired" not in results.compute_metrics(make_rows(attacks=("loss", "zlib")))


def test_attacks_with_the_same_order_have_no_interval():
    rows = make_rows(attacks=("sama", "loss"))
    for row in rows:
        row["scores"]["loss"] = 2 * row["scores"]["sama"]
    assert results.compute_metrics(rows)["paired"]["sama - loss"]["ci"] is None
    assert results.paired_text(0.0, None) == "same scores"
    assert results.paired_text(0.1, [-0.05, 0.25]) == "+0.100 (-0.050 to +0.250)"


def test_groups_count_and_a_text_without_one_is_one():
    rows = [row | {"id": f"{row['id']}-{i}"} for row in make_rows() for i in range(3)]
    alone = results.compute_metrics(rows)
    for place, row in enumerate(rows):
        row["group"] = place // 3
    rows.append({"id": "unlabelled", "scores": {"sama": 1.0}})
    grouped = results.compute_metrics(rows)
    assert grouped["attacks"]["sama"]["n_groups"] == len(rows) // 3

    def width(of):
        return np.diff([*of["attacks"]["sama"]["auc_ci"], *of["paired"]["sama - loss"]["ci"]])

    # Copies of three: as many texts as there are groups have a deviation sqrt(3) times as large,
    # on the logit scale, which bends these ends by a few percent.
    np.testing.assert_allclose((width(grouped) / width(alone))[[0, 2]], 3**0.5, rtol=0.06)
    del rows[0]["group"]  # it is a group of its own
    lacking = results.compute_metrics(rows)
    assert lacking["attacks"]["sama"]["n_groups"] == len(rows) // 3 + 1


def test_experiments_and_demos_read_the_same_numbers():
    rows = make_rows(attacks=("sama", "loss"))
    rows[0]["scores"]["loss"], rows[1]["label"] = None, None
    content = results.compute_metrics(rows)
    for name in ("sama", "loss"):
        assert results.auc(rows, name) == content["attacks"][name]["auc"]
    assert results.paired(rows, "sama", "loss") == content["paired"]["sama - loss"]
    turned = results.paired(rows, "loss", "sama")
    assert turned["difference"] == -content["paired"]["sama - loss"]["difference"]


def test_a_pair_without_texts_of_one_class_is_an_error_and_not_in_the_metrics():
    rows = make_rows(n=3)
    for row in rows[:3]:
        row["scores"]["loss"] = None
    with pytest.raises(DataError, match="need members and non-members, got 0 and 3"):
        results.paired(rows, "sama", "loss")
    assert "paired" not in results.compute_metrics(rows)


def test_results_import_no_pictures():
    code = "import sys, sama_jax.reporting.results; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
