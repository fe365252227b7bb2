"""Gates of several goes, or processes, of one run."""

from sama_jax.validity.gate import gate, worst_of


def test_what_voids_a_part_voids_the_whole_and_stands_whatever_is_read_later():
    void, passed, unread = (gate("a", status, status) for status in ("void", "pass", "not run"))
    assert worst_of([[void], [unread]]) == worst_of([[void], [passed]]) == [void]
    assert worst_of([[passed], [unread]]) == [passed]
    assert worst_of([[passed], [void]]) == worst_of([[], [void]]) == [void]
    assert worst_of([[passed], [passed | {"statistic": 1.0}]]) == [passed]
    other = gate("b", "warn", "other")
    assert worst_of([[passed], [other, void]]) == [void, other]
