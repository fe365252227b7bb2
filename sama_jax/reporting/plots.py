"""Draws curves and histograms into axes, for the pictures of report.md and for report.html."""

import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sama_jax.core import metrics as measure

# Okabe and Ito's palette, told apart with every common colour blindness; a line style as well
# once the colours are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
MEMBER, NONMEMBER = "#D55E00", "#0072B2"
NONMEMBER_STYLE: dict[str, Any] = {"histtype": "stepfilled", "color": NONMEMBER, "alpha": 0.45}
MEMBER_STYLE: dict[str, Any] = {"histtype": "step", "color": MEMBER, "linewidth": 1.8}
_UNKNOWN_STYLE: dict[str, Any] = {"histtype": "step", "color": "0.45", "linewidth": 1.4}

Columns = dict[str, tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]]
"""Attack -> its finite scores and the labels of those texts, -1 where there is none."""


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """Makes a figure without pyplot, which would add global state and may open a window."""
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def draw_roc(axes: Axes, columns: Columns, *, log: bool) -> int:
    """Draws ROC curves as the steps that `metrics.tpr_at_fpr` reads: no interpolation.

    Returns:
      the largest number of non-members of an attack, of which one is the smallest rate.
    """
    labelled = {name: (s[y >= 0], y[y >= 0]) for name, (s, y) in columns.items()}
    n_nonmembers = max(int((y == 0).sum()) for _, y in labelled.values())
    n_members = max(int((y == 1).sum()) for _, y in labelled.values())
    # A rate of 0 lies on the edge of a logarithmic axis.
    left, bottom = (1 / (2 * n_nonmembers), 1 / (2 * n_members)) if log else (0.0, 0.0)
    for i, (name, (scores, labels)) in enumerate(labelled.items()):
        fpr, tpr, _ = measure.roc_points(scores, labels)
        axes.plot(
            np.maximum(fpr, left),
            np.maximum(tpr, bottom),
            drawstyle="steps-post",
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_STYLES[i // len(_COLOURS) % len(_STYLES)],
            linewidth=1.8,
            label=f"{name}, AUC {measure.auc(scores, labels):.3f}",
        )
    start = min(left, bottom)
    dashes: Any = (0, (5, 3))
    axes.plot([start, 1], [start, 1], color="0.45", linestyle=dashes, linewidth=1, label="guessing")
    floor = f"1 of {n_nonmembers} non-members"
    if log:
        axes.axvspan(left, 1 / n_nonmembers, color="0.93", zorder=0)
        axes.set(xscale="log", yscale="log")
    axes.axvline(1 / n_nonmembers, color="0.6", linewidth=1, linestyle=":", label=floor)
    axes.set(xlim=(left, 1), ylim=(bottom, 1.05))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("false-positive rate (share of non-members flagged)")
    axes.set_ylabel("true-positive rate (share of members found)")
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    return n_nonmembers


def draw_histogram(
    axes: Axes, name: str, scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> None:
    """Draws the scores of an attack by class, each class's bars as shares of it."""
    low, high, clipped = score_range(scores)
    edges = np.linspace(low, high, int(np.clip(math.sqrt(scores.size), 10, 40)) + 1).tolist()
    scores = np.clip(scores, low, high)
    styles = (
        (0, "non-members", NONMEMBER_STYLE),
        (1, "members", MEMBER_STYLE),
        (-1, "texts without a label", _UNKNOWN_STYLE),
    )
    for label, word, style in styles:
        of = scores[labels == label]
        if of.size:
            axes.hist(of, edges, weights=np.full(of.size, 1 / of.size), label=word, **style)
    title = name
    if {0, 1} <= set(labels.tolist()):
        known = labels >= 0
        title += f", AUC {measure.auc(scores[known], labels[known]):.3f}"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("score (ends hold outliers)" if clipped else "score", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(nbins=5)


def score_range(scores: Float[np.ndarray, " n"]) -> tuple[float, float, bool]:
    """Returns the ends `(low, high)` of a histogram, and whether scores lie outside of them.

    A few extreme scores must not squeeze the rest into one bar.
    """
    low, high = float(scores.min()), float(scores.max())
    q1, q3 = (float(x) for x in np.quantile(scores, [0.25, 0.75]))
    fences = max(low, q1 - 3 * (q3 - q1)), min(high, q3 + 3 * (q3 - q1))  # Tukey's "far out"
    outside = float(((scores < fences[0]) | (scores > fences[1])).mean())
    if 0 < outside <= 0.05 and fences[0] < fences[1]:  # more than that is no outlier: show it
        return *fences, True
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # constant scores still need a width
        margin = max(0.5, 0.01 * abs(low))
        return low - margin, high + margin, False
    return low, high, False
