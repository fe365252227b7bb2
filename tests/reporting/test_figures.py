"""Pictures: the same bytes for the same scores, and room for everything."""

import matplotlib
import numpy as np
import pytest
from score_rows import make_rows

from sama_jax.reporting import figures, plots

pytestmark = pytest.mark.usefixtures("figures")


def test_figures_are_the_same_bytes_for_the_same_scores(tmp_path):
    rows = make_rows()
    first = [p.read_bytes() for p in figures.write_figures(tmp_path / "a", rows)]
    second = [p.read_bytes() for p in figures.write_figures(tmp_path / "b", rows)]
    other = [p.read_bytes() for p in figures.write_figures(tmp_path / "c", make_rows(seed=1))]
    assert len(first) == 2
    assert first == second
    assert all(a != b for a, b in zip(first, other))


def test_a_matplotlibrc_changes_nothing(tmp_path):
    rows = make_rows()
    first = [p.read_bytes() for p in figures.write_figures(tmp_path / "a", rows)]
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "axes.facecolor": "red"}):
        second = [p.read_bytes() for p in figures.write_figures(tmp_path / "b", rows)]
    assert first == second


def test_histogram_range_keeps_a_few_outliers_from_squeezing_the_rest():
    scores = np.r_[np.linspace(-1, 1, 99), 1e6]
    low, high, clipped = plots.score_range(scores)
    assert clipped
    assert (low, high) == (-1, pytest.approx(3.5, abs=0.1))  # 0.5 + 3 quartile ranges of 1
    assert plots.score_range(scores[:-1]) == (-1, 1, False)


def test_many_attacks_fit_in_the_figures(tmp_path):
    attacks = tuple(f"attack{i}" for i in range(17))
    paths = figures.write_figures(tmp_path, make_rows(n=12, attacks=attacks))
    assert [p.name for p in paths] == ["roc.png", "scores.png"]
