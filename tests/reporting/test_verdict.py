"""What a run is said to show: four verdicts by rules that were fixed before."""

import numpy as np
import pytest
from score_rows import make_rows

from sama_jax.reporting import results
from sama_jax.reporting.verdict import CONTROL, judge
from sama_jax.storage.protocol import Protocol
from sama_jax.validity import bounds
from sama_jax.validity.gate import gate
from sama_jax.validity.scores import PIPELINE

PASSED = gate(CONTROL, "pass", "32 texts were found.")
BROKEN = gate("same_losses", "void", "They are the same.", "Look for a wrong folder.")
BOTH = Protocol("sama", ("sama", "loss"))


def test_an_attack_that_works_is_found():
    verdict, gates = judge(make_rows(shift=1.0), BOTH, [])
    assert verdict["kind"] == "found"
    assert verdict["sentence"].startswith("The primary attack, sama, tells members")
    assert "Of the 2 declared attacks 1 do so" in verdict["sentence"]
    assert {one["status"] for one in gates if one["name"] != CONTROL} == {"pass"}


DIFFERENT = gate("blind", "warn", "Without any model, words tell the classes apart.", "Split anew.")


def with_baseline(rows, shift):
    draw = np.random.default_rng(5)
    for row in rows:
        row["baseline"] = float(draw.normal(shift * (row["label"] or 0)))
    return rows


def test_where_sources_differ_only_what_goes_beyond_them_is_found():
    strong, _ = judge(with_baseline(make_rows(shift=2.0), 0.5), BOTH, [DIFFERENT])
    assert strong["kind"] == "found"
    assert "beyond that baseline's, and only this can mean membership" in strong["sentence"]
    assert strong["excess"]["ci"][0] > 0
    weak, _ = judge(with_baseline(make_rows(shift=1.0), 1.5), BOTH, [DIFFERENT])
    assert weak["declared"]["sama"]["p"] < 0.001
    assert weak["kind"] == "undecided"
    assert "but their source alone may do so" in weak["sentence"]
    unknown, _ = judge(make_rows(shift=2.0), BOTH, [DIFFERENT])
    assert unknown["kind"] == "undecided"
    assert "excess" not in unknown
    fair, _ = judge(with_baseline(make_rows(shift=1.0), 1.5), BOTH, [])
    assert fair["kind"] == "found"


def test_what_voids_stands_in_place_of_any_finding():
    verdict, gates = judge(make_rows(shift=3.0), BOTH, [BROKEN])
    assert verdict["kind"] == "no conclusion"
    assert verdict["sentence"].startswith("No conclusion (same_losses): They are the same.")
    assert "must not be read as a result" in verdict["sentence"]
    assert BROKEN in gates
    unlabelled, _ = judge(make_rows(labelled=False), BOTH, [BROKEN])
    assert unlabelled["kind"] == "no conclusion"


def test_few_texts_are_undecided_and_say_what_they_could_show():
    verdict, _ = judge(make_rows(n=6, shift=0.0), BOTH, [PASSED])
    assert verdict["kind"] == "undecided"
    assert "in 80 % of audits" in verdict["sentence"]
    assert verdict["detectable_auc"] > 0.9


def test_nothing_above_the_margin_needs_texts_and_a_control():
    rows = make_rows(n=1200, shift=0.0)
    assert judge(rows, BOTH, [PASSED])[0]["kind"] == "nothing above the margin"
    verdict, _ = judge(rows, BOTH, [])
    assert verdict["kind"] == "undecided"
    assert "No control was found" in verdict["sentence"]
    narrow = Protocol("sama", ("sama", "loss"), margin=0.501)
    assert judge(rows, narrow, [PASSED])[0]["kind"] == "undecided"


def test_a_few_members_that_stand_out_forbid_nothing_above_the_margin():
    rows = make_rows(n=1200, shift=0.0)
    members = [row for row in rows if row["label"] == 1]
    for row in members[:48]:
        row["scores"]["loss"] = 50.0
    verdict, _ = judge(rows, Protocol("sama", ("sama", "loss"), margin=0.6), [PASSED])
    assert max(d["simultaneous_ci"][1] for d in verdict["declared"].values()) < 0.6
    assert verdict["kind"] == "undecided"
    assert "loss surely finds more members than chance at 1 % FPR" in verdict["sentence"]


def test_a_declared_attack_without_scores_forbids_nothing_above_the_margin():
    rows = make_rows(n=1200, shift=0.0)
    family = Protocol("sama", ("sama", "loss", "lowercase"))
    verdict, _ = judge(rows, family, [PASSED])
    assert verdict["kind"] == "undecided"
    assert "No scores were made by lowercase, which the protocol declares." in verdict["sentence"]


def test_a_control_that_was_not_passed_outweighs_one_that_was():
    rows, learnt = make_rows(n=1200, shift=0.0), gate(PIPELINE, "pass", "30 texts were learnt.")
    verdict, _ = judge(rows, BOTH, [learnt])
    assert verdict["kind"] == "nothing above the margin"
    assert verdict["sentence"].endswith("at once). 30 texts were learnt.")
    lost = [gate(CONTROL, "warn", "Not found."), gate(PIPELINE, "warn", "Not found.")]
    for passed, failed in ((learnt, lost[0]), (PASSED, lost[1])):
        assert judge(rows, BOTH, [passed, failed])[0]["kind"] == "undecided"


@pytest.mark.parametrize(
    ("texts", "documents", "status", "said"),
    [
        (8, 8, "pass", "A positive control of 8 different known members was found among"),
        (64, 8, "pass", "A positive control of 8 different known members (64 texts) was found"),
        (6, 6, "warn", "of 6 different known members is too small: fewer than 7"),
        (60, 6, "warn", "of 6 different known members (60 texts) is too small"),
        (30, 1, "warn", "of 1 different known member (30 texts) is too small"),
    ],
)
def test_a_control_counts_documents_and_needs_seven(texts, documents, status, said):
    rows = make_rows(n=1200, shift=0.0)
    known = [
        {**rows[0], "label": None, "control": True, "scores": {"sama": 9.0 + i, "loss": 0.0}}
        for i in range(texts)
    ]
    if texts > documents:
        known = [row | {"group": i % documents} for i, row in enumerate(known)]
    verdict, gates = judge([*rows, *known], BOTH, [])
    (found,) = (one for one in gates if one["name"] == CONTROL)
    assert (found["status"], said in found["sentence"]) == (status, True), found["sentence"]
    assert verdict["kind"] == ("nothing above the margin" if status == "pass" else "undecided")


def test_members_below_non_members_void_the_run():
    verdict, _ = judge(make_rows(shift=-2.0), BOTH, [])
    assert verdict["kind"] == "no conclusion"
    assert "labels may be swapped" in verdict["sentence"]


def test_another_attack_that_stands_out_is_no_finding():
    rows = make_rows(attacks=("loss", "sama"), shift=2.0)
    verdict, _ = judge(rows, BOTH, [])
    assert verdict["kind"] == "undecided"
    assert "loss stood out afterwards, which is no finding" in verdict["sentence"]


def test_attacks_that_were_not_declared_make_no_headline():
    rows = make_rows(attacks=("bows", "sama"), shift=2.0)
    verdict, _ = judge(rows, Protocol.of(["bows", "sama"]), [])
    assert verdict["kind"] == "undecided"
    assert "bows" not in verdict["sentence"]


def test_a_primary_without_scores_is_void():
    rows = make_rows()
    for row in rows:
        row["scores"]["sama"] = None
    verdict, _ = judge(rows, BOTH, [])
    assert (verdict["kind"], "primary_scored" in verdict["sentence"]) == ("no conclusion", True)


def test_documents_count_where_texts_name_theirs():
    rows = make_rows(n=60, shift=0.0)
    for i, row in enumerate(rows):
        row["group"] = i // 5
    verdict, _ = judge(rows, BOTH, [])
    assert "with 12 members and 12 non-members" in verdict["sentence"]


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize("few", [1, 0])
def test_a_class_of_few_documents_shows_nothing_either_way(shift, few):
    """Neither that members are found nor that nothing is above the margin."""
    rows = make_rows(n=120 if shift else 1200, shift=shift)
    for i, row in enumerate(rows):
        row["group"] = 10_000 + i % (bounds.DOCUMENTS - 1) if row["label"] == few else i
    verdict, gates = judge(rows, BOTH, [PASSED])
    assert verdict["kind"] == "undecided"
    assert "come from 9 documents of" in verdict["sentence"] or "and 9 of" in verdict["sentence"]
    assert [one["status"] for one in gates if one["name"] == "documents"] == ["warn"]
    for i, row in enumerate(rows):
        row["group"] = 10_000 + i % bounds.DOCUMENTS if row["label"] == few else i
    enough, _ = judge(rows, BOTH, [PASSED])
    assert enough["kind"] == ("found" if shift else "nothing above the margin")


def test_labels_without_a_meaning_are_rarely_a_finding():
    """One-sided 2.5 %: of 200 audits, 2.5 % are 5, and 14 lie four deviations above."""
    rng, found = np.random.default_rng(0), 0
    rows = make_rows(n=20, attacks=("sama", "loss", "zlib", "ratio"), shift=0.0)
    protocol = Protocol("sama", ("sama", "loss", "zlib", "ratio"))
    for _ in range(200):
        labels = rng.permutation([row["label"] for row in rows])
        mixed = [row | {"label": int(label)} for row, label in zip(rows, labels)]
        found += judge_quickly(mixed, protocol)
    assert found <= 14


def judge_quickly(rows, protocol):
    with pytest.MonkeyPatch.context() as patch:
        from sama_jax.core import inference

        original = inference.permutation_tests
        patch.setattr(bounds, "HALVINGS", 1)
        patch.setattr(bounds, "HALVES_APART", 1.0)
        patch.setattr(
            inference, "permutation_tests", lambda *data: original(*data, permutations=199)
        )
        return judge(rows, protocol, [])[0]["kind"] == "found"


def test_the_headline_is_the_verdict_and_what_it_leaves_open():
    text = results.headline(results.compute_metrics(make_rows()))
    assert text.startswith("The primary attack, sama,")
    assert "not proof of safety" in text


# --- the protocol --------------------------------------------------------------------------------


def test_texts_that_serve_as_prefixes_do_not_count():
    rows = make_rows(n=60, shift=1.0)
    for row in rows[:20] + rows[60:80]:
        row["status"], row["scores"] = "prefix", {"sama": None, "loss": None}
    verdict, _ = judge(rows, BOTH, [])
    fewer, _ = judge(make_rows(n=40, shift=1.0), BOTH, [])
    assert verdict["detectable_auc"] == fewer["detectable_auc"]


def test_a_primary_that_was_never_computed_is_void_and_not_unlabelled():
    verdict, gates = judge(make_rows(), Protocol("mink", ("mink",)), [])
    assert verdict["kind"] == "no conclusion"
    assert gates[-1]["name"] == "primary_scored"


def test_a_source_that_could_not_be_asked_about_is_no_finding():
    unasked = gate("blind", "not run", "Fewer than 5 texts of a class.")
    assert judge(make_rows(shift=2.0), BOTH, [unasked])[0]["kind"] == "undecided"


def test_a_protocol_that_came_after_the_losses_says_so():
    late = Protocol("sama", ("sama", "loss"), stored=True)
    assert "were stored before it was declared" in judge(make_rows(), late, [])[0]["sentence"]
    said = judge(make_rows(), Protocol("sama", ("sama", "loss")), [])[0]["sentence"]
    assert "declared before this run's first pass; whether other runs of these texts had" in said


def test_one_text_without_a_group_does_not_make_documents_independent():
    rows = make_rows(n=60, shift=0.6)
    for i, row in enumerate(rows):
        row["group"] = i // 10
    grouped = judge(rows, BOTH, [])[0]["declared"]["sama"]
    del rows[0]["group"]
    lacking = judge(rows, BOTH, [])[0]["declared"]["sama"]
    assert lacking["p"] == pytest.approx(grouped["p"], rel=0.5)
    for row in rows:
        row.pop("group", None)
    assert judge(rows, BOTH, [])[0]["declared"]["sama"]["p"] < grouped["p"] / 2
