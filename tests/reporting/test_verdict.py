"""What a run is said to show: four verdicts by rules that were fixed before."""

import json

import numpy as np
import pytest
from score_rows import make_rows

from sama_jax.errors import DataError, UsageError
from sama_jax.reporting import results
from sama_jax.reporting.verdict import CONTROL, judge
from sama_jax.storage.protocol import PROTOCOL, Protocol, fix_protocol, read_protocol
from sama_jax.validity.gate import gate

PASSED = gate(CONTROL, "pass", "32 texts were found.")
BROKEN = gate("same_losses", "void", "They are the same.", "Look for a wrong folder.")
BOTH = Protocol("sama", ("sama", "loss"))


def test_an_attack_that_works_is_found():
    verdict, gates = judge(make_rows(shift=1.0), BOTH, [])
    assert verdict["kind"] == "found"
    assert verdict["sentence"].startswith("The primary attack, sama, tells members")
    assert "Of the 2 declared attacks 1 do so" in verdict["sentence"]
    assert {one["status"] for one in gates} == {"pass"}


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
    assert "No positive control was found" in verdict["sentence"]
    narrow = Protocol("sama", ("sama", "loss"), margin=0.501)
    assert judge(rows, narrow, [PASSED])[0]["kind"] == "undecided"


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
        row["group"] = i // 10
    verdict, _ = judge(rows, BOTH, [])
    assert "with 6 members and 6 non-members" in verdict["sentence"]


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
        patch.setattr(
            inference, "permutation_tests", lambda *data: original(*data, permutations=199)
        )
        return judge(rows, protocol, [])[0]["kind"] == "found"


def test_the_headline_is_the_verdict_and_what_it_leaves_open():
    text = results.headline(results.compute_metrics(make_rows()))
    assert text.startswith("The primary attack, sama,")
    assert "not proof of safety" in text


# --- the protocol --------------------------------------------------------------------------------


def test_a_protocol_is_written_once_and_read_again(tmp_path):
    first = fix_protocol(tmp_path, BOTH, [])
    assert first == read_protocol(tmp_path) == BOTH
    other = Protocol("loss", ("loss", "zlib"))
    assert fix_protocol(tmp_path, other, []) == BOTH  # what nobody stated follows
    with pytest.raises(UsageError, match="primary was 'sama', is 'loss'") as caught:
        fix_protocol(tmp_path, other, ["primary"])
    assert caught.value.exit_code == 2


def test_a_protocol_that_was_edited_is_refused(tmp_path):
    fix_protocol(tmp_path, BOTH, [])
    path = tmp_path / PROTOCOL
    path.write_text(json.dumps(json.loads(path.read_text()) | {"margin": 0.9}))
    with pytest.raises(DataError, match="not as it was written"):
        fix_protocol(tmp_path, BOTH, [])


def test_what_can_be_declared():
    names = ["loss", "zlib", "bows", "sama"]
    assert Protocol.of(names) == Protocol("sama", ("sama", "loss", "zlib"))
    assert Protocol.of(["bows"]) == Protocol("bows", ("bows",))
    assert Protocol.of(names, "loss", ["zlib"]).family == ("loss", "zlib")
    for wrong in ({"primary": "mink"}, {"family": ["mink"]}, {"margin": 0.4}, {"margin": 1.0}):
        with pytest.raises(UsageError):
            Protocol.of(names, **wrong)
    with pytest.raises(UsageError, match="at most 8"):
        Protocol.of([f"a{i}" for i in range(9)], family=[f"a{i}" for i in range(9)])
