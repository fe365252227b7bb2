"""Draws a run: ROC curves and histograms of scores. The only file that imports Matplotlib."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sama_jax.core import metrics as measure
from sama_jax.reporting.results import attack_names, column
from sama_jax.storage.files import write_atomic
from sama_jax.storage.run_folder import Row

# Okabe and Ito's palette, told apart with every common colour blindness; a line style as well
# once the colours are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MEMBER, _NONMEMBER = "#D55E00", "#0072B2"

Columns = dict[str, tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]]
"""Attack -> its finite scores and the labels of those texts, -1 where there is none."""


def write_figures(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes `figures/roc.png` (if there are both classes) and `figures/scores.png`.

    Returns the paths of the files; none if no text has a score.
    """
    columns = {}
    for name in attack_names(rows):
        scores, labels, _ = measure.usable(*column(rows, name))
        if scores.size:
            columns[name] = (scores, labels)
    written = []
    both = {n: c for n, c in columns.items() if {0, 1} <= set(c[1].tolist())}
    for name, draw, content in (("roc", _draw_roc, both), ("scores", _draw_scores, columns)):
        if content:
            path = folder / "figures" / f"{name}.png"
            with matplotlib.rc_context():
                matplotlib.rcdefaults()  # whatever a `matplotlibrc` of the current folder says
                _save(draw(content), path)
            written.append(path)
    return written


def _new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = None
) -> Figure:
    """Makes a figure without pyplot, which would add global state and may open a window."""
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # No software tag: the same scores give the same file under every matplotlib patch release.
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_atomic(path, image.getvalue())


def _draw_roc(columns: Columns) -> Figure:
    """Draws log-log ROC curves as the steps that `metrics.tpr_at_fpr` reads: no interpolation."""
    labelled = {name: (s[y >= 0], y[y >= 0]) for name, (s, y) in columns.items()}
    n_nonmembers = max(int((y == 0).sum()) for _, y in labelled.values())
    n_members = max(int((y == 1).sum()) for _, y in labelled.values())
    left, bottom = 1 / (2 * n_nonmembers), 1 / (2 * n_members)
    figure = _new_figure(6.4, 5.6, "constrained")
    axes = figure.add_subplot()
    for i, (name, (scores, labels)) in enumerate(labelled.items()):
        fpr, tpr, _ = measure.roc_points(scores, labels)
        axes.plot(
            np.maximum(fpr, left),  # a rate of 0 lies on the edge of a logarithmic axis
            np.maximum(tpr, bottom),
            drawstyle="steps-post",
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_STYLES[i // len(_COLOURS) % len(_STYLES)],
            linewidth=1.8,
            label=f"{name}, AUC {measure.auc(scores, labels):.3f}",
        )
    ends = np.geomspace(min(left, bottom), 1, 2)
    axes.plot(ends, ends, color="0.45", linestyle=(0, (5, 3)), linewidth=1, label="guessing")
    floor = f"1 of {n_nonmembers} non-members"
    axes.axvspan(left, 1 / n_nonmembers, color="0.93", zorder=0)
    axes.axvline(1 / n_nonmembers, color="0.6", linewidth=1, linestyle=":", label=floor)
    axes.set(xscale="log", yscale="log", xlim=(left, 1), ylim=(bottom, 1.05))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("false-positive rate (share of non-members flagged)")
    axes.set_ylabel("true-positive rate (share of members found)")
    axes.set_title("ROC of each attack, both axes logarithmic", fontsize=11)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    _legend(axes, len(labelled))
    return figure


def _legend(axes: Axes, num_attacks: int) -> None:
    """Puts the legend below the diagonal, or outside the axes if it would cover curves."""
    if num_attacks <= 7:
        axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, borderaxespad=0)


def _draw_scores(columns: Columns) -> Figure:
    """Draws a histogram for each attack; bars are shares of a class, so unequal classes compare."""
    num_columns = 2 if len(columns) == 4 else min(3, len(columns))
    num_rows = math.ceil(len(columns) / num_columns)
    width, height = max(4.5, 3.4 * num_columns), 2.7 * num_rows + 0.5
    figure = _new_figure(width, height)
    # Margins in inches. Matplotlib's layout would draw everything twice more: 8 s for 34 attacks
    # instead of 2.
    left, right, bottom, top, between, below = 0.7, 0.15, 0.95, 0.35, 0.55, 0.8
    panel = (width - left - right + between) / num_columns - between
    panel_height = (height - bottom - top + below) / num_rows - below
    figure.subplots_adjust(
        left=left / width,
        bottom=bottom / height,
        right=1 - right / width,
        top=1 - top / height,
        wspace=between / panel,
        hspace=below / panel_height,
    )
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    handles: dict[str, Artist] = {}
    for axes, (name, (scores, labels)) in zip(grid, columns.items()):
        _draw_histogram(axes, name, scores, labels)
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    for axes in grid[::num_columns]:
        axes.set_ylabel("share of class" if len(handles) > 1 else "share of texts")
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=9)
    return figure


def _draw_histogram(
    axes: Axes, name: str, scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> None:
    low, high, clipped = score_range(scores)
    edges = np.linspace(low, high, int(np.clip(math.sqrt(scores.size), 10, 40)) + 1).tolist()
    scores = np.clip(scores, low, high)
    styles = (
        (0, "non-members", {"histtype": "stepfilled", "color": _NONMEMBER, "alpha": 0.45}),
        (1, "members", {"histtype": "step", "color": _MEMBER, "linewidth": 1.8}),
        (-1, "texts without a label", {"histtype": "step", "color": "0.3", "linewidth": 1.4}),
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
