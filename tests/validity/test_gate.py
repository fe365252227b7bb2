"""Gates of two goes of one run, together."""

from sama_jax.validity.gate import gate, worst_of


def test_what_voids_a_run_stands_when_fewer_attacks_are_read_later():
    void, passed, unread = (gate("a", status, status) for status in ("void", "pass", "not run"))
    assert worst_of([void], [unread]) == worst_of([void], [passed]) == [void]
    assert worst_of([passed], [unread]) == [passed]
    assert worst_of([passed], [void]) == worst_of([], [void]) == [void]
    assert worst_of([passed], [passed | {"statistic": 1.0}]) == [passed]
