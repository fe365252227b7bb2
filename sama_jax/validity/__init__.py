"""Decides what voids or weakens a result: one pure function a gate, arrays in and a `Gate` out.

May import the words, `core` and `texts`. Thresholds stand in `bounds`, nowhere else.
"""
