"""What a run set out to show is fixed before its first pass, and no later command changes it."""

from dataclasses import asdict

import pytest

from sama_jax.errors import DataError, UsageError
from sama_jax.storage.protocol import (
    PROTOCOL,
    Protocol,
    known_protocol,
    require_same,
    write_protocol,
)

ATTACKS = ["sama", "loss", "ratio", "pia"]


def test_what_is_usual_is_declared_unless_others_are():
    assert Protocol.of(ATTACKS).family == ("sama", "loss", "ratio")
    assert Protocol.of(["pia", "loss"]).primary == "pia"
    assert Protocol.of(ATTACKS, "loss", ["pia"]).family == ("loss", "pia")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"primary": "mink"}, "'mink' is not among --attacks"),
        ({"family": ["mink"]}, "'mink' is not among --attacks"),
        ({"margin": 0.5}, "--margin is 0.5"),
        ({"family": [f"a{i}" for i in range(8)]}, "declares 9 attacks, at most 8"),
    ],
)
def test_declarations_that_mean_nothing_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        Protocol.of([*ATTACKS, *(f"a{i}" for i in range(8))], **given)


def test_a_run_keeps_its_first_protocol(tmp_path):
    first = Protocol.of(ATTACKS, "ratio", margin=0.6)
    assert known_protocol(tmp_path, {}) is None
    write_protocol(tmp_path, first)
    assert known_protocol(tmp_path, {}) == first
    # A later go that declares nothing follows it; one that declares the same may.
    require_same(tmp_path, first, Protocol.of(["loss"]), [])
    require_same(tmp_path, first, first, ["primary", "margin"])
    with pytest.raises(UsageError, match="primary was 'ratio', is 'loss'"):
        require_same(tmp_path, first, Protocol.of(["loss"]), ["primary"])


def test_a_protocol_that_is_gone_is_that_of_the_manifest(tmp_path):
    first = Protocol.of(ATTACKS, "ratio")
    assert known_protocol(tmp_path, {"protocol": asdict(first)}) == first


def test_a_changed_protocol_is_refused(tmp_path):
    write_protocol(tmp_path, Protocol.of(ATTACKS))
    path = tmp_path / PROTOCOL
    path.write_text(path.read_text().replace('"sama"', '"loss"', 1))
    with pytest.raises(DataError, match="not as it was written"):
        known_protocol(tmp_path, {})
